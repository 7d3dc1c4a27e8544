"""The positions at which probes measure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.evaluation.probes import follows, probe_rows

AFTER, TOKEN = 1, 2
sequences = st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=9), max_size=6)
"""(token, whether it is sampled) of each token; the first one of a sequence never is."""


@given(sequences)
def test_probes_find_every_sampled_token_after_the_given_one(drawn: list[list[tuple[int, bool]]]) -> None:
    ids = [[token for token, _ in sequence] for sequence in drawn]
    masks = [[place > 0 and sampled for place, (_, sampled) in enumerate(sequence)] for sequence in drawn]
    batch = SequenceBatch.joined(ids, masks)
    places = [
        [sequence[i - 1] == AFTER for i in range(1, len(sequence)) if mask[i]]
        for sequence, mask in zip(ids, masks, strict=True)
    ]
    assert follows(batch, AFTER).tolist() == [place for sequence in places for place in sequence]

    part, where = probe_rows(batch, AFTER, TOKEN)
    chosen = [i for i, found in enumerate(places) if any(found)]
    assert [sequence.tolist() for sequence in part.sequences] == [ids[i] for i in chosen]
    assert where.tolist() == [place for i in chosen for place in places[i]]
    assert part.values["probe_targets"].tolist() == [TOKEN] * part.num_sampled_tokens
