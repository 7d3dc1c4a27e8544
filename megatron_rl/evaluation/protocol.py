"""Reads a suite file: the protocol of an evaluation."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_rl.config.evaluation import ProtocolSettings, SuiteSettings
from megatron_rl.config.yaml_text import parse_yaml, yaml_problem
from megatron_rl.data.hub import local_data
from megatron_rl.errors import UserError

BUILT_IN = Path(__file__).parent / "suites"


def load_protocol(name: str, data_folder: Path | None = None, only: list[str] | None = None) -> ProtocolSettings:
    """Loads a suite file by its path, or a built-in one by its name.

    Args:
        name: Path or name of the suite file.
        data_folder: Folder of the data files. With None, their paths are relative to the working directory.
        only: Names of the suites to load; None loads all.

    Raises:
        UserError: the file does not exist, a key or value is invalid, a suite is unknown, or a data file is missing.
    """
    protocol = _read(_find(name))
    if unknown := set(only or ()) - set(protocol.suites):
        raise UserError(f"{name} has no suite {', '.join(sorted(unknown))}; it has {', '.join(protocol.suites)}")
    suites = {
        suite: _resolved(suite, settings.over(protocol), data_folder)
        for suite, settings in protocol.suites.items()
        if not only or suite in only
    }
    if protocol.reward.name == "agent" and not protocol.agent:
        raise UserError(f"{name}: reward.name: agent takes the reward of an agent, but there is no section agent")
    missing = [f"{suite}: {settings.data}" for suite, settings in suites.items() if not settings.data.is_file()]
    if missing:
        raise UserError(
            f"{name}: data files are missing:\n  " + "\n  ".join(missing) + "\n`megatron-rl data prepare` writes "
            "those of the published sets; --data FOLDER sets their folder; --only SUITE,... selects some suites"
        )
    return protocol.model_copy(update={"suites": suites})


def built_in() -> list[str]:
    """Returns the names of the built-in suite files."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def _find(name: str) -> Path:
    if name in built_in():
        return BUILT_IN / f"{name}.yaml"
    if not Path(name).is_file():
        raise UserError(f"no suite file {name}; built in: {', '.join(built_in())}")
    return Path(name)


def _resolved(name: str, suite: SuiteSettings, folder: Path | None) -> SuiteSettings:
    """Returns the suite with the path of its file: below `folder`, or the local copy of a data set of the Hub."""
    here = folder / suite.data if folder else suite.data
    data = here if here.is_file() else local_data(suite.data, f"suites.{name}", "test", tasks=suite.tasks)
    return suite.model_copy(update={"data": here if data == suite.data else data, "tasks": None})


def _read(path: Path) -> ProtocolSettings:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
        return ProtocolSettings.model_validate(tree)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {yaml_problem(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_problem(item)}" for item in error.errors())) from error


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = get_close_matches(str(item["loc"][-1]), [*ProtocolSettings.model_fields, *SuiteSettings.model_fields], 1)
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key or 'the file'}: {item['msg']} ({item['input']!r:.60} given)"
