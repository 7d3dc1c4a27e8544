"""What `megatron-rl slurm` writes, on a real Slurm: it trains, stops before its limit, survives a lost node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.data.countdown import write_task
from megatron_rl.observability.metrics import read_metrics
from tests.slurm.cluster import REPOSITORY, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 8
SETTINGS = (
    "actor.device=cpu",
    "actor.tensor_parallel=1",
    "actor.data_parallel=2",
    "rollout.engines=1",
    "cluster.nodes=2",
    "cluster.slurm.time_limit=00:30:00",
    "cluster.slurm.signal_minutes=5",
    "warm_start.batch_size=64",
    "warm_start.phases.0.steps=400",
    "warm_start.phases.1.steps=50",
    "evaluation.suites=null",
    "evaluation.probes=null",
    "algorithm.proxy_refresh_steps=3",
    f"train.steps={STEPS}",
    "train.save_every=1",
)
"""The quickstart, shortened, a replica on each node."""
NOT_LEARNED = ("time", "perf/", "memory/", "logprob/contract")
ONE_NODE = ("cluster.nodes=1", "actor.data_parallel=1")


@dataclass
class Workplace:
    """A folder to submit from."""

    cluster: SlurmCluster
    folder: Path

    def write(self, name: str, *arguments: str) -> Path:
        script = self.folder / f"{name}.sbatch"
        config = str(REPOSITORY / "examples/quickstart/countdown.yaml")
        assert main(["slurm", config, f"run.name={name}", *SETTINGS, *arguments, "--output", str(script)]) == 0
        return script

    def submit(self, script: Path, *options: str) -> str:
        done = self.cluster.run("sbatch", "--parsable", *options, str(script), cwd=self.folder)
        return done.stdout.strip()

    def completed(self, job: str) -> None:
        """Wait for it; the test fails with what the job said otherwise."""
        state = self.cluster.finish(job, 400)
        assert state == "COMPLETED", self.said_by(job)

    def said_by(self, job: str) -> str:
        outputs = [*self.folder.glob(f"*{job}*.out"), *self.folder.glob(f"runs/slurm/*-{job}-*/*.log")]
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in outputs)

    def reaches(self, job: str, name: str, step: int) -> None:
        """Wait until its run has saved a step; the test fails with what the job said where it ends before that."""

        def reached() -> bool:
            if self.steps_done(name) >= step:
                return True
            assert self.cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), self.said_by(job)
            return False

        self.cluster.wait_for(f"step {step} of {name}", reached)

    def steps_done(self, name: str) -> int:
        """The newest that is saved."""
        saved = (self.folder / "runs" / name / "checkpoints").glob("step_*/manifest.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in saved), default=0)

    def learned(self, name: str) -> tuple[list[dict[str, float]], bytes]:
        """Every metric but those of the machine and of a start, and the exported weights."""
        run = self.folder / "runs" / name
        metrics = [
            {key: value for key, value in row.items() if not key.startswith(NOT_LEARNED)} for row in read_metrics(run)
        ]
        return metrics, (run / "hf/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def workplace(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    write_task(folder / "runs/countdown-task")
    return Workplace(cluster, folder)


@pytest.fixture(scope="module")
def straight(workplace: Workplace) -> str:
    """A run that nothing disturbs; its name."""
    workplace.completed(workplace.submit(workplace.write("straight")))
    return "straight"


def test_two_nodes_train(workplace: Workplace, straight: str) -> None:
    metrics, _ = workplace.learned(straight)
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert any(row.get("train/grad_norm", 0) > 0 for row in metrics)
    (output,) = workplace.folder.glob("straight-*.out")
    assert "on node[1-2], start 0" in output.read_text()
    logs = next(workplace.folder.glob("runs/slurm/straight-*-0"))
    assert (logs / "ray-token").stat().st_mode & 0o077 == 0
    for node in workplace.cluster.nodes[:2]:
        workplace.cluster.wait_for(f"{node} is empty", lambda node=node: not workplace.cluster.processes_of(node), 20)


@pytest.fixture(scope="module")
def limited(workplace: Workplace, straight: str) -> str:
    """A job that cannot end within its time limit, on a node of its own while the other tests go on; its number."""
    limit = ("cluster.slurm.time_limit=00:04:00", "cluster.slurm.signal_minutes=1")
    idle = ("reward.name=tests.slurm.slow_reward:grade", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2")
    long = ("train.steps=100000", "train.save_every=0")
    return workplace.submit(workplace.write("limited", *ONE_NODE, *limit, *idle, *long), "--nodelist=node3")


def test_the_signal_before_the_limit_checkpoints_and_the_requeued_job_goes_on_exactly(
    workplace: Workplace, straight: str, limited: str
) -> None:
    cluster = workplace.cluster
    job = workplace.submit(workplace.write("stopped"))
    workplace.reaches(job, "stopped", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit, to a minute
    cluster.wait_for("the requeue", lambda: cluster.job(job)["Restarts"] != "0")
    assert workplace.steps_done("stopped") < STEPS
    workplace.completed(job)
    (output,) = workplace.folder.glob("stopped-*.out")
    text = output.read_text()
    assert "asking the run to stop" in text and f"queueing job {job} again" in text and "start 1" in text
    assert workplace.learned("stopped") == workplace.learned(straight)


def test_a_node_that_goes_down_is_survived(workplace: Workplace, straight: str) -> None:
    cluster = workplace.cluster
    job = workplace.submit(workplace.write("bereft"))
    workplace.reaches(job, "bereft", 2)
    cluster.switch_off("node2")
    cluster.wait_for("the requeue", lambda: cluster.job(job)["Restarts"] != "0")
    assert workplace.steps_done("bereft") < STEPS
    cluster.switch_on("node2")
    workplace.completed(job)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert workplace.learned("bereft") == workplace.learned(straight)


def test_doctor_looks_at_all_nodes(workplace: Workplace, straight: str) -> None:
    job = workplace.submit(workplace.write("looked-at", "warm_start=null", "--doctor"))
    workplace.completed(job)
    said = " ".join(workplace.said_by(job).split())
    for words in ("2 nodes of cluster.nodes: 2", "the same on all nodes", "node2: clock ok", "data parallel ok 1 x 2"):
        assert words in said
    assert "engines ok 1 x transformers started" in said
    assert not (workplace.folder / "runs/looked-at").exists()


def test_the_tasks_of_an_array_keep_apart(workplace: Workplace, straight: str) -> None:
    job = workplace.submit(workplace.write("seeds", *ONE_NODE, "train.steps=1", "--seeds", "0-1"))
    for task in ("0", "1"):
        workplace.completed(f"{job}_{task}")
    runs = [f"seeds-{job}-seed{seed}" for seed in (0, 1)]
    assert {path.name for path in (workplace.folder / "runs").glob("seeds-*")} == set(runs)
    assert len(list(workplace.folder.glob("seeds-*.out"))) == 2
    assert len(list(workplace.folder.glob("runs/slurm/seeds-*"))) == 2
    assert workplace.learned(runs[0])[1] != workplace.learned(runs[1])[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cluster.slurm.time_limit=02:00:00"], "time limit"),
        (["cluster.nodes=4", "actor.data_parallel=4"], "node"),
        (["cluster.slurm.partition=absent"], "partition"),
        (["cluster.slurm.options=[--gpus-per-node=4]"], "generic resource"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_at_submit(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    settings: list[str], words: str,
) -> None:  # fmt: skip
    for name, value in workplace.cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(workplace.folder)
    config = str(REPOSITORY / "examples/quickstart/countdown.yaml")
    assert main(["slurm", config, "run.name=refused", *SETTINGS, *settings, "--submit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: refused.sbatch was refused: ") and words in error.lower()
    assert workplace.cluster.run("squeue", "-h", "--name=refused").stdout == ""


def test_slurm_itself_sends_the_signal(workplace: Workplace, limited: str) -> None:
    cluster = workplace.cluster
    cluster.wait_for("the requeue", lambda: cluster.job(limited)["Restarts"] != "0")
    cluster.run("scancel", limited)
    text = workplace.said_by(limited)
    assert "time is nearly up" in text and f"queueing job {limited} again" in text
    assert workplace.steps_done("limited") > 0
