"""The shortened quickstart: the reward rises, the run folder is complete, every layout takes the same steps, a run, its
checkpoint and its export score the same, and recorded rollouts train the same way again without an engine.

All these tests look at the same two runs, so they are in one file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.config import load_config
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, STEPS, CommandLine, Finished, read_json, values
from tests.tiers import slow

pytestmark = pytest.mark.e2e

ONE_OF_EACH = ("actor.tensor_parallel=1", "rollout.engines=1")
TWO_STEPS = ("train.steps=2", "evaluation.suites={}", "evaluation.probes={}")
LAYOUTS = {
    "tp1": ("actor.tensor_parallel=1",),
    "dp2": ("actor.tensor_parallel=1", "actor.data_parallel=2"),
}
STANDARD_METRICS = {
    *("train/loss", "train/grad_norm", "train/lr", "reward/mean", "reward/std"),
    *("entropy/token_mean", "entropy/sequence_mean", "response_length/mean", "response_length/truncated_fraction"),
    *("lpreg/delta", "lpreg/selected_fraction", "lpreg/kept_fraction", "lpreg/kl", "lpreg/advantage_shift"),
    *("logprob/rollout_actor_abs_diff", "perf/tokens_per_second", "perf/step_seconds"),
    *("perf/step_tflops", "perf/tflops_per_second_per_rank"),
    *(
        "memory/actor_gib",
        "memory/engine_gib",
        "perf/rollout_seconds",
        "perf/reward_seconds",
        "perf/train_seconds",
        "perf/weight_sync_seconds",
    ),
}


def test_the_reward_rises(learned: Finished) -> None:
    rewards = values(learned, "reward/mean")
    assert len(rewards) == STEPS
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.05
    accuracy = values(learned, "eval/held_out/avg@8")
    assert len(accuracy) == 3  # before, during, after
    assert accuracy[-1] > accuracy[0] + 0.03


def test_every_metric_is_written_at_every_step(learned: Finished) -> None:
    rows = [row for row in learned.metrics if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        missing = {name for name in STANDARD_METRICS if row.get(name) is None}
        assert not missing - {"lpreg/kl", "lpreg/advantage_shift"}, f"step {row['step']}"
    assert all(0 < len(values(learned, name)) <= STEPS for name in STANDARD_METRICS)


def test_no_step_counts_the_operations_of_the_warm_start_or_of_an_evaluation(learned: Finished) -> None:
    operations = values(learned, "perf/step_tflops")
    assert max(operations) < 6 * min(operations)


def test_the_engine_samples_from_the_policy_being_trained(learned: Finished) -> None:
    assert max(values(learned, "logprob/rollout_actor_max_diff")) < 1e-4


def test_lp_reg_selects_tokens(learned: Finished) -> None:
    assert all(0.049 < share < 0.06 for share in values(learned, "lpreg/below_delta_fraction"))
    assert np.mean(values(learned, "lpreg/selected_fraction")) > 0.001


def test_the_folder_says_how_the_run_went_and_what_it_was_made_from(learned: Finished) -> None:
    state = json.loads((learned.folder / "state.json").read_text())
    assert state["ended"] == f"finished after step {STEPS} of {STEPS}"
    log = (learned.folder / "logs" / "driver.log").read_text()
    phases = [line.split("phase=")[1] for line in log.splitlines() if "phase=" in line]
    assert phases[:2] == ["starting_Ray", "starting_the_actor"] and "starting_engines" in phases and "rollout" in phases
    (start,) = [json.loads(line) for line in (learned.folder / "provenance.jsonl").read_text().splitlines()]
    files = {path.rsplit("/", 1)[-1] for path in start["sha256"]}
    assert {"train.jsonl", "held_out.jsonl", "model.safetensors"} <= files and start["hosts"]
    assert json.loads((learned.folder / "hf" / "provenance.json").read_text()) == start


def last_recorded(run: Finished, kind: str) -> str:
    """Returns the name of the last dump. Every tenth step has one, unless recording had taken too large a share of the
    time, which happens on a busy machine."""
    names = sorted(path.name for path in (run.folder / kind).iterdir())
    assert names[0] == "step_000001.parquet" and {int(name[5:11]) for name in names} <= {1, 10, 20, 30, 40}
    return names[-1]


def test_candidates_are_recorded(learned: Finished) -> None:
    """Candidates come from the policy after the step, which hardly differs from the policy that sampled."""
    last = last_recorded(learned, "candidates")
    rows = pq.read_table(learned.folder / "candidates" / last).to_pylist()
    rollouts = pq.read_table(learned.folder / "rollouts" / last).to_pylist()
    assert len(rows) > 50
    for row in rows:
        p = np.exp(row["candidate_log_probs"])
        assert len(p) == 64 and (np.diff(p) <= 0).all() and p.sum() <= 1 + 1e-5
        sampled = rollouts[row["row"]]
        assert sampled["token_ids"][row["position"]] == row["token_id"]
        if row["token_id"] in row["candidate_ids"]:
            place = row["candidate_ids"].index(row["token_id"])
            assert abs(p[place] - np.exp(sampled["actor_log_probs"][row["position"]])) < 0.1


def test_the_profile_of_a_step_shows_its_parts(learned: Finished) -> None:
    (folder,) = (learned.folder / "profile").iterdir()
    assert folder.name == "step_000002"
    for rank in (0, 1):
        with gzip.open(folder / f"rank-{rank}.json.gz", "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert names >= {"forward", "loss", "optimizer", "c10d::allreduce_"}
        assert "aten::mm" in (folder / f"rank-{rank}.txt").read_text()


def test_the_run_folder_is_complete(learned: Finished) -> None:
    folder = learned.folder
    for name in ("config.yaml", "metrics.jsonl", "report.html", "hf/config.json", "hf/tokenizer.json"):
        assert (folder / name).is_file(), name
    assert any((folder / "tensorboard").iterdir())
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step_000020", "step_000040"]
    assert {path.name for path in (folder / "logs").iterdir()} >= {
        "actor-rank-0.log",
        "actor-rank-1.log",
        "engine-0.log",
    }
    assert load_config(folder / "config.yaml", []).run.name == "learned"
    rollouts = pq.read_table(folder / "rollouts" / last_recorded(learned, "rollouts")).to_pylist()
    assert len(rollouts) == 128
    assert all(len(row["token_ids"]) == len(row["log_probs"]) == len(row["entropy"]) for row in rollouts)


def test_the_terminal_output_ends_with_a_summary(learned: Finished) -> None:
    assert "largest logit difference" in learned.output
    assert "Before and after" in learned.output
    assert "report.html" in learned.output
    assert "\x1b" not in learned.output  # no terminal, no escape codes


def test_transformers_loads_the_export(learned: Finished) -> None:
    tokenizer = AutoTokenizer.from_pretrained(learned.folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(learned.folder / "hf", dtype=torch.float32)
    prompt = tokenizer("<bos> 2 3 4 > 24 :", add_special_tokens=False, return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=46, use_cache=True)[0])
    assert "=" in text.split(":")[1]


@slow
def test_the_checkpoint_converts_to_the_same_export(learned: Finished, command_line: CommandLine) -> None:
    process = command_line.start("convert", str(learned.folder), "converted")
    converted = command_line.finish(process, "learned")
    assert converted.status == 0, converted.output
    assert "all checksums match the source" in converted.output
    exported = load_file(learned.folder / "hf/model.safetensors")
    again = load_file(command_line.folder / "converted/model.safetensors")
    assert again.keys() == exported.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in exported.items()
    )


@slow
def test_a_run_its_checkpoint_and_its_export_score_the_same(
    command_line: CommandLine, suites: list[str], learned: Finished
) -> None:
    """Their score is also that of the run's own evaluation: the same code evaluates during training."""
    folder = Path("runs/learned")
    for model, out in ((folder, "run"), (folder / "checkpoints/step_000040", "checkpoint"), (folder / "hf", "hf")):
        command_line.evaluate(str(model), *suites, "--out", out)
    found = [read_json(command_line.folder / out / "summary.json") for out in ("run", "checkpoint", "hf")]
    assert found[0] == found[1] == found[2]
    during = values(learned, "eval/held_out/avg@8")[-1]
    assert 0 < during < 1
    suite = found[0]["suites"]["held_out"]
    assert suite["avg@4"]["low"] - 0.1 < during < suite["avg@4"]["high"] + 0.1
    assert (command_line.folder / "runs/learned/evaluations/step_000040/held_out.parquet").is_file()


