from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, bucketed, flatten, unflatten

tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16])), max_size=8
)


def named(shapes: list[tuple[list[int], torch.dtype]]) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(shapes)]


@given(tensors, st.integers(1, 200), st.sampled_from([None, 1, 40, 1000]))
def test_both_sides_cut_alike_and_nothing_is_lost(
    shapes: list[tuple[list[int], torch.dtype]], limit: int, room: int | None
) -> None:
    into = None if room is None else torch.empty(room, dtype=torch.uint8)
    sent = named(shapes)
    buckets = list(bucketed(iter(sent), limit))
    specs = bucket_specs([TensorSpec.of(name, tensor) for name, tensor in sent], limit)
    assert [[name for name, _ in bucket] for bucket in buckets] == [[spec.name for spec in part] for part in specs]
    assert [pair for bucket in buckets for pair in bucket] == sent
    for bucket, part in zip(buckets, specs, strict=True):
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= limit
        assert len({tensor.dtype for _, tensor in bucket}) == 1
        flat = flatten(bucket, into)
        if into is not None and flat.nbytes:
            assert (flat.data_ptr() == into.data_ptr()) is (flat.nbytes <= into.nbytes)
        assert flat.nbytes == sum(spec.nbytes for spec in part)
        for (name, tensor), (other_name, other) in zip(bucket, unflatten(flat, part), strict=True):
            assert name == other_name and tensor.shape == other.shape and torch.equal(tensor, other)


def test_a_large_tensor_goes_alone() -> None:
    sizes = [1, 100, 1, 1]
    buckets = bucketed([(f"t{i}", torch.zeros(size)) for i, size in enumerate(sizes)], 8)
    assert [[tensor.numel() for _, tensor in bucket] for bucket in buckets] == [[1], [100], [1, 1]]
