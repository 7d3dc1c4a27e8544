"""The data of a run's folder that a report needs. Any file may be missing, as in a run that has just started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.yaml_text import MOST_YAML, parse_yaml
from megatron_rl.errors import UserError
from megatron_rl.observability.diagnosis import Finding, read_findings
from megatron_rl.observability.metrics import Row, read_metrics
from megatron_rl.observability.provenance import in_words, read_provenance
from megatron_rl.rollout.dump import dumps
from megatron_rl.utils.bounded import read_bytes

NOT_THE_EXPERIMENT = ("run", "seed", "resume", "observability", "prepare")
"""Sections in which runs of the same experiment may differ."""


@dataclass(frozen=True)
class RunData:
    """The data of one run, finished or not."""

    folder: Path
    rows: list[Row]
    config_text: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.setting("run", "name") or self.folder.resolve().name)

    @property
    def dumps(self) -> list[tuple[int, Path]]:
        """Step and file of every rollout dump, by step."""
        return dumps(self.folder / "rollouts")

    @property
    def candidates(self) -> list[tuple[int, Path]]:
        """Step and file of every record of next-token candidates, by step."""
        return dumps(self.folder / "candidates")

    @property
    def findings(self) -> list[Finding]:
        return read_findings(self.folder)

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What the run was made from, for a reader: of the last start, with the number of starts."""
        return in_words(read_provenance(self.folder))

    def setting(self, section: str, key: str) -> Any:
        """Returns a value of the configuration, or None if it is missing: a report must not depend on it."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None


@dataclass(frozen=True)
class Group:
    """Runs of the same experiment, which differ at most in their seed. A chart draws one line per group."""

    label: str
    runs: list[RunData]


def read_run(folder: Path) -> RunData:
    """Reads the folder of a run. Raises UserError if the folder does not exist or a file in it is broken."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder. Give the folder of a run, such as runs/<name>.")
    text, config = _read_config(folder / "config.yaml")
    return RunData(folder, read_metrics(folder), text, config)


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Groups runs that differ only in their seed, in order of first appearance."""
    together: dict[str, list[RunData]] = {}
    for run in runs:
        experiment = {key: value for key, value in run.config.items() if key not in NOT_THE_EXPERIMENT}
        key = yaml.safe_dump(experiment) if experiment else str(run.folder)
        together.setdefault(key, []).append(run)
    groups = [Group(_label(members), members) for members in together.values()]
    labels = [group.label for group in groups]
    return [
        group if labels.count(group.label) == 1 else Group(f"{group.label} ({group.runs[0].folder})", group.runs)
        for group in groups
    ]


def _label(runs: list[RunData]) -> str:
    if len(runs) == 1:
        return runs[0].name
    columns = zip(*(run.name for run in runs), strict=False)
    common = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)).rstrip("-_. ")
    for ending in ("-seed", "_seed", "-s", "_s"):
        common = common.removesuffix(ending)
    return f"{common or runs[0].name} ({len(runs)} seeds)"


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    try:
        text = read_bytes(path, MOST_YAML).decode("utf-8", errors="replace")
        config = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}. Correct the file, or move it away.") from error
    return text, config if isinstance(config, dict) else {}
