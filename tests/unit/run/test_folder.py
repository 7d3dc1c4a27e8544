from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.run import folder as run_folder
from megatron_rl.run.folder import Resumption
from tests.unit.checkpoint.conftest import FILES, Saving

TEXT = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("example.yaml").write_text(TEXT)


def config(*overrides: str, folder: str = "runs/mine") -> Config:
    return load_config(Path("example.yaml"), [f"run.folder={folder}", *overrides])


def run_with(folder: str, *steps: int) -> Path:
    """A run's folder with checkpoints of these steps."""
    run_folder.create(config(folder=folder))
    for step in steps:
        Saving(Path(folder, "checkpoints")).save(step)
    return Path(folder)


def checkpoint_to_resume(settings: Config) -> Path | None:
    found = run_folder.checkpoint_to_resume(settings)
    return found and found.checkpoint


def damage(checkpoint: Path) -> Path:
    """Truncates a file of the checkpoint."""
    path = checkpoint / next(iter(FILES))
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_new_run_starts_from_step_0(resume: str) -> None:
    assert checkpoint_to_resume(config(f"resume={resume}")) is None
    Path("runs/mine").mkdir(parents=True)  # an empty folder is treated like a missing one
    assert checkpoint_to_resume(config(f"resume={resume}")) is None


@pytest.mark.parametrize("steps", [(), (5,)])
def test_never_refuses_a_folder_with_a_run(steps: tuple[int, ...]) -> None:
    run_with("runs/mine", *steps)
    with pytest.raises(UserError, match=r"runs/mine already holds a run.*resume=auto.*run\.name"):
        checkpoint_to_resume(config())


def test_auto_takes_the_newest_checkpoint() -> None:
    run_with("runs/mine", 5, 1000000, 50)
    assert checkpoint_to_resume(config("resume=auto")) == Path("runs/mine/checkpoints/step_000050")
    run_with("runs/mine", 1000000)
    assert checkpoint_to_resume(config("resume=auto")) == Path("runs/mine/checkpoints/step_1000000")


def test_auto_skips_damaged_checkpoints_and_reports_them() -> None:
    folder = run_with("runs/mine", 5, 10, 15, 20) / "checkpoints"
    damaged = [damage(folder / f"step_{step:06d}") for step in (20, 15)]
    found = run_folder.checkpoint_to_resume(config("resume=auto"))
    assert isinstance(found, Resumption)
    assert (found.checkpoint, found.manifest.state.step) == (folder / "step_000010", 10)
    assert [str(path) in problem for path, problem in zip(damaged, found.damaged, strict=True)] == [True, True]


def test_auto_does_not_start_over_if_every_checkpoint_is_damaged() -> None:
    folder = run_with("runs/mine", 5, 10) / "checkpoints"
    damaged = [damage(folder / f"step_{step:06d}") for step in (5, 10)]
    with pytest.raises(UserError, match="none of the run's checkpoints can be used") as caught:
        checkpoint_to_resume(config("resume=auto"))
    assert all(str(path) in str(caught.value) for path in damaged)


def test_a_damaged_checkpoint_that_is_named_is_refused() -> None:
    checkpoint = run_with("runs/mine", 5, 10) / "checkpoints/step_000010"
    path = damage(checkpoint)
    with pytest.raises(UserError, match=rf"{path} is damaged"):
        checkpoint_to_resume(config(f"resume={checkpoint}"))


def test_the_latest_checkpoint_can_be_named() -> None:
    folder = run_with("runs/mine", 5, 10)
    found = run_folder.checkpoint_to_resume(config(f"resume={folder / 'checkpoints/latest'}"))
    assert found is not None and found.manifest.state.step == 10


def test_auto_starts_over_a_run_that_has_no_checkpoint_yet() -> None:
    run_with("runs/mine")
    assert checkpoint_to_resume(config("resume=auto")) is None


