from __future__ import annotations

import json
import shutil

import pytest

from megatron_rl.checkpoint.manifest import FORMAT, MANIFEST, RNG, checkpoints, read_checkpoint
from megatron_rl.errors import UserError
from tests.unit.checkpoint.conftest import FILES, Saving, state


def test_checkpoints_are_in_the_order_of_their_steps(saving: Saving) -> None:
    for step in (2, 10, 999_999, 1_000_000):
        saving.save(step)
    assert [read_checkpoint(path).state.step for path in checkpoints(saving.folder)] == [2, 10, 999_999, 1_000_000]
    assert checkpoints(saving.folder / "nowhere") == []


def test_a_folder_without_a_manifest_is_no_checkpoint(saving: Saving) -> None:
    with pytest.raises(UserError, match=rf"{saving.folder} is not a checkpoint: it has no {MANIFEST}"):
        read_checkpoint(saving.folder)


@pytest.mark.parametrize("name", [*FILES, RNG])
def test_a_missing_file_is_named(saving: Saving, name: str) -> None:
    path = saving.save(1)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{path / name} is missing: .*resume=PATH"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", [*FILES, RNG])
def test_a_damaged_file_is_named(saving: Saving, name: str) -> None:
    path = saving.save(1)
    whole = (path / name).read_bytes()
    for content, what in ((b"", f"0 bytes, {len(whole)} were written"), (whole[:-1] + b"?", "wrong SHA-256")):
        (path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{path / name} is damaged \({what}\): .*resume=PATH"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "cut short",
        "no text",
        "no object",
        "without state",
        "without files",
        "without origin",
        "state of another kind",
        "files of another kind",
    ],
)
def test_a_damaged_manifest_is_named(saving: Saving, damage: str) -> None:
    path = saving.save(1)
    text = (path / MANIFEST).read_bytes()
    whole = json.loads(text)
    match damage.split():
        case ["without", key]:
            text = json.dumps({name: value for name, value in whole.items() if name != key}).encode()
        case [key, "of", *_]:
            text = json.dumps(whole | {key: {"step": "one"}}).encode()
        case _:
            text = {"empty": b"", "cut short": text[:-20], "no text": b"\xff\xfe\x00", "no object": b"[]"}[damage]
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(UserError, match=rf"{path / MANIFEST} is damaged .*resume=PATH"):
        read_checkpoint(path)


def test_another_format_is_named_with_what_to_do(saving: Saving) -> None:
    path = saving.save(1)
    whole = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(whole | {"format": FORMAT + 1, "unheard": "of"}))
    with pytest.raises(UserError, match=rf"{path} .*format {FORMAT + 1}; .*reads format {FORMAT}: .*the version"):
        read_checkpoint(path)


def test_a_copied_checkpoint_is_as_good(saving: Saving) -> None:
    copy = shutil.copytree(saving.save(7), saving.folder / "elsewhere")
    assert read_checkpoint(copy).state == state(7)
