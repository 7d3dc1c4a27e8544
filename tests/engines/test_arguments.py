"""Every command line that a run starts a server with, on GPUs as on a CPU, is one that the released server takes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.rollout.engines.vllm.server import MIDDLEWARE
from megatron_rl.rollout.servers import router
from megatron_rl.utils.import_path import import_object
from tests.engines.conftest import KINDS, printed

FURTHER = {
    "sglang": [[], ["--quantization", "fp8"], ["--mem-fraction-static", "0.85"], ["--expert-parallel-size", "2"]],
    "vllm": [[], ["--quantization", "fp8"], ["--gpu-memory-utilization", "0.85"], ["--enable-expert-parallel"]],
}
"""Arguments that users pass through `rollout.server.arguments`."""
FIELDS = {
    "sglang": {
        "api_key": "the key",
        "admin_api_key": "the key",
        "weight_version": "-1",
        "custom_weight_loader": ["megatron_rl.rollout.engines.sglang.receiver.load"],
        "skip_tokenizer_init": True,
    },
    "vllm": {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "worker_extension_cls": "megatron_rl.rollout.engines.vllm.receiver.Extension",
        "skip_tokenizer_init": True,
        "enable_scale_out": True,
        "middleware": list(MIDDLEWARE),
    },
}
"""Settings that every server has."""
COLOCATED = {"sglang": "enable_memory_saver", "vllm": "enable_sleep_mode"}
TENSOR_PARALLEL = {"sglang": "tp_size", "vllm": "tensor_parallel_size"}


def launches(kind: ServerKind, model: Path) -> list[EngineLaunch]:
    """Every combination of what decides about a command line."""
    combinations = product(("cuda", "cpu"), (False, True), (1, 2, 8), ("bfloat16", "float32"), FURTHER[kind.name])
    return [
        EngineLaunch(
            kind,
            model,
            device,
            dtype,
            max_tokens=4096,
            server=ServerSettings(tensor_parallel=ranks, arguments=further),
            colocated=colocated,
            host="10.0.0.7",
        )
        for device, colocated, ranks, dtype, further in combinations
    ]


def parsed(name: str, cases: list[tuple[list[str], dict[str, str]]], folder: Path) -> list[dict[str, Any]]:
    """What the parser of a released server makes of the commands after `python -m module`."""
    lines = folder / "commands.json"
    lines.write_text(json.dumps([{"arguments": command[3:], "environment": env} for command, env in cases]))
    answers: list[dict[str, Any]] = printed("parsed:", "tests.engines.their_parsers", name, str(lines))
    assert len(answers) == len(cases)
    return answers


@pytest.mark.parametrize("name", KINDS)
def test_a_released_server_takes_every_command_line(name: str, model: Path, tmp_path: Path) -> None:
    """The last line has an unknown argument, which must be noticed: argparse takes the beginning of an option's name
    for the option, so that a removed option could pass for another one."""
    kind = engine_kind(name)
    assert isinstance(kind, ServerKind)
    command: Any = import_object(kind.command, "rollout.engine")
    every = launches(kind, model)
    cases = [command(launch, 1234, "the key", tmp_path) for launch in every]
    wrong: tuple[list[str], dict[str, str]] = (["python", "-m", "server", "--tensor-parallel", "1"], {})
    *answers, last = parsed(name, [*cases, wrong], tmp_path)
    assert last == {"refused": "unknown options: ['--tensor-parallel']"}
    for launch, (line, _), settings in zip(every, cases, answers, strict=True):
        expected = FIELDS[name] | {"host": "10.0.0.7", "port": 1234, "dtype": launch.dtype}
        expected |= {TENSOR_PARALLEL[name]: launch.server.tensor_parallel, COLOCATED[name]: launch.colocated}
        if "--quantization" in line:
            expected["quantization"] = "fp8"
        assert {key: settings[key] for key in expected} == expected


@pytest.mark.sglang
def test_the_router_takes_every_command_line(tmp_path: Path) -> None:
    policies: list[Any] = ["round_robin", "power_of_two", "cache_aware", "random"]
    lines = [router.command(ServerSettings(router=policy), 1234, 1235) for policy in policies]
    for policy, settings in zip(policies, parsed("router", [(line, {}) for line in lines], tmp_path), strict=True):
        assert (settings["policy"], settings["port"], settings["prometheus_port"]) == (policy, 1234, 1235)
