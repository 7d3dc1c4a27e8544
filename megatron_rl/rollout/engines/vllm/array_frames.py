"""The form in which `batch_endpoint.py` answers: token ids and log-probs as arrays, in frames with a checksum.

A frame is the answer to one request, and numbers in it are little-endian:

    header   24 bytes: b"MRL1", number of the request (u32), bytes of head and body (u32, u64), CRC-32 of all the rest
    head     JSON: null if the request failed, else for each choice its `index`, its number of `tokens`, its
             `finish_reason` and its `weight_versions`
    body     for each choice int32 [tokens] token ids, then float32 [tokens] log-probs

The server encodes, the run decodes; nothing in a frame can name code to run. This file runs inside vLLM too.
"""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

MAGIC = b"MRL1"
HEADER = struct.Struct("<4sIIQI")
CHECKED = HEADER.size - 4
"""Bytes of the header that the checksum covers: all but itself."""
IDS, LOG_PROBS = np.dtype("<i4"), np.dtype("<f4")
TOKEN_BYTES = IDS.itemsize + LOG_PROBS.itemsize


class DamagedAnswer(Exception):
    """The bytes are no frames, or were changed or cut off on their way."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One response of a vLLM server."""

    index: int
    """Number of the response among those to its prompt."""
    token_ids: npt.NDArray[np.int32]
    """[n]"""
    log_probs: npt.NDArray[np.float32]
    """[n]"""
    finish_reason: str | None
    weight_versions: list[dict[str, Any]]
    """Spans of tokens, [{version, start, end}, ...]."""


class Reader(Protocol):
    """A stream of bytes, such as an `aiohttp.StreamReader`."""

    async def readexactly(self, n: int, /) -> bytes: ...


def encode(request: int, choices: Sequence[Choice] | None) -> bytes:
    """Returns the frame of a request. choices: None if the request failed."""
    head = [
        {
            "index": choice.index,
            "tokens": len(choice.token_ids),
            "finish_reason": choice.finish_reason,
            "weight_versions": choice.weight_versions,
        }
        for choice in choices or ()
    ]
    arrays = [
        array.tobytes()
        for choice in choices or ()
        for array in (choice.token_ids.astype(IDS, copy=False), choice.log_probs.astype(LOG_PROBS, copy=False))
    ]
    rest = json.dumps(None if choices is None else head).encode()
    sizes = HEADER.pack(MAGIC, request, len(rest), sum(map(len, arrays)), 0)[:CHECKED]
    checksum = zlib.crc32(sizes)
    for part in (rest, *arrays):
        checksum = zlib.crc32(part, checksum)
    return b"".join([sizes, struct.pack("<I", checksum), rest, *arrays])


async def decode(reader: Reader) -> AsyncIterator[tuple[int, list[Choice] | None]]:
    """Yields the number and the choices of each request as soon as its frame has arrived. Raises DamagedAnswer."""
    while True:
        try:
            header = await reader.readexactly(HEADER.size)
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise DamagedAnswer(f"{len(end.partial)} bytes are left where a frame should begin") from end
            return
        magic, request, head_size, body_size, checksum = HEADER.unpack(header)
        if magic != MAGIC:
            raise DamagedAnswer(
                f"a frame begins with {magic!r} instead of {MAGIC!r}: is the server of another release?"
            )
        try:
            head, body = await reader.readexactly(head_size), await reader.readexactly(body_size)
        except asyncio.IncompleteReadError as end:
            raise DamagedAnswer(f"a frame ends after {len(end.partial)} of {end.expected} bytes") from end
        if zlib.crc32(body, zlib.crc32(head, zlib.crc32(header[:CHECKED]))) != checksum:
            raise DamagedAnswer("the checksum of a frame is wrong")
        yield request, _choices(head, body)


def _choices(head: bytes, body: bytes) -> list[Choice] | None:
    """Returns the choices as views of the body, which are read-only."""
    described: list[dict[str, Any]] | None = json.loads(head)
    if described is None:
        return None
    if (tokens := sum(choice["tokens"] for choice in described)) * TOKEN_BYTES != len(body):
        raise DamagedAnswer(f"a frame has {len(body)} bytes for {tokens} tokens of {TOKEN_BYTES} bytes each")
    choices, start = [], 0
    for choice in described:
        count = choice["tokens"]
        ids = np.frombuffer(body, IDS, count, start)
        log_probs = np.frombuffer(body, LOG_PROBS, count, start + ids.nbytes)
        start += count * TOKEN_BYTES
        choices.append(Choice(choice["index"], ids, log_probs, choice["finish_reason"], choice["weight_versions"]))
    return choices