@pytest.fixture(scope="module")
def two_steps(quickstart: Callable[..., Finished]) -> Callable[[str], Finished]:
    """Two recorded steps under a layout, which are run once."""

    @cache
    def run(name: str) -> Finished:
        return quickstart(name, *LAYOUTS[name], *TWO_STEPS, "observability.rollouts_every=1")

    return run


@slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_first_step(
    learned: Finished, two_steps: Callable[[str], Finished], name: str
) -> None:
    """The same weights and seed give the same samples, and so the same loss and gradient under every layout.

    `test_resume.py` moves a run to pipeline stages."""
    other = two_steps(name)
    first, reference = other.metrics[1], learned.metrics[1]
    assert first["reward/mean"] == reference["reward/mean"]
    assert first["lpreg/delta"] == reference["lpreg/delta"]
    assert first["lpreg/below_delta_fraction"] == reference["lpreg/below_delta_fraction"]
    for metric in ("train/loss", "train/grad_norm", "entropy/token_mean", "lpreg/kl"):
        assert first[metric] == pytest.approx(reference[metric], rel=1e-5, abs=1e-6), metric
    assert other.metrics[2]["reward/mean"] == reference_second(learned)


def reference_second(learned: Finished) -> float:
    return learned.metrics[2]["reward/mean"]


