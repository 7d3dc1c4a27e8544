"""JSON requests over HTTP, with retries after failures that may pass."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from megatron_rl.utils.back_off import back_off_seconds

WORTH_RETRYING = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 30.0
"""Longest wait between two attempts, in seconds."""
EXCERPT = 200
"""Characters of a server's answer that an error message shows."""


class RequestFailed(Exception):
    """A request without a usable answer. The message describes what the server did instead."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


def ask(
    url: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float,
    retries: int = 0,
    backoff: float = 0.5,
) -> Any:
    """Posts `body` as JSON to `url`, or sends a GET if `body` is None, and returns the JSON of the answer.

    A time-out, a lost connection or a temporary status (`WORTH_RETRYING`) is followed by further attempts with growing
    waits. Raises RequestFailed after the last attempt, or at once if the server refuses the request or answers
    something other than JSON.
    """
    data = None if body is None else json.dumps(body, default=str).encode()
    request = Request(url, data=data, headers={"Content-Type": "application/json", **(headers or {})})
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(back_off_seconds(attempt, first=backoff, longest=LONGEST_WAIT))
        try:
            return json.loads(_read(request, timeout))
        except HTTPError as error:
            failure = RequestFailed(f"status {error.code}: {error.read(EXCERPT).decode(errors='replace')}")
            if error.code not in WORTH_RETRYING:
                break
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            failure = RequestFailed(f"{type(reason).__name__}: {reason}")
            if isinstance(reason, TimeoutError):
                failure = RequestFailed("the server took too long", timed_out=True)
        except ValueError as error:
            failure = RequestFailed(f"the answer is not JSON: {error}")
            break
    raise failure


def _read(request: Request, timeout: float) -> bytes:
    """Reads the complete answer within `timeout` seconds. The limit of urlopen applies to each read only."""
    deadline, parts = time.monotonic() + timeout, []
    with urlopen(request, timeout=timeout) as response:
        while part := response.read1(2**16):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError
    return b"".join(parts)
