"""The model card of a run's export, and its upload to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.effective import read_effective, read_expanded
from megatron_rl.config.yaml_text import MOST_YAML, dump_yaml
from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import read_metrics
from megatron_rl.observability.summary import Change, before_and_after, signed
from megatron_rl.utils.bounded import read_text
from megatron_rl.utils.files import atomically
from megatron_rl.utils.format import number

EXPORT, CARD, CONFIG = "hf", "README.md", "config.yaml"


def push_to_hub(run_folder: Path | str, repository: str, *, private: bool = False) -> str:
    """Uploads the export of a finished run with a model card made from the run, and returns the URL of the commit.

    repository: `owner/name`; it is created if it does not exist. The card takes the place of the export's README.md.
    Raises UserError if the run has no export, or the Hub refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # The HTTP library of the Hub's client differs between its versions. A failed connection raises the base of this
    # error, which that library defines.
    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    folder = _export(Path(run_folder))
    write_card(Path(run_folder), folder / CARD)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by megatron-rl"))
    except HFValidationError as error:
        raise UserError(f"{repository}: not a name on the Hub: {error}; give OWNER/NAME") from error
    except (http_error, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{repository}: the Hub did not take the upload: {error}\nAre you logged in (`hf auth login`), may you "
            f"write there, and can this machine reach the Hub? The export with its card is {folder}"
        ) from error


def write_card(run_folder: Path, output: Path | None = None) -> Path:
    """Writes the model card of a run, by default into its export. Raises UserError if the folder holds no run, or it
    has no export."""
    output = output or _export(run_folder) / CARD
    text = model_card(run_folder)
    with atomically(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return output


def model_card(run_folder: Path) -> str:
    """Returns the card as text: metadata of the Hub, what was trained and how, and the results before and after.

    Raises UserError if the folder holds no run, or its configuration lacks what the card tells.
    """
    try:
        text = read_text(run_folder / CONFIG, MOST_YAML)
        config = read_expanded(text)
    except (UserError, yaml.YAMLError) as error:
        raise UserError(f"{run_folder}: holds no run: {CONFIG} cannot be read ({error})") from error
    try:
        name, method, reward = config["run"]["name"], str(config["algorithm"]["name"]), config["reward"]["name"]
        base, data = hub_name(config["model"]["path"]), hub_name(config["data"]["train"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run_folder / CONFIG}: not the complete configuration of a run: the card needs run.name, "
            "algorithm.name, reward.name, model.path and data.train. Restore the file that the run wrote"
        ) from error
    rows = read_metrics(run_folder)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {"base_model": base} if _on_hub(base) else {}
    metadata |= {"datasets": [data]} if _on_hub(data) else {}
    metadata["tags"] = ["reinforcement-learning", "rlvr", "megatron-rl", method.replace("_", "-")]
    last = max((row["step"] for row in rows), default=0)
    chosen = [value for value in read_effective(text) if value.source not in ("default",) and _tells(value.key)]
    return "\n".join(
        [
            f"---\n{dump_yaml(metadata)}---\n",
            f"# {name}\n",
            f"`{base}`, trained by reinforcement learning with verifiable rewards: {last} steps with the method "
            f"`{method}` on `{data}`, graded by `{reward}`.",
            "The software is megatron-rl, an implementation of Lp-Reg (arXiv 2510.03222) on Megatron-core.\n",
            *_results(before_and_after(rows)),
            "## Settings\n",
            "Every setting that is not a default:\n",
            "```yaml",
            *(f"{value.key}: {value.value}" for value in chosen),
            "```",
            "",
        ]
    )


def hub_name(path: str) -> str:
    """Returns `owner/name` for a folder or a file in the cache of the Hub, otherwise the last part of a path."""
    for part in Path(path).parts:
        kind, _, rest = part.partition("--")
        if kind in ("models", "datasets") and "--" in rest:
            return rest.replace("--", "/", 1)
    parents = [part for part in Path(path).parent.parts if "--" in part]
    return parents[-1].replace("--", "/", 1) if parents else Path(path).name


def _on_hub(name: str) -> bool:
    return "/" in name


def _tells(key: str) -> bool:
    """Whether a key tells a reader of the card something: not where files lie or how processes are laid out."""
    return key.split(".")[0] in ("seed", "rollout", "algorithm", "train", "reward", "actor") and "server" not in key


def _export(run_folder: Path) -> Path:
    folder = run_folder / EXPORT
    if not (folder / "config.json").is_file():
        raise UserError(f"{run_folder}: no export in {folder}; a run exports its model after the last step")
    return folder


def _results(changes: Sequence[Change]) -> Iterator[str]:
    if not changes:
        yield "The run evaluated nothing.\n"
        return
    first, last = changes[0].first_step, changes[0].last_step
    yield f"## Results\n\nBefore (step {first}) and after training (step {last}), measured by the run itself:\n"
    yield "| suite | measure | before | after | change |"
    yield "|---|---|---|---|---|"
    for change in changes:
        difference = "" if change.difference is None else signed(change.difference)
        yield f"| {change.suite} | {change.label} | {number(change.first)} | {number(change.last)} | {difference} |"
    yield ""
