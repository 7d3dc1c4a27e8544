"""`megatron-rl train --dry-run`: the checks of a run that need no GPU and start nothing, and what is left unchecked."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron_rl.config import Config
from megatron_rl.config.passes import passes_of
from megatron_rl.config.reward import REMOTE
from megatron_rl.data.prompts import first_prompt
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import has_weights
from megatron_rl.models.published import published_config
from megatron_rl.run.inputs import InputChecks
from megatron_rl.run.models import model_folders
from megatron_rl.run.requirements import check_engine, check_trackers
from megatron_rl.run.traces import trace_files

MOST_SHOWN = 20_000
"""Characters of the first prompt that are printed."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a dry run has done."""

    checked: list[str]
    not_checked: list[str]
    """Each with the reason."""

    def __str__(self) -> str:
        lines = [f"# checked: {', '.join(self.checked)}"]
        return "\n".join([*lines, *(f"# not checked: {what}" for what in self.not_checked)])


class _NotChecked(Exception):
    """A check cannot be done here. The message is the reason."""


class DryRun:
    """The checks of one configuration that can be done on this machine."""

    def __init__(self, config: Config, missing: UserError | None = None) -> None:
        """`missing`: the models and data sets that are ids of the Hub and have no local copy, a line each."""
        self.config = config
        self.missing = missing
        self.inputs = InputChecks(config, complete=False)
        self.requirements = {
            "reward": self._software,
            "agent": self._software,
            "the model's layout": self._model_or_published,
            "weights": self._model_with_weights,
            "traces of the warm start": self._trace_files,
            "prompts and labels": self._data_files,
            "a trial call of the reward": self._prompt,
            "your own functions": self._torch,
            "engine": self._software_with_torch,
            "packages of wandb and mlflow": self._trackers,
        }
        """Functions that raise _NotChecked if the check of this name cannot be done here."""

    def check(self) -> Report:
        """Raises UserError with the problems of all checks. Nothing is written, and nothing is left running."""
        report = Report(["keys and values"], [])
        problems: list[str] = []
        for what, check in self._checks():
            try:
                self.requirements.get(what, lambda: None)()
                check()
                report.checked.append(what)
            except _NotChecked as reason:
                report.not_checked.append(f"{what}: {reason}")
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(dict.fromkeys(problems)))
        report.not_checked.extend(self._never())
        return report

    def _checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for what, check in self.inputs.in_order():
            yield what, partial(self._files, check) if what == "files" else check
        yield "your own functions", lambda: None  # the check of files imports them, if torch is there
        yield "engine", lambda: check_engine(self.config)
        yield "packages of wandb and mlflow", lambda: check_trackers(self.config)

    def _never(self) -> Iterator[str]:
        yield "memory: `megatron-rl plan` estimates it"
        if self.config.actor.device != "cpu":
            yield "GPUs, drivers and networks: `megatron-rl doctor` checks them on the run's nodes"
        if self.config.rollout.server.urls or self.config.reward.name == REMOTE:
            yield "servers that run already: a dry run makes no connection"

    def _files(self, check: Callable[[], None]) -> None:
        """Says of a file only once that it is missing."""
        lines = str(self.missing).splitlines() if self.missing else []
        keys = {line.partition(":")[0] for line in lines}
        try:
            check()
        except UserError as error:
            lines += [line for line in str(error).splitlines() if line.partition(":")[0] not in keys]
        if lines:
            raise UserError("\n".join(lines))

    def _torch(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise _NotChecked("torch is not installed here, with which they are imported")

    def _model(self) -> None:
        prepare, folder = self.config.prepare, self.config.model.path
        if prepare is not None and not folder.exists():
            raise _NotChecked(f"the run itself writes {folder} (prepare.task: {prepare.task})")
        if not (folder / "config.json").is_file():
            raise _NotChecked(f"{folder} has no config.json")

    def _model_or_published(self) -> None:
        if published_config(self.config.model.path) is None:
            self._model()

    def _model_with_weights(self) -> None:
        self._model()
        if absent := [folder for folder in model_folders(self.config) if not has_weights(folder)]:
            raise _NotChecked(f"{absent[0]} has none yet")

    def _trace_files(self) -> None:
        if absent := [path for path in trace_files(self.config) if not path.is_file()]:
            raise _NotChecked(f"{absent[0]} is not there")

    def _data_files(self) -> None:
        self._model()
        files = [self.config.data.train, *(suite.data for suite in self.config.evaluation.suites.values())]
        if absent := [str(path) for path in files if not path.is_file()]:
            raise _NotChecked(f"{absent[0]} is not there")
        if importlib.util.find_spec("transformers") is None:
            raise _NotChecked("tokenizers need transformers, which is not installed here")

    def _prompt(self) -> None:
        self._software()
        if self.inputs.prompts is None:
            raise _NotChecked("it needs a prompt, and these were not checked")

    def _software_with_torch(self) -> None:
        self._software()
        self._torch()

    def _trackers(self) -> None:
        settings = self.config.observability
        if settings.wandb or settings.mlflow or settings.trackio:
            self._software()

    def _software(self) -> None:
        """Raises _NotChecked if the software of this machine is not that of the run."""
        container = self.config.cluster.slurm.container
        if container != "none":
            raise _NotChecked(f"the run's software is in a container (cluster.slurm.container: {container})")
        if self.config.actor.device == "cuda" and shutil.which("nvidia-smi") is None:
            raise _NotChecked("this machine has no GPU (actor.device: cuda), so the run's software may be elsewhere")


def dry_run(config: Config, name: str, missing: UserError | None = None) -> None:
    """Checks a configuration, and prints the first prompt, the forwards of a step, and what was checked.

    missing: what has no local copy, see `DryRun`. Raises UserError with every problem.
    """
    report = DryRun(config, missing).check()
    _show_prompt(config)
    _show_passes(config)
    print(report, file=sys.stderr)
    print(f"# {name}: nothing wrong found", file=sys.stderr)


def _show_prompt(config: Config) -> None:
    """Prints the first prompt, unless `prepare` has not written its file yet."""
    if config.data.train.is_file() and config.model.path.is_dir():
        text = first_prompt(config.data.train, model_folder=config.model.path, settings=config.data)
        print(f"# first prompt, as the model will see it (data.template: {config.data.template}):", file=sys.stderr)
        more = f"\n... and {len(text) - MOST_SHOWN} more characters" if len(text) > MOST_SHOWN else ""
        print(text[:MOST_SHOWN] + more, file=sys.stderr)


def _show_passes(config: Config) -> None:
    """Prints which forwards a step runs, unless they depend on a user's own loss that cannot be imported here."""
    try:
        print(f"# {passes_of(config)}", file=sys.stderr)
    except UserError as error:
        print(f"# forwards of a step: not known here: {error}", file=sys.stderr)
