"""`megatron-rl train --dry-run`: the checks of a run that need no GPU and start nothing, and what is left unchecked."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_rl.agent.resolve import load_agent
from megatron_rl.config import Config, check_inputs
from megatron_rl.config.passes import passes_of
from megatron_rl.config.reward import REMOTE, VERIFIERS
from megatron_rl.data.prompts import first_prompt
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import has_weights
from megatron_rl.models.layout_check import check_layout
from megatron_rl.models.published import published_config
from megatron_rl.models.weights_check import check_weights
from megatron_rl.reward.grader import check_reward
from megatron_rl.reward.trial import try_reward
from megatron_rl.run.models import check_reference, model_folders
from megatron_rl.run.prompts import RunPrompts, load_run_prompts
from megatron_rl.run.requirements import check_engine, check_trackers
from megatron_rl.run.tokens import check_tokens
from megatron_rl.run.traces import check_traces, trace_files


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
    """The checks of one configuration, the cheapest first."""

    def __init__(self, config: Config, missing: UserError | None = None) -> None:
        """`missing`: the models and data sets that are ids of the Hub and have no local copy, a line each."""
        self.config = config
        self.missing = missing
        self.prompts: RunPrompts | None = None

    def check(self) -> Report:
        """Raises UserError with the problems of all checks. Nothing is written, and nothing is left running."""
        report = Report(["keys and values"], [])
        problems: list[str] = []
        for what, check in self._checks():
            try:
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
        yield "files", self._files
        yield "your own functions", self._own
        if self.config.rollout.agent:
            yield "agent", self._agent
        yield "the model's layout", self._layout
        yield "weights", self._weights
        yield "traces of the warm start", self._traces
        yield "prompts and labels", self._prompts
        yield "reward", self._reward
        yield "engine", self._engine
        yield "packages of wandb and mlflow", self._trackers

    def _never(self) -> Iterator[str]:
        yield "memory: `megatron-rl plan` estimates it"
        if self.config.actor.device != "cpu":
            yield "GPUs, drivers and networks: `megatron-rl doctor` checks them on the run's nodes"
        if self.config.rollout.server.urls or self.config.reward.name == REMOTE:
            yield "servers that run already: a dry run makes no connection"

    def _files(self) -> None:
        """Says of a file only once that it is missing."""
        lines = str(self.missing).splitlines() if self.missing else []
        keys = {line.partition(":")[0] for line in lines}
        try:
            check_inputs(self.config, prepared=False, weights=False)
        except UserError as error:
            lines += [line for line in str(error).splitlines() if line.partition(":")[0] not in keys]
        if lines:
            raise UserError("\n".join(lines))

    def _own(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise _NotChecked("they are imported with torch, which is not installed here")

    def _prepared(self) -> None:
        prepare, folder = self.config.prepare, self.config.model.path
        if prepare is not None and not folder.exists():
            raise _NotChecked(f"the run itself writes {folder} (prepare.task: {prepare.task})")
        if not (folder / "config.json").is_file():
            raise _NotChecked(f"{folder} has no config.json")

    def _agent(self) -> None:
        self._elsewhere()
        assert self.config.rollout.agent
        load_agent(self.config.rollout.agent)

    def _layout(self) -> None:
        if published_config(self.config.model.path) is None:
            self._prepared()
        check_layout(self.config)
        check_reference(self.config)

    def _weights(self) -> None:
        self._prepared()
        folders = model_folders(self.config)
        if absent := [folder for folder in folders if not has_weights(folder)]:
            raise _NotChecked(f"{absent[0]} has none yet")
        for folder in folders:
            check_weights(folder)

    def _traces(self) -> None:
        if absent := [path for path in trace_files(self.config) if not path.is_file()]:
            raise _NotChecked(f"{absent[0]} is not there")
        check_traces(self.config)

    def _prompts(self) -> None:
        self._prepared()
        files = [self.config.data.train, *(suite.data for suite in self.config.evaluation.suites.values())]
        if absent := [str(path) for path in files if not path.is_file()]:
            raise _NotChecked(f"{absent[0]} is not there")
        if importlib.util.find_spec("transformers") is None:
            raise _NotChecked("tokenizers need transformers, which is not installed here")
        tokenizer = load_tokenizer(self.config.model.path)
        check_tokens(self.config, tokenizer)
        self.prompts = load_run_prompts(self.config, tokenizer)

    def _reward(self) -> None:
        self._elsewhere()
        check_reward(self.config.reward)
        if self.config.reward.name in (*VERIFIERS, REMOTE):
            return
        if self.prompts is None:
            raise _NotChecked("a trial call needs a prompt, and these were not checked")
        try_reward(self.config.reward, self.prompts.train.prompts[0])

    def _engine(self) -> None:
        self._elsewhere()
        if importlib.util.find_spec("torch") is None:
            raise _NotChecked("engines need torch, which is not installed here")
        check_engine(self.config)

    def _trackers(self) -> None:
        settings = self.config.observability
        if settings.wandb or settings.mlflow or settings.trackio:
            self._elsewhere()
            check_trackers(self.config)

    def _elsewhere(self) -> None:
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
        print(text, file=sys.stderr)


def _show_passes(config: Config) -> None:
    """Prints which forwards a step runs, unless they depend on a user's own loss that cannot be imported here."""
    try:
        print(f"# {passes_of(config)}", file=sys.stderr)
    except UserError as error:
        print(f"# forwards of a step: not known here: {error}", file=sys.stderr)
