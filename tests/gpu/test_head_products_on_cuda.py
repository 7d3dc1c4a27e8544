"""Both ways of computing the head weight's gradient sum it in fp32."""

from __future__ import annotations

import pytest
import torch

from lpreg.statistics import head as _head


@pytest.mark.gpu
@pytest.mark.parametrize("widens", [False, True])
def test_bf16_products_are_summed_in_fp32(widens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if widens and not _head.ADDMM_WIDENS:
        pytest.skip("torch before 2.10")
    monkeypatch.setattr(_head, "ADDMM_WIDENS", widens)
    monkeypatch.setattr(_head, "SUM_ROWS", 7)
    left, right = torch.randn(30, 50, device="cuda").bfloat16(), torch.randn(50, 16, device="cuda").bfloat16()
    start = torch.randn(30, 16, device="cuda")
    total = start.clone()
    _head._add_product(total, left, right)
    torch.testing.assert_close(total, start + left.float() @ right.float(), rtol=1e-5, atol=1e-4)
