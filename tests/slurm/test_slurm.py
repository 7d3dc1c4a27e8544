"""Scripts of `megatron-rl slurm` on a real Slurm: runs train, stop before the time limit and survive a lost node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rl.checkpoint.manifest import checkpoints, step_of
from megatron_rl.cli import main
from megatron_rl.data.countdown import write_task
from megatron_rl.observability.metrics import read_metrics
from tests.slurm.cluster import REPOSITORY, SlurmCluster

pytestmark = pytest.mark.slurm

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
"""A short quickstart with one replica per node."""
NOT_REPRODUCED = ("time", "perf/", "memory/", "logprob/contract")
ONE_NODE = ("cluster.nodes=1", "actor.data_parallel=1")


@dataclass
class Workplace:
    """A cluster and the folder that jobs are submitted from."""

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
        """Wait until the job is completed. If it fails, the test fails with the job's output."""
        state = self.cluster.finish(job)
        assert state == "COMPLETED", self.output_of(job)

    def output_of(self, job: str) -> str:
        outputs = [*self.folder.glob(f"*{job}*.out"), *self.folder.glob(f"runs/slurm/*-{job}-*/*.log")]
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in outputs)

    def reaches(self, job: str, name: str, step: int) -> None:
        """Wait until the job's run has saved a step. If the job ends before, the test fails with its output."""

        def reached() -> bool:
            if self.steps_done(name) >= step:
                return True
            assert self.cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), self.output_of(job)
            return False

        self.cluster.wait_for(f"step {step} of {name}", reached)

    def steps_done(self, name: str) -> int:
        """Returns the newest saved step."""
        saved = checkpoints(self.folder / "runs" / name / "checkpoints")
        return step_of(saved[-1]) if saved else 0

    def learned(self, name: str) -> tuple[list[dict[str, float]], bytes]:
        """Returns all metrics except those that depend on the machine or on a restart, and the exported weights."""
        run = self.folder / "runs" / name
        metrics = [
            {key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCED)}
            for row in read_metrics(run)
        ]
        return metrics, (run / "hf/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def workplace(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    write_task(folder / "runs/countdown-task")
    return Workplace(cluster, folder)


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """Name of a run that nothing disturbs."""
    workplace.completed(workplace.submit(workplace.write("undisturbed")))
    return "undisturbed"


def test_two_nodes_train(workplace: Workplace, undisturbed: str) -> None:
    metrics, _ = workplace.learned(undisturbed)
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert any(row.get("train/grad_norm", 0) > 0 for row in metrics)
    (output,) = workplace.folder.glob("undisturbed-*.out")
    assert "on node[1-2], start 0" in output.read_text()
    logs = next(workplace.folder.glob("runs/slurm/undisturbed-*-0"))
    assert (logs / "ray-token").stat().st_mode & 0o077 == 0
    for node in workplace.cluster.nodes[:2]:
        workplace.cluster.wait_for(f"{node} is empty", lambda node=node: not workplace.cluster.processes_of(node))


@pytest.fixture(scope="module")
def limited(workplace: Workplace, undisturbed: str) -> str:
    """Number of a job that exceeds its time limit, on a node of its own while the other tests go on."""
    limit = ("cluster.slurm.time_limit=00:04:00", "cluster.slurm.signal_minutes=1")
    slow = ("reward.name=tests.slurm.slow_reward:grade", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2")
    long = ("train.steps=100000", "train.save_every=0")
    return workplace.submit(workplace.write("limited", *ONE_NODE, *limit, *slow, *long), "--nodelist=node3")


def test_a_job_stopped_by_the_signal_is_requeued_and_resumes_exactly(
    workplace: Workplace, undisturbed: str, limited: str
) -> None:
    cluster = workplace.cluster
    job = workplace.submit(workplace.write("stopped"))
    workplace.reaches(job, "stopped", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit, to within a minute
    cluster.wait_for("the requeue", lambda: cluster.job(job)["Restarts"] != "0")
    assert workplace.steps_done("stopped") < STEPS
    workplace.completed(job)
    (output,) = workplace.folder.glob("stopped-*.out")
    text = output.read_text()
    assert "asking the run to stop" in text and f"queueing job {job} again" in text and "start 1" in text
    assert workplace.learned("stopped") == workplace.learned(undisturbed)


def test_a_run_survives_a_node_that_goes_down(workplace: Workplace, undisturbed: str) -> None:
    cluster = workplace.cluster
    job = workplace.submit(workplace.write("lost-node"))
    workplace.reaches(job, "lost-node", 2)
    cluster.switch_off("node2")
    cluster.wait_for("the requeue", lambda: cluster.job(job)["Restarts"] != "0")
    assert workplace.steps_done("lost-node") < STEPS
    cluster.switch_on("node2")
    workplace.completed(job)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert workplace.learned("lost-node") == workplace.learned(undisturbed)


def test_doctor_checks_all_nodes(workplace: Workplace, undisturbed: str) -> None:
    job = workplace.submit(workplace.write("checked", "warm_start=null", "--doctor"))
    workplace.completed(job)
    output = " ".join(workplace.output_of(job).split())
    for words in ("2 nodes of cluster.nodes: 2", "the same on all nodes", "node2: clock ok", "data parallel ok 1 x 2"):
        assert words in output
    assert "engines ok 1 x transformers started" in output
    assert not (workplace.folder / "runs/checked").exists()


def test_the_tasks_of_an_array_have_their_own_folders(workplace: Workplace, undisturbed: str) -> None:
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
def test_impossible_jobs_are_refused_at_submission(
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


def test_slurm_sends_the_signal_before_the_time_limit(workplace: Workplace, limited: str) -> None:
    cluster = workplace.cluster
    cluster.wait_for("the requeue", lambda: cluster.job(limited)["Restarts"] != "0")
    cluster.run("scancel", limited)
    text = workplace.output_of(limited)
    assert "time is nearly up" in text and f"queueing job {limited} again" in text
    assert workplace.steps_done("limited") > 0
