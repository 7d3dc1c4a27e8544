from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.parallel.layout import last_stage_layers, padded_vocabulary


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_the_padded_vocabulary_is_the_smallest_whose_parts_gpus_read_fast(vocabulary: int, tensor: int) -> None:
    padded = padded_vocabulary(vocabulary, tensor)
    if tensor == 1:
        assert padded == vocabulary
        return
    assert padded % tensor == 0 and padded // tensor % 16 == 0
    assert 0 <= padded - vocabulary < 16 * tensor


@given(layers=st.integers(1, 80), pipeline=st.integers(1, 16))
def test_every_stage_has_layers_and_all_but_the_last_have_equally_many(layers: int, pipeline: int) -> None:
    if pipeline > layers:
        return
    last = last_stage_layers(layers, pipeline)
    assert last >= 1
    if pipeline > 1:
        assert (layers - last) % (pipeline - 1) == 0
        assert (layers - last) // (pipeline - 1) >= 1
    if layers % pipeline == 0:
        assert last == layers // pipeline


def test_the_stage_with_the_head_gets_one_of_three_layers() -> None:
    assert last_stage_layers(3, 2) == 1
