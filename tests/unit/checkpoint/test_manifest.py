from __future__ import annotations

import json
import shutil

import pytest

from megatron_rl.checkpoint.manifest import FORMAT, MANIFEST, RNG, checkpoints, read_checkpoint, read_manifest
from megatron_rl.errors import UserError
from tests.unit.checkpoint.conftest import FILES, Saving, state


def test_checkpoints_are_sorted_by_step(saving: Saving) -> None:
    for step in (2, 10, 999_999, 1_000_000):
        saving.save(step)
    assert [read_checkpoint(path).state.step for path in checkpoints(saving.folder)] == [2, 10, 999_999, 1_000_000]
    assert checkpoints(saving.folder / "nowhere") == []


def test_a_folder_without_a_manifest_is_not_a_checkpoint(saving: Saving) -> None:
    with pytest.raises(UserError, match=rf"{saving.folder} is not a checkpoint: it has no {MANIFEST}"):
        read_checkpoint(saving.folder)


@pytest.mark.parametrize("name", [*FILES, RNG])
def test_a_missing_file_is_named_in_the_error(saving: Saving, name: str) -> None:
    path = saving.save(1)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{path / name} is missing: .*resume=PATH"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", [*FILES, RNG])
def test_a_damaged_file_is_named_in_the_error(saving: Saving, name: str) -> None:
    path = saving.save(1)
    content = (path / name).read_bytes()
    for damaged, what in ((b"", f"0 bytes instead of {len(content)}"), (content[:-1] + b"?", "wrong SHA-256")):
        (path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path / name} is damaged \({what}\): .*resume=PATH"):
            read_checkpoint(path)


def test_a_changed_byte_anywhere_in_a_manifest_is_noticed_or_harmless(saving: Saving) -> None:
    """Harmless is only a change of the line that holds the manifest's own SHA-256."""
    path = saving.save(1)
    content, manifest = (path / MANIFEST).read_bytes(), read_manifest(path)
    sealed = content.rfind(b',\n "sha256"')
    for place in range(len(content)):
        (path / MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert read_manifest(path) == manifest and place >= sealed, place
        except UserError as error:
            assert str(path / MANIFEST) in str(error)


def test_a_manifest_of_an_earlier_version_has_no_sha256(saving: Saving) -> None:
    path = saving.save(1)
    manifest, fields = read_manifest(path), json.loads((path / MANIFEST).read_bytes())
    assert fields.pop("sha256")
    (path / MANIFEST).write_text(json.dumps(fields, indent=1))
    assert read_manifest(path) == manifest


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "truncated",
        "not text",
        "not an object",
        "without state",
        "without files",
        "without origin",
        "state of another kind",
        "files of another kind",
    ],
)
def test_a_damaged_manifest_is_named_in_the_error(saving: Saving, damage: str) -> None:
    path = saving.save(1)
    text = (path / MANIFEST).read_bytes()
    fields = json.loads(text)
    match damage.split():
        case ["without", key]:
            text = json.dumps({name: value for name, value in fields.items() if name != key}).encode()
        case [key, "of", *_]:
            text = json.dumps(fields | {key: {"step": "one"}}).encode()
        case _:
            text = {"empty": b"", "truncated": text[:-20], "not text": b"\xff\xfe\x00", "not an object": b"[]"}[damage]
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(UserError, match=rf"{path / MANIFEST} is damaged .*resume=PATH"):
        read_checkpoint(path)


def test_the_error_for_another_format_says_what_to_do(saving: Saving) -> None:
    path = saving.save(1)
    fields = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(fields | {"format": FORMAT + 1, "unknown": "field"}))
    with pytest.raises(UserError, match=rf"{path} .*format {FORMAT + 1}; .*reads format {FORMAT}: .*the version"):
        read_checkpoint(path)


def test_a_copied_checkpoint_reads_the_same(saving: Saving) -> None:
    copy = shutil.copytree(saving.save(7), saving.folder / "elsewhere")
    assert read_checkpoint(copy).state == state(7)
