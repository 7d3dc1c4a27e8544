"""The first training steps of the quickstart agree between GPU and CPU on the same rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.data.countdown import write_task
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine, Finished, values

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

STEPS = 3
SHORT = (*SHORT_WARM_START, "evaluation={}", "actor.tensor_parallel=1", f"train.steps={STEPS}")
METRICS = ("train/loss", "train/grad_norm", "entropy/token_mean", "lpreg/delta", "logprob/rollout_actor_abs_diff")


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    folder = tmp_path_factory.mktemp("quickstart")
    write_task(folder / "runs/countdown-task")
    return CommandLine(folder)


def train(command_line: CommandLine, name: str, *settings: str) -> Finished:
    process = command_line.start("train", str(QUICKSTART), f"run.name={name}", *SHORT, *settings)
    finished = command_line.finish(process, name)
    assert finished.status == 0, finished.output[-5000:]
    return finished


@pytest.fixture(scope="module")
def rollouts(command_line: CommandLine) -> Path:
    """Rollouts sampled on the CPU in fp32."""
    settings = ("actor.device=cpu", "rollout.engines=1", "observability.rollouts_every=1")
    return train(command_line, "recorded", *settings).folder


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_first_steps_on_gpu_and_cpu_agree(
    command_line: CommandLine, rollouts: Path, dtype: str, tolerance: float
) -> None:
    replay = ("--rollouts", str(rollouts), f"actor.dtype={dtype}")
    cpu, gpu = (train(command_line, f"{name}-{dtype}", *replay, f"actor.device={name}") for name in ("cpu", "cuda"))
    assert "1 rank, cuda:0" in gpu.output
    for metric in METRICS:
        found, expected = values(gpu, metric), values(cpu, metric)
        print(dtype, metric, found, expected)
        assert len(expected) == STEPS
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance / 10), metric
