"""Where probes look."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.evaluation.probes import follows, probe_rows

AFTER, TOKEN = 1, 2
token_rows = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
    max_size=6,
)


@given(token_rows)
def test_probes_find_every_place_and_no_other(pairs: list[tuple[list[int], list[int]]]) -> None:
    lengths = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)
    rows = SequenceBatch([np.array(prompt + response, dtype=np.int64) for prompt, response in pairs], lengths)
    places = [
        [(prompt + response)[i - 1] == AFTER for i in range(len(prompt), len(prompt + response))]
        for prompt, response in pairs
    ]
    assert follows(rows, AFTER).tolist() == [place for row in places for place in row]

    part, where = probe_rows(rows, AFTER, TOKEN)
    chosen = [i for i, row in enumerate(places) if any(row)]
    assert [row.tolist() for row in part.tokens] == [rows.tokens[i].tolist() for i in chosen]
    assert where.tolist() == [place for i in chosen for place in places[i]]
    assert part.values["probe_targets"].tolist() == [TOKEN] * part.num_sampled_tokens