@pytest.mark.parametrize("resume", ["never", "auto", "runs/other"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_holds_something_else_is_refused(resume: str, kind: str) -> None:
    run_with("runs/other", 5)
    if kind == "file":
        Path("runs/mine").write_text("precious")
    else:
        Path("runs/mine/papers").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs/mine is not empty and holds no run.*run\.folder=FOLDER"):
        checkpoint_to_resume(config(f"resume={resume}"))


def test_a_path_is_a_checkpoint_or_the_folder_of_a_run() -> None:
    run_with("runs/other", 5, 10)
    older = Path("runs/other/checkpoints/step_000005")
    assert checkpoint_to_resume(config(f"resume={older}")) == older
    assert checkpoint_to_resume(config("resume=runs/other")) == older.with_name("step_000010")


def test_a_run_may_resume_from_an_older_checkpoint_of_its_own() -> None:
    folder = run_with("runs/mine", 5, 10).resolve()
    older = folder / "checkpoints" / "step_000005"
    assert checkpoint_to_resume(config(f"resume={older}")) == older


def test_a_checkpoint_of_one_run_is_not_resumed_in_the_folder_of_another() -> None:
    run_with("runs/other", 5)
    run_with("runs/mine", 3)
    for resume in ("runs/other", "runs/other/checkpoints/step_000005"):
        with pytest.raises(UserError, match=rf"runs/mine already holds another run than {resume}"):
            checkpoint_to_resume(config(f"resume={resume}"))


@pytest.mark.parametrize("steps", [None, ()])
def test_a_path_without_a_checkpoint_is_refused(steps: tuple[int, ...] | None) -> None:
    if steps is not None:
        run_with("runs/other", *steps)
    with pytest.raises(UserError, match="resume: runs/other is neither a checkpoint nor the folder of a run"):
        checkpoint_to_resume(config("resume=runs/other"))


def test_the_configuration_that_is_written_loads_back() -> None:
    settings = config("resume=runs/other", "seed=7", "evaluation.suites.held_out=held_out.jsonl", "run.name=mine")
    run_folder.create(settings)
    assert load_config(Path("runs/mine/config.yaml"), []) == settings


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match=r"cannot write to the run folder runs/mine: Read-only file system"):
        run_folder.create(config())


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_ended() -> None:
    folder = Path("runs/mine")
    refused = pytest.raises(UserError, match=r"runs/mine: another run is in this folder \(process \d+ on .*run\.name")
    with run_folder.held(folder):
        with refused, run_folder.held(folder):
            pytest.fail("two runs are in one folder")
        run_folder.create(config())
    with run_folder.held(folder):
        pass


def test_a_run_that_has_begun_meanwhile_is_noticed() -> None:
    run_folder.check_still_free(Path("runs/mine"))
    run_with("runs/mine")
    with pytest.raises(UserError, match=r"another run has begun in this folder meanwhile.*run\.name"):
        run_folder.check_still_free(Path("runs/mine"))


def test_a_lock_of_a_killed_run_and_its_partial_files_stop_nobody() -> None:
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("process 1 on elsewhere")
    (folder / ".config.yaml.17.partial").write_text("model: {pa")
    assert run_folder.checkpoint_to_resume(config()) is None
    with run_folder.held(folder):
        run_folder.create(config())
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("content", [b"", b"model: {path: [", b"\xff\xfe", b"\0" * 100, b"- no\n- tree\n"])
def test_a_damaged_configuration_of_the_run_is_written_anew(content: bytes) -> None:
    folder = run_with("runs/mine", 5)
    (folder / "config.yaml").write_bytes(content)
    found = run_folder.checkpoint_to_resume(config("resume=auto"))
    assert found is not None and found.manifest.state.step == 5
    changes = run_folder.create(config("resume=auto"))
    assert all("config.yaml was damaged, and is written anew" in change for change in changes)
    assert load_config(folder / "config.yaml", []) == config("resume=auto")
