"""Models and data sets that a configuration names by their id on the Hugging Face Hub: their local copies.

A path that exists is always a path. What is in the local cache of the Hub is used without asking the Hub; anything else
is downloaded, unless HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config import Config
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.config.validate import DATA_SUFFIXES
from megatron_rl.errors import UserError
from megatron_rl.utils.files import atomically

from .environments import check_held_out, is_environment, write_tasks
from .published import SETS, prepare

if TYPE_CHECKING:
    from datasets import Dataset

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-]+))?(?::(?P<part>\w[\w.-]*(?::\w[\w.-]*)?))?")
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
"""Files of a model that a run reads or hands on to its export."""


def is_hub_id(path: Path) -> bool:
    """Whether a path is an id of the Hub: `owner/name`, perhaps with a revision or a part, and nothing here."""
    text = str(path)
    if path.exists() or path.suffix in DATA_SUFFIXES or not _ID.fullmatch(text):
        return False
    return not path.parent.is_dir()  # models/mine, where models is a folder, is a misspelt path


def with_local_copies(config: Config, *, download: bool = True) -> Config:
    """Returns the configuration with the local copies of everything that it names by an id of the Hub.

    download: fetch what is not in the local cache. Raises UserError, with the command that fetches it, for anything
    that is not to be had.
    """

    def written_later(path: Path) -> bool:
        return config.prepare is not None and path.resolve().is_relative_to(config.prepare.folder.resolve())

    def data_of(path: Path, key: str, split: str, tasks: TaskSettings | None) -> Path:
        return path if written_later(path) else local_data(path, key, split, download, tasks)

    def model_of(path: Path, key: str) -> Path:
        return path if written_later(path) else local_model(path, key, download)

    suites = {
        name: suite.model_copy(
            update={"data": data_of(suite.data, f"evaluation.suites.{name}", "test", suite.tasks), "tasks": None}
        )
        for name, suite in config.evaluation.suites.items()
    }
    train = data_of(config.data.train, "data.train", "train", config.data.tasks)
    if is_environment(config.data.train):
        check_held_out(train, {name: suites[name].data for name in suites})
    algorithm, reference = config.algorithm, config.algorithm.reference_kl
    if reference.active and reference.model is not None:
        folder = model_of(reference.model, "algorithm.reference_kl.model")
        algorithm = algorithm.model_copy(update={"reference_kl": reference.model_copy(update={"model": folder})})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": model_of(config.model.path, "model.path")}),
            "data": config.data.model_copy(update={"train": train, "tasks": None}),
            "algorithm": algorithm,
            "evaluation": config.evaluation.model_copy(update={"suites": suites}),
        }
    )


def local_model(path: Path, key: str, download: bool = True) -> Path:
    """Returns the folder of a model: of its copy in the cache if `path` is an id of the Hub, otherwise `path`.

    key: the configuration key that errors name. Raises UserError if the model is not to be had.
    """
    return _snapshot(path, key, "model", download, _MODEL_FILES) if is_hub_id(path) else path


def local_data(path: Path, key: str, split: str, download: bool = True, tasks: TaskSettings | None = None) -> Path:
    """Returns the file of a data set: of its copy in the cache if `path` is an id of the Hub, the file of its tasks if
    `path` names an environment, otherwise `path`.

    The published sets that `megatron-rl data prepare` knows are prepared by it. split: the split to take if the id
    names none and the set has several. Raises UserError if the set is not to be had, or has no such split.
    """
    if is_environment(path):
        return write_tasks(path, key, split, tasks)
    if tasks is not None:
        raise UserError(f"{key}: {path} is no environment, and the section tasks beside it is for environments only")
    if not is_hub_id(path):
        return path
    from huggingface_hub import cached_assets_path

    named = _parts(path)
    folder = _snapshot(path, key, "dataset", download, None)
    cache = cached_assets_path("megatron-rl", namespace="data", subfolder=named["id"].replace("/", "--"))
    part = f"-{named['part'].replace(':', '-')}" if named["part"] else f"-{split}"
    file = cache / f"{named['id'].replace('/', '--')}{part}-{folder.name[:12]}.parquet"
    if file.is_file():
        return file
    rows = _rows(folder, path, key, named["part"], split)
    published = next((name for name, known in SETS.items() if named["id"] in known.hub_ids), None)
    if published is None:
        with atomically(file) as partial:
            rows.to_parquet(partial)
        return file
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        raw = Path(scratch, "data.parquet")
        rows.to_parquet(raw)
        prepare(published, [raw], file)
    return file


def _parts(path: Path) -> dict[str, Any]:
    match = _ID.fullmatch(str(path))
    assert match, path
    return match.groupdict()


def _snapshot(path: Path, key: str, kind: str, download: bool, files: list[str] | None) -> Path:
    """Returns the folder of a repository in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = _parts(path)
    wanted: dict[str, Any] = {"repo_id": named["id"], "repo_type": kind, "revision": named["revision"]}
    try:
        return Path(snapshot_download(**wanted, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache, or not completely
    command = f"hf download {named['id']}" + (" --repo-type dataset" if kind == "dataset" else "")
    command += f" --revision {named['revision']}" if named["revision"] else ""
    missing = f"{key}: {path} is neither a path (relative to {Path.cwd()}) nor in the cache of the Hugging Face Hub"
    if not download:
        raise UserError(f"{missing}. Fetch it with `{command}`")
    try:
        return Path(snapshot_download(**wanted, allow_patterns=files))
    except GatedRepoError as error:
        raise UserError(
            f"{key}: {path}: the Hub gives this {kind} to those who accepted its terms: accept them on its page, then "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{missing}, and the Hub has no such {kind}, or shows it to others only. Correct the path or the id; for a "
            "private one, `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{missing}, and the Hub cannot be reached from here ({type(error).__name__}). Fetch it with `{command}` "
            "on a machine that reaches the Hub and shares the cache (HF_HOME), or give the path of a copy"
        ) from error


def _rows(folder: Path, path: Path, key: str, part: str | None, split: str) -> Dataset:
    """Returns the rows of one split of a downloaded data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{key}: {path} is a data set of the Hub, which needs the package datasets: pip install datasets"
        ) from error

    subset, _, wanted = (part or "").rpartition(":")
    try:
        splits = load_dataset(str(folder), subset or None)
    except Exception as error:  # datasets raises errors of many kinds for what it cannot read
        raise UserError(f"{key}: {path} cannot be read as a data set: {error}") from error
    name = wanted or (split if split in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        whole = str(path).partition(":")[0] + (f":{subset}" if subset else "")
        raise UserError(f"{key}: {path} has no split {name}; name one: {', '.join(f'{whole}:{one}' for one in splits)}")
    return splits[name]
