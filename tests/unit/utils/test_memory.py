from __future__ import annotations

import torch

from megatron_rl.utils.memory import Reused, fresh


def test_reused_memory_gives_every_tensor_the_same_buffer() -> None:
    memory, like = Reused(), torch.zeros(1, dtype=torch.bfloat16)
    large = memory(like, (4, 5))
    assert (large.shape, large.dtype) == ((4, 5), torch.bfloat16) and large.is_contiguous()
    small = memory(torch.zeros(1), [3])
    assert (small.shape, small.dtype) == ((3,), torch.float32)
    assert small.data_ptr() == large.data_ptr()
    assert memory(like, ()).shape == () and memory(like, (0, 3)).shape == (0, 3)
    larger = memory(like, (100,))
    assert larger.numel() == 100 and memory(like, (4, 5)).data_ptr() == larger.data_ptr()


def test_fresh_memory_gives_every_tensor_its_own_buffer() -> None:
    like = torch.zeros(2)
    first, second = fresh(like, (3,)), fresh(like, (3,))
    assert first.data_ptr() != second.data_ptr() and first.dtype == like.dtype
