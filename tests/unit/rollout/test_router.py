"""How sglang-router is started, and when it is not. What it does is tested with the real one, in tests/engines."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.router import Router, command


def test_a_missing_router_is_said_with_what_to_do(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # sees no installed package
    bare.chmod(0o755)
    router = Router(ServerSettings(router="round_robin", python=bare))
    with pytest.raises(UserError, match=rf"rollout\.server\.router.*{bare} -m pip install sglang-router"):
        asyncio.run(router.start())


def test_it_listens_on_this_machine_only_and_leaves_health_to_us() -> None:
    line = command(ServerSettings(router="cache_aware", request_timeout_seconds=0.5), 20_000, 20_001)
    assert line[line.index("--policy") + 1] == "cache_aware"
    assert line[line.index("--request-timeout-secs") + 1] == "1"
    assert line[line.index("--host") + 1] == line[line.index("--prometheus-host") + 1] == "127.0.0.1"
    assert {"--disable-health-check", "--disable-circuit-breaker"} <= set(line)
