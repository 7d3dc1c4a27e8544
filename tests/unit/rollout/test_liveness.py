"""A server is given up for its own silence only."""

from __future__ import annotations

import asyncio
import time

import pytest

from megatron_rl.rollout.engines.interface import EngineLost
from megatron_rl.rollout.servers.liveness import Liveness

HANG_SECONDS = 0.4


@pytest.mark.parametrize("answers_again", [True, False])
def test_the_time_in_which_this_process_was_blocked_is_no_silence_of_the_server(answers_again: bool) -> None:
    calls = 0

    async def watched() -> None:
        asked = asyncio.Event()

        async def alive() -> None:
            nonlocal calls
            calls += 1
            asked.set()
            if calls == 1 or not answers_again:
                await asyncio.sleep(60)

        liveness = Liveness()
        liveness.lose_when_silent(alive, HANG_SECONDS, lambda: HANG_SECONDS, lambda: "")
        await asked.wait()
        time.sleep(4 * HANG_SECONDS)  # the answer to the first call cannot be heard in time
        try:
            await liveness.while_there(asyncio.sleep(3 * HANG_SECONDS))
        finally:
            liveness.end()

    if answers_again:
        asyncio.run(watched())
        assert calls > 1
    else:
        with pytest.raises(EngineLost, match="no sign of life"):
            asyncio.run(watched())
