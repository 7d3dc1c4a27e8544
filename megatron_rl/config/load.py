"""From a YAML file and `key.path=value` overrides to a checked Config, and back."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rl.errors import UserError

from .checks import contradictions
from .files import merge, read_layers
from .overrides import apply_override, parse_override
from .problems import source, type_problems, unknown_in_path, unknown_keys
from .schema import Config
from .yaml_text import dump_yaml


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read a configuration file, laid over its `base`, and apply overrides in order.

    A null, in the file or as `key=null`, clears the key: its default holds. Raises UserError with every problem found,
    each with its key and where it was set.
    """
    layers = read_layers(path)
    parsed = [parse_override(text) for text in overrides]
    problems = [f"{layer.path}: {problem}" for layer in layers for problem in unknown_keys(layer.tree, ())]
    for override in parsed:
        unknown = unknown_in_path(override.key)
        found = [unknown] if unknown else list(unknown_keys(override.value, override.key))
        problems += [f"override {override.text}: {problem}" for problem in found]
    _raise_if(problems)
    tree = merge(layers)
    for override in parsed:
        apply_override(tree, override)
    tree = _without_nulls(tree)
    _name_run(tree, path)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        _raise_if([f"{source(key, layers, parsed)}: {text}" for key, text in type_problems(error, tree).items()])
        raise
    _raise_if([f"{path}: {problem}" for problem in contradictions(config)])
    return config


def expand(config: Config) -> str:
    """YAML text with every key, defaults included; `load_config` reads it back to an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _without_nulls(value) for name, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_nulls(value) for value in tree]
    return tree


def _name_run(tree: dict[Any, Any], path: Path) -> None:
    """Fill in run.name and run.folder. With `resume: auto`, a run without either is this file's newest one."""
    run = tree.setdefault("run", {})
    if not isinstance(run, dict) or ("name" in run and "folder" in run):
        return
    if "folder" in run:
        run["name"] = Path(str(run["folder"])).resolve().name
    else:
        name = run.setdefault("name", _run_name(path.stem, tree.get("resume")))
        run["folder"] = str(Path("runs", str(name)))


def _run_name(stem: str, resume: Any) -> str:
    stamped = re.compile(re.escape(stem) + r"-\d{8}-\d{6}")
    earlier = [p.name for p in Path("runs").glob("*") if p.is_dir() and stamped.fullmatch(p.name)]
    if resume == "auto" and earlier:
        return max(earlier)
    return f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
