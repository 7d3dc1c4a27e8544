"""Checks of values can be postponed, so that a driver reads all of them at once; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lpreg

HIDDEN, WEIGHT, TARGETS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])


def outside() -> object:
    return lpreg.token_stats(HIDDEN @ WEIGHT.T, TARGETS, vocab_size=3)


def not_finite() -> object:
    return lpreg.fused_token_stats(HIDDEN, torch.full_like(WEIGHT, torch.nan), TARGETS)


@pytest.mark.parametrize(
    ("work", "message"), [(outside, "outside the vocabulary of 3"), (not_finite, "3 of 3 rows hold NaN")]
)
def test_a_postponed_check_does_not_raise_and_tells_what_is_wrong(work: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work()
    with lpreg.postponed_checks() as checks:
        work()
    failed = [check for check in checks if check.failed]
    assert len(failed) == 1 and message in failed[0].message()
    with pytest.raises(ValueError, match=message):
        work()


def test_values_that_are_right_pass_every_postponed_check() -> None:
    with lpreg.postponed_checks() as checks:
        lpreg.fused_token_stats(HIDDEN, WEIGHT, TARGETS)
    assert checks and not any(check.failed for check in checks)
