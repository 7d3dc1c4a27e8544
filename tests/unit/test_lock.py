"""The lock with hashes covers every pin but those that differ by machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tools.lock import hashes_of, lock_text, locked_pins

REPOSITORY = Path(__file__).parents[2]


def test_the_lock_is_that_of_the_pins() -> None:
    pins = locked_pins((REPOSITORY / "constraints-cpu.txt").read_text())
    lines = [line for line in (REPOSITORY / "constraints-cpu.lock").read_text().splitlines() if line[0] != "#"]
    assert [line.split()[0] for line in lines] == pins, "python -m tools.lock writes it anew"
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_packages_with_builds_of_their_own_are_left_out() -> None:
    assert locked_pins("# a\ntorch==2\ntorchdata==1\nnvidia-nccl-cu12==3\n\nYarl==4  # why\n") == [
        "torchdata==1",
        "Yarl==4",
    ]


def test_a_file_without_a_hash_is_an_error() -> None:
    item: dict[str, Any] = {"metadata": {"name": "Some_Package"}, "download_info": {"archive_info": {}}}
    with pytest.raises(ValueError, match="Some_Package: the index gives no SHA-256"):
        hashes_of({"install": [item]})
    item["download_info"] = {"archive_info": {"hashes": {"sha256": "ab"}}}
    hashes = hashes_of({"install": [item]})
    assert lock_text("pins.txt", ["some.package==1"], hashes).endswith("\nsome.package==1 --hash=sha256:ab\n")
