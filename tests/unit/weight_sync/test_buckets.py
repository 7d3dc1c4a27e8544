from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.utils.memory import Reused, fresh
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, flattened, unflatten

tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16])), max_size=8
)


def named(shapes: list[tuple[list[int], torch.dtype]]) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(shapes)]


@given(tensors, st.integers(1, 200), st.booleans())
def test_both_sides_make_the_same_buckets_and_nothing_is_lost(
    shapes: list[tuple[list[int], torch.dtype]], limit: int, reuse: bool
) -> None:
    sent = named(shapes)
    buckets = bucket_specs([TensorSpec.of(name, tensor) for name, tensor in sent], limit)
    flats = flattened(in_shared_memory(sent), limit, Reused() if reuse else fresh)
    received = []
    for bucket, flat in zip(buckets, flats, strict=True):
        assert len(bucket) == 1 or sum(spec.nbytes for spec in bucket) <= limit
        assert len({spec.dtype for spec in bucket}) == 1
        assert flat.nbytes == sum(spec.nbytes for spec in bucket)
        received += [(name, tensor.clone()) for name, tensor in unflatten(flat, bucket)]
    for (name, tensor), (other_name, other) in zip(sent, received, strict=True):
        assert name == other_name and tensor.dtype == other.dtype and tensor.shape == other.shape
        assert torch.equal(tensor, other)


def in_shared_memory(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that share memory, so that each is overwritten when the next one is drawn."""
    memory = Reused()
    for name, tensor in tensors:
        yield name, memory(tensor, tensor.shape).copy_(tensor)


def test_a_large_tensor_has_its_own_bucket() -> None:
    sizes = [1, 100, 1, 1]
    buckets = bucket_specs([TensorSpec(f"t{i}", "uint8", (size,)) for i, size in enumerate(sizes)], 8)
    assert [[spec.nbytes for spec in bucket] for bucket in buckets] == [[1], [100], [1, 1]]


def test_buckets_can_share_memory() -> None:
    sent = [(f"t{i}", torch.ones(10)) for i in range(4)]
    assert len({flat.data_ptr() for flat in flattened(sent, 80, Reused())}) == 1
    assert len({flat.data_ptr() for flat in list(flattened(sent, 80))}) == 2
