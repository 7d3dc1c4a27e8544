"""Writes the hashes of the pinned dependencies, so that pip refuses a package that is not the one that was tested.

    python -m tools.lock constraints-cpu.txt --out constraints-cpu.lock
    python -m pip install torch==...              # whose builds differ by machine: from the index of your choice
    python -m pip install --no-deps --require-hashes -r constraints-cpu.lock

pip itself finds the packages and their hashes, in the index that it is set to. The lock holds for the Python, the
system and the machine on which the command runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OTHERS = re.compile(r"^(torch|triton|nvidia-.*|setuptools|wheel|pip)==")
"""Packages that the lock leaves out: those whose builds differ by machine, and those of the environment itself."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.lock", description=__doc__.splitlines()[0])
    parser.add_argument("pins", type=Path, help="a file of lines name==version")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pins = locked_pins(options.pins.read_text())
    options.out.write_text(lock_text(options.pins.name, pins, hashes_of(report_of(pins))))


def locked_pins(text: str) -> list[str]:
    """Returns the `name==version` lines of a pins file that the lock covers."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not OTHERS.match(line)]


def report_of(pins: Sequence[str]) -> Mapping[str, Any]:
    """Asks pip what it would install; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
    command += ["--ignore-installed", "--no-deps", "--report", "-", *pins]
    found: Mapping[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def hashes_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> SHA-256 of the file that pip would install. Raises ValueError for a file without one."""
    found = {}
    for item in report["install"]:
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            raise ValueError(f"{item['metadata']['name']}: the index gives no SHA-256 for it")
        found[_name(item["metadata"]["name"])] = digest
    return found


def lock_text(source: str, pins: Sequence[str], hashes: Mapping[str, str]) -> str:
    """Returns the lock. Raises KeyError for a pin without a hash."""
    machine = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.system()} {platform.machine()}"
    head = f"# SHA-256 of the files that pip takes for {source}, for {machine}; written by tools/lock.py.\n"
    return head + "".join(f"{pin} --hash=sha256:{hashes[_name(pin.split('==')[0])]}\n" for pin in pins)


def _name(name: str) -> str:
    """The name as indexes normalise it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
