"""Loading a checked Config from a YAML file and `key.path=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rl.errors import UserError

from .algorithm import AlgorithmSettings
from .checks import contradictions
from .effective import without_nulls
from .files import Layer, merge, read_layers
from .keys import Key
from .methods import method_problems
from .overrides import Override, apply_override, parse_override
from .problems import type_problems, unknown_in_path, unknown_keys
from .remarks import settings_not_in_use
from .schema import Config, Sources
from .sources import OVERRIDE, place_of, source_of


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration of a file, laid over its `base`, with the overrides applied in order.

    overrides: texts `key.path=value`, with the value in YAML.

    A null or an empty mapping, in the file or as `key=null`, clears the key, which then has its default.
    Raises UserError with every problem found, each with its key and where it was set.
    """
    path = Path(path)
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
    tree = without_nulls(tree)
    _name_run(tree, path)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        _raise_if([f"{place_of(key, layers, parsed)}: {text}" for key, text in type_problems(error, tree).items()])
        raise
    problems = [f"{place_of(key, layers, parsed)}: {text}" for key, text in method_problems(config.algorithm)]
    _raise_if([*problems, *(f"{path}: {problem}" for problem in contradictions(config))])
    config.sources.update(_sources(config, layers, parsed))
    unused = settings_not_in_use(config)
    _raise_if([f"override: {text}" for key, text in unused if config.sources[key] == OVERRIDE])
    return config


def _sources(config: Config, layers: list[Layer], overrides: list[Override]) -> Sources:
    """The sources of the values that a file or an override set."""
    found = {".".join(key): source_of(key, layers, overrides) for key in _set_keys(config.model_dump(mode="json"))}
    return Sources({key: source for key, source in found.items() if source is not None})


def _set_keys(tree: Any, key: Key = ()) -> Iterator[Key]:
    """The keys of plain values, and of empty sections and lists, but for those that are unset."""
    if isinstance(tree, dict | list) and tree:
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _set_keys(value, (*key, str(name)))
    elif tree is not None:
        yield key


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _name_run(tree: dict[Any, Any], path: Path) -> None:
    """Fills in run.name and run.folder. With `resume: auto` and neither of them given, the run is the newest of this
    file and method."""
    run = tree.setdefault("run", {})
    if not isinstance(run, dict) or ("name" in run and "folder" in run):
        return
    if "folder" in run:
        run["name"] = Path(str(run["folder"])).resolve().name
    else:
        name = run.setdefault("name", _run_name(_experiment(path.stem, tree), path.stem, tree.get("resume")))
        run["folder"] = str(Path("runs", str(name)))


def _experiment(stem: str, tree: dict[Any, Any]) -> str:
    """Returns the file's stem and the method, once if the stem names it already: `countdown-grpo`."""
    algorithm = tree.get("algorithm")
    algorithm = algorithm if isinstance(algorithm, dict) else {}
    method = str(algorithm.get("name", AlgorithmSettings.model_fields["name"].default)).rpartition(":")[2]
    words = [method, *(["with_lp_reg"] if "with_lp_reg" in algorithm else [])]
    new = [word for word in words if not re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", stem)]
    return "-".join([stem, *new])


def _run_name(experiment: str, stem: str, resume: Any) -> str:
    """Returns a fresh name, or with `resume: auto` that of the newest run of the file with the method. Runs of earlier
    versions, whose names had no method, count too."""
    stamped = re.compile(f"(?:{re.escape(experiment)}|{re.escape(stem)})-" + r"(\d{8}-\d{6})")
    folders = [path.name for path in Path("runs").glob("*") if path.is_dir()]
    earlier = {match[1]: name for name in folders if (match := stamped.fullmatch(name))}
    if resume == "auto" and earlier:
        return earlier[max(earlier)]
    return f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
