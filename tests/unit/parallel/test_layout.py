from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.parallel.layout import last_stage_layers, padded_vocabulary


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_padding_is_the_least_that_divides(vocabulary: int, tensor: int) -> None:
    padded = padded_vocabulary(vocabulary, tensor)
    assert padded % tensor == 0
    assert 0 <= padded - vocabulary < tensor


@given(layers=st.integers(1, 80), pipeline=st.integers(1, 16))
def test_every_stage_has_layers_and_the_others_share_equally(layers: int, pipeline: int) -> None:
    if pipeline > layers:
        return
    last = last_stage_layers(layers, pipeline)
    assert last >= 1
    if pipeline > 1:
        assert (layers - last) % (pipeline - 1) == 0
        assert (layers - last) // (pipeline - 1) >= 1
    if layers % pipeline == 0:
        assert last == layers // pipeline


def test_three_layers_on_two_stages_leave_the_head_the_smaller_part() -> None:
    assert last_stage_layers(3, 2) == 1
