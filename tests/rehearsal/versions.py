"""The versions that the rehearsal runs, and where they are installed.

`python -m tests.rehearsal.versions` prints one line per version, "folder requirement", for the Makefile. Standard
library only.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

ENGINES = ("2.4.0", "2.12.0", "2.20.2")
"""Versions of Transformer Engine: the oldest, one before and one after 2.13, which changed the marks of experts."""
MEGATRONS = ("0.16.1", "0.18.2", "0.19.2")
"""Versions of megatron-core: the oldest and newest release lines, and one between."""
Pair = tuple[str, str]
"""A version of Transformer Engine and one of megatron-core."""
PAIRS: tuple[Pair, ...] = tuple(product(ENGINES, MEGATRONS))
NEWEST: Pair = PAIRS[-1]
"""Every layout and method runs on this pair."""


def folder_of(package: str, version: str) -> Path:
    """Returns the folder of a package that exists in several versions, within this Python's environment."""
    return Path(sys.prefix) / "versions" / f"{package}-{version}"


def main() -> None:
    for package, versions in (("transformer-engine", ENGINES), ("megatron-core", MEGATRONS)):
        for version in versions:
            print(folder_of(package, version), f"{package}=={version}")


if __name__ == "__main__":
    main()
