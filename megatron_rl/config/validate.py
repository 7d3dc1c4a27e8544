"""Checks before anything starts, which need no GPU, no torch and no weights of the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_json_object
from megatron_rl.utils.import_path import import_callable, is_import_path

from .methods import method_settings
from .schema import Config

DATA_SUFFIXES = (".jsonl", ".parquet")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
"""Files of weights; `models/weights_check.py` says which can be read."""


def check_inputs(config: Config, *, prepared: bool = True, weights: bool = True) -> None:
    """Checks every file that the run will read, and the user's own functions. Raises UserError with every problem.

    prepared: whether `prepare` ran already; if not, files under its folder are not checked.
    weights: whether the model folder must hold weights (a dry run needs none).
    """
    problems = [*_check_files(config, prepared), *_check_model(config, prepared, weights), *_check_own(config)]
    if problems:
        raise UserError("\n".join(problems))


def _check_own(config: Config) -> Iterator[str]:
    """Imports a user's own loss, advantage, reward and group filter. A login node may lack torch: then it does not."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        method_settings(config.algorithm)
    except UserError as error:
        yield str(error)
    agent = config.rollout.agent
    functions = {
        "rollout.agent.function": agent.function if agent else "",
        "algorithm.advantage": config.algorithm.advantage,
        "reward.name": config.reward.name,
        "rollout.group_filter": config.rollout.group_filter or "",
    }
    for key, path in functions.items():
        if is_import_path(path):
            try:
                import_callable(path, key)
            except UserError as error:
                yield str(error)


def _expected_later(config: Config, path: Path, prepared: bool) -> bool:
    prepare = config.prepare
    return prepare is not None and not prepared and path.resolve().is_relative_to(prepare.folder.resolve())


def _check_files(config: Config, prepared: bool) -> Iterator[str]:
    prompts = {"data.train": config.data.train}
    prompts |= {f"evaluation.suites.{name}": suite.data for name, suite in config.evaluation.suites.items()}
    for key, path in prompts.items():
        if path.suffix not in DATA_SUFFIXES:
            yield f"{key}: {path} has the extension {path.suffix!r}; expected {' or '.join(DATA_SUFFIXES)}"
    phases = config.warm_start.phases if config.warm_start else []
    files = prompts | {f"warm_start.phases.{index}.data": phase.data for index, phase in enumerate(phases)}
    for key, path in files.items():
        if not path.is_file() and not _expected_later(config, path, prepared):
            yield f"{key}: no such file: {path}{_relative_to(path)}"
    reference = config.algorithm.reference_kl
    if reference.active and reference.model is not None and not reference.model.is_dir():
        yield f"algorithm.reference_kl.model: no such folder: {reference.model}{_relative_to(reference.model)}"
    if isinstance(config.resume, Path) and not config.resume.is_dir():
        yield f"resume: no such folder: {config.resume}{_relative_to(config.resume)}"


def _relative_to(path: Path) -> str:
    return "" if path.is_absolute() else f" (relative to {Path.cwd()})"


def _check_model(config: Config, prepared: bool, weights: bool) -> Iterator[str]:
    folder = config.model.path
    if _expected_later(config, folder, prepared):
        return
    if not folder.is_dir():
        yield f"model.path: no such folder: {folder}{_relative_to(folder)}"
        return
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield f"model.path: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})"
    if weights and not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        yield f"model.path: {folder} has no weights (*.safetensors)"
    try:
        if (folder / "config.json").exists():
            read_json_object(folder / "config.json")
        else:
            yield f"model.path: {folder} has no config.json; a Hugging Face model folder is expected"
    except UserError as error:
        yield f"model.path: {error}"