@slow
def test_grpo_runs_on_the_lp_reg_configuration(quickstart: Callable[..., Finished]) -> None:
    grpo = quickstart("grpo", "algorithm.name=grpo", "train.steps=2", "evaluation.every=0", *ONE_OF_EACH)
    assert not values(grpo, "lpreg/delta")
    assert len(values(grpo, "train/loss")) == 2
    assert "from the cache" in grpo.output


@slow
def test_a_run_does_not_overwrite_another_run(learned: Finished, command_line: CommandLine) -> None:
    before = (learned.folder / "metrics.jsonl").read_bytes()
    refused = command_line.train("learned")
    assert refused.status == 2
    assert "already holds a run" in refused.output
    assert (learned.folder / "metrics.jsonl").read_bytes() == before


@slow
def test_a_replay_repeats_the_updates(two_steps: Callable[[str], Finished], command_line: CommandLine) -> None:
    recorded = two_steps("tp1")
    again = command_line.train(
        "again", "--rollouts", str(recorded.folder), *SHORT_WARM_START, *LAYOUTS["tp1"], *TWO_STEPS
    )
    assert again.status == 0, again.output[-3000:]
    for metric in ("train/loss", "train/grad_norm", "reward/mean", "entropy/token_mean", "lpreg/delta"):
        assert values(again, metric) == values(recorded, metric) and len(values(again, metric)) == 2, metric
    assert not (again.folder / "checkpoints").exists() and not (again.folder / "hf").exists()
    assert not list((again.folder / "logs").glob("engine*"))


@slow
def test_rollout_only_samples_without_training(
    two_steps: Callable[[str], Finished], quickstart: Callable[..., Finished]
) -> None:
    alone = quickstart("alone", "--rollout-only", *LAYOUTS["tp1"], *TWO_STEPS)
    assert len(list((alone.folder / "rollouts").iterdir())) == 2
    assert values(alone, "reward/mean")[0] == values(two_steps("tp1"), "reward/mean")[0]
    assert values(alone, "train/loss") == []
    assert not (alone.folder / "checkpoints").exists()


@slow
def test_a_folder_without_dumps_is_refused(command_line: CommandLine) -> None:
    empty = command_line.folder / "empty"
    empty.mkdir()
    process = command_line.start("train", str(QUICKSTART), "--rollouts", str(empty))
    finished = command_line.finish(process, "nothing")
    assert finished.status == 2 and "holds no rollout dumps" in finished.output
