"""Frames of arrays: what is decoded is what was encoded, however the bytes are split, and no damage goes unnoticed."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator

import numpy as np
import pytest
from aiohttp import StreamReader
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rollout.engines.vllm.array_frames import Choice, DamagedAnswer, decode, encode

SPAN = {"version": "3", "start": 0, "end": 2}
TWO = [
    Choice(0, np.array([7, 2**31 - 1], np.int32), np.array([-0.25, -9999.0], np.float32), "stop", [SPAN]),
    Choice(1, np.array([], np.int32), np.array([], np.float32), "abort", []),
]


def decoded(content: bytes, size: int = 10**9) -> list[tuple[int, list[Choice] | None]]:
    """The frames of an answer whose bytes arrive in parts of a size."""

    async def scenario() -> list[tuple[int, list[Choice] | None]]:
        loop = asyncio.get_running_loop()
        reader = StreamReader(BaseProtocol(loop), 2**16, loop=loop)
        for start in range(0, len(content), size):
            reader.feed_data(content[start : start + size])
        reader.feed_eof()
        frames: AsyncIterator[tuple[int, list[Choice] | None]] = decode(reader)
        return [frame async for frame in frames]

    return asyncio.run(scenario())


@given(
    lengths=st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=4),
    size=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_arrays_arrive_bit_for_bit(lengths: list[list[int]], size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    answers = [
        [
            Choice(
                number,
                random.integers(0, 2**31, length, dtype=np.int32),
                -random.exponential(size=length).astype(np.float32),
                "length",
                [{"version": "1", "start": 0, "end": length}],
            )
            for number, length in enumerate(own)
        ]
        for own in lengths
    ]
    found = decoded(b"".join(encode(place, answer) for place, answer in enumerate(answers)), size)
    assert [place for place, _ in found] == list(range(len(answers)))
    for (_, choices), answer in zip(found, answers, strict=True):
        assert choices is not None
        for choice, given_choice in zip(choices, answer, strict=True):
            assert choice.token_ids.dtype == np.int32 and choice.log_probs.dtype == np.float32
            assert choice.token_ids.tobytes() == given_choice.token_ids.tobytes()
            assert choice.log_probs.tobytes() == given_choice.log_probs.tobytes()
            assert (choice.index, choice.finish_reason) == (given_choice.index, given_choice.finish_reason)
            assert choice.weight_versions == given_choice.weight_versions


def test_a_failed_request_has_no_choices() -> None:
    assert decoded(encode(5, None)) == [(5, None)]


def test_any_changed_byte_is_noticed() -> None:
    content = encode(1, TWO)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        with pytest.raises(DamagedAnswer):
            decoded(bytes(changed))


@pytest.mark.parametrize("left", [1, 23, 24, 100, -1])
def test_an_answer_that_is_cut_off_is_noticed(left: int) -> None:
    with pytest.raises(DamagedAnswer, match=r"bytes are left where a frame should begin|a frame ends after \d+ of \d+"):
        decoded(encode(0, TWO)[:left])


@pytest.mark.parametrize("content", [pickle.dumps([1] * 30), b'{"request": 0, "choices": []}\n'])
def test_other_formats_are_refused(content: bytes) -> None:
    with pytest.raises(DamagedAnswer, match="is the server of another release"):
        decoded(content)


def test_tokens_without_a_log_prob_are_noticed() -> None:
    short = Choice(0, np.zeros(3, np.int32), np.zeros(2, np.float32), "stop", [])
    with pytest.raises(DamagedAnswer, match="20 bytes for 3 tokens of 8 bytes each"):
        decoded(encode(0, [short]))
