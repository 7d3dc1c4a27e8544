"""Text of the batch script: clean bash and the right options. `tests/slurm` runs it on a real Slurm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.cluster.slurm import limit_minutes, submit, write_script
from megatron_rl.errors import UserError

CONFIG = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 16, samples_per_prompt: 8, max_response_tokens: 8, engines: 8}
reward: {name: math}
train: {steps: 10}
actor: {tensor_parallel: 4, data_parallel: 2}
cluster: {nodes: 2}
"""
NEEDS_QUOTING = "evaluation.suites={a: 'it''s $HOME.jsonl'}"
VARIANTS = {
    "bare": [],
    "cpu": ["actor.device=cpu"],
    "one-node": ["cluster.nodes=1", "actor.data_parallel=1", "rollout.engines=4"],
    "pyxis": ["cluster.slurm={container: pyxis, image: nvcr.io#nvidia/pytorch:x, mounts: [/data, '/a:/b:ro']}"],
    "apptainer": ["cluster.slurm={container: apptainer, image: /images/x.sif, mounts: [/data]}"],
    "site": [
        "cluster.slurm={partition: gpu, account: me, options: [--constraint=h100]}",
        "cluster.slurm.setup=['module load x', source .venv/bin/activate]",
    ],
    "gres": ["cluster.slurm={gpu_request: gres}"],
    "home": ["cluster.slurm={container: pyxis, image: x.sqsh, mount_home: true}"],
    "quoting": [NEEDS_QUOTING],
}

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)

    def write_it(*overrides: str, seeds: str | None = None) -> str:
        script = write_script(Path("mine.yaml"), ["run.name=mine", *overrides], output=None, seeds=seeds)
        assert script == Path("mine.sbatch") and script.stat().st_mode & 0o100
        return script.read_text()

    return write_it


@pytest.mark.parametrize("seeds", [None, "0-3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shellcheck_finds_nothing(write: Write, variant: str, seeds: str | None) -> None:
    text = write(*VARIANTS[variant], seeds=seeds)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_options_follow_the_configuration(write: Write) -> None:
    given = options(write("cluster.slurm={time_limit: 1-12:00:00, signal_minutes: 30, options: [--constraint=h100]}"))
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=1-12:00:00"} <= {*given}
    assert {"--signal=B:USR1@1800", "--requeue", "--constraint=h100", "--dependency=singleton"} <= {*given}
    assert "--output=%x-%j.out" in given


@pytest.mark.parametrize(
    ("request_", "given"), [("gpus-per-node", "--gpus-per-node=8"), ("gres", "--gres=gpu:8"), ("none", None)]
)
def test_gpus_are_asked_for_as_the_site_wants_it(write: Write, request_: str, given: str | None) -> None:
    text = write(f"cluster.slurm.gpu_request={request_}")
    assert [option for option in options(text) if "gpu" in option] == ([given] if given else [])
    assert "--num-gpus=8" in text, "Ray has the GPUs however they were asked for"


@pytest.mark.parametrize(
    ("container", "without", "with_it"),
    [("pyxis", "--no-container-mount-home", "--container-mount-home"), ("apptainer", "--no-home", None)],
)
def test_containers_see_the_home_folder_only_if_asked(
    write: Write, container: str, without: str, with_it: str | None
) -> None:
    settings = f"container: {container}, image: /x.sqsh"
    words = write(f"cluster.slurm={{{settings}}}").split()
    assert without in words and with_it not in words and "PYTHONNOUSERSITE=1" in words
    words = write(f"cluster.slurm={{{settings}, mount_home: true}}").split()
    assert without not in words and (with_it is None or with_it in words)
    assert "PYTHONNOUSERSITE=1" not in write().split()


def test_each_task_of_an_array_has_its_own_folder_and_log(write: Write) -> None:
    text = write(seeds="0-3")
    assert {"--array=0-3", "--output=%x-%A_%a.out"} <= {*options(text)}
    assert "--dependency=singleton" not in text  # otherwise the tasks would wait for one another
    assert 'run=runs/mine-"$SLURM_ARRAY_JOB_ID"-seed"$SLURM_ARRAY_TASK_ID"' in text


def test_a_cpu_run_asks_for_no_gpus(write: Write) -> None:
    text = write("actor.device=cpu")
    assert "gpus-per-node" not in text and "--num-gpus=0" in text


def test_the_script_kills_no_process_by_name(write: Write) -> None:
    text = write()
    assert not any(broad in text for broad in ("pkill", "killall", "ray stop", "fuser"))


def test_overrides_are_passed_unchanged(write: Write) -> None:
    text = write(NEEDS_QUOTING)
    (line,) = (line for line in text.splitlines() if "megatron-rl train" in line)
    command = line[line.index("megatron-rl train") :].removesuffix(' "${settings[@]}" &')
    words = subprocess.run(["bash", "-c", f'printf "%s\\n" {command}'], capture_output=True, text=True).stdout
    assert words.splitlines() == ["megatron-rl", "train", "mine.yaml", "run.name=mine", NEEDS_QUOTING]


def test_a_doctor_job_trains_nothing(write: Write) -> None:
    script = write_script(Path("mine.yaml"), ["run.name=mine"], output=None, seeds=None, doctor=True)
    text = script.read_text()
    assert script == Path("mine-doctor.sbatch") and "#SBATCH --job-name=mine-doctor\n" in text
    assert "megatron-rl doctor mine.yaml run.name=mine" in text and "megatron-rl train" not in text
    with pytest.raises(UserError, match="--seeds and --doctor cannot be combined"):
        write_script(Path("mine.yaml"), ["run.name=mine"], output=None, seeds="0-1", doctor=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.name=a b"], "run.name: 'a b' becomes the job's name"),
        (["cluster.nodes=3"], "cluster.nodes: 3 nodes are given, but actor ranks and engines use only 2"),
        (["cluster.nodes=1"], "need more GPUs than cluster.nodes: 1"),
        (["cluster.slurm.container=pyxis"], "cluster.slurm.container and cluster.slurm.image go together"),
        (["cluster.slurm.image=x.sif"], "go together"),
        (["cluster.slurm.time_limit=01:00:00"], "signal_minutes: 60 leaves nothing of the 60 minutes"),
        (["cluster.slurm.time_limit=1h"], "cluster.slurm.time_limit: '1h' (text) given; expected [days-]hours"),
        (
            ["cluster.slurm.options=[constraint]"],
            "cluster.slurm.options.0: 'constraint' (text) given; expected an option of sbatch",
        ),
    ],
)
def test_impossible_jobs_are_errors(write: Write, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        write(*overrides)
    assert words in str(caught.value)
    assert not Path("mine.sbatch").exists()


@pytest.mark.parametrize("seeds", ["x", "1-", "0 1"])
def test_invalid_seeds_are_errors(write: Write, seeds: str) -> None:
    with pytest.raises(UserError, match="indices of a job array"):
        write(seeds=seeds)


def test_submitting_without_sbatch_is_an_error(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch here"):
        submit(Path("mine.sbatch"))


@pytest.mark.parametrize(("limit", "minutes"), [("24:00:00", 1440), ("2-01:30:30", 2970.5), ("0:10:00", 10)])
def test_time_limits_are_parsed(limit: str, minutes: float) -> None:
    assert limit_minutes(limit) == minutes
