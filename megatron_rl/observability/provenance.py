"""What a run was made from: version, commit, packages, hosts, command line, and checksums of data and model.

`provenance.jsonl` in the run's folder has one line per start of the run, so that a resume by other code shows.
"""

from __future__ import annotations

import json
import platform
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl import __version__
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import file_sha256
from megatron_rl.observability.metrics import LATEST, LONGEST_LINE
from megatron_rl.utils.bounded import parse_json, read_lines
from megatron_rl.utils.files import atomically

if TYPE_CHECKING:
    from megatron_rl.config import Config

FILE_NAME = "provenance.jsonl"
PACKAGES = ("torch", "megatron-core", "transformers", "ray", "numpy", "sglang", "vllm", "transformer-engine")
"""Packages whose versions matter to a result; those that are not installed are left out."""
Start = dict[str, Any]


class Provenance:
    """Records this start of a run at once, and the checksums as soon as they are known, from a thread of its own."""

    def __init__(self, config: Config) -> None:
        self._path = config.run.folder / FILE_NAME
        self._lock = threading.Lock()
        self._before = read_provenance(config.run.folder)
        self.start: Start = {
            "time": round(time.time(), 3),
            "version": __version__,
            "commit": commit(Path(__file__)),
            "python": platform.python_version(),
            "packages": packages(),
            "host": socket.gethostname(),
            "hosts": [],
            "command": shlex.join(sys.argv),
            "seed": config.seed,
            "sha256": None,
        }
        self._write()
        files = [config.data.train, *(suite.data for suite in config.evaluation.suites.values())]
        self._thread = threading.Thread(target=self._hash, args=(files, config.model.path), daemon=True)
        self._thread.start()

    def ran_on(self, hosts: Sequence[str]) -> None:
        """Adds the machines of the run's processes."""
        self.start["hosts"] = list(hosts)
        self._write()

    def finish(self) -> Start:
        """Waits for the checksums, and returns the record."""
        self._thread.join()
        return self.start

    def _hash(self, files: Sequence[Path], model: Path) -> None:
        weights = sorted(path for path in model.glob("*") if path.suffix in (".json", ".safetensors", ".model", ".txt"))
        named = [path for path in [*files, *weights] if path.is_file()]
        self.start["sha256"] = {str(path): file_sha256(path) for path in dict.fromkeys(named)}
        self._write()

    def _write(self) -> None:
        with self._lock:
            lines = [json.dumps(start) + "\n" for start in (*self._before, self.start)]
            with atomically(self._path) as partial:
                partial.write_text("".join(lines), encoding="utf-8")


def read_provenance(folder: Path) -> list[Start]:
    """Returns the starts of a run, in order; empty for a run of an earlier version."""
    path = folder / FILE_NAME
    lines = read_lines(path, LONGEST_LINE) if path.exists() else []
    return [_checked(parse_json(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines]


def _checked(start: Any, where: str) -> Start:
    """Raises UserError unless a reader finds what `in_words` shows."""
    kinds = {"version": str, "command": str, "host": str, "python": str, "hosts": list, "packages": dict}
    known = isinstance(start, dict) and all(isinstance(start.get(name), kind) for name, kind in kinds.items())
    moment = start.get("time") if known else None
    hashes = start.get("sha256") if known else None
    if not isinstance(moment, int | float) or not 0 <= moment <= LATEST or not isinstance(hashes, dict | None):
        raise UserError(f"{where}: not the start of a run. Move the file away and try again.")
    return dict(start) | {"hosts": [str(host) for host in start["hosts"]], "commit": start.get("commit")}


def write_beside_export(start: Mapping[str, Any], export: Path) -> None:
    """Writes the record into the folder of an exported model."""
    with atomically(export / "provenance.json") as partial:
        partial.write_text(json.dumps(start, indent=1) + "\n", encoding="utf-8")


def in_words(starts: Sequence[Start]) -> list[tuple[str, str]]:
    """Returns name and value of what the last start recorded."""
    if not starts:
        return []
    last = starts[-1]
    when = datetime.fromtimestamp(last["time"]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    versions = {start["version"] + str(start["commit"]) for start in starts}
    facts = [
        ("Started", when if len(starts) == 1 else f"{when}, start {len(starts)} of this run"),
        ("Version", f"{last['version']}, {last['commit'] or 'not from a Git checkout'}"),
        ("Command", last["command"]),
        ("Driver's host", last["host"]),
        ("Hosts", ", ".join(last["hosts"])),
        ("Python", last["python"]),
        ("Packages", ", ".join(f"{name} {number}" for name, number in last["packages"].items())),
    ]
    if len(versions) > 1:
        facts.append(("Note", "earlier starts of this run were made by other versions"))
    known = last["sha256"]
    rows = [(f"SHA-256 of {Path(path).name}", digest) for path, digest in known.items()] if known else []
    facts = [(name, value) for name, value in facts if value]
    return facts + (rows or [("SHA-256", "not computed yet")])


def commit(file: Path) -> str | None:
    """Returns the commit of the Git checkout that `file` belongs to, with a note if files differ from it.

    None if no checkout tracks the file: an installed package may lie inside the checkout of something else.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        found = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"commit {found}" + (" with changes" if changed else "")


def packages() -> dict[str, str]:
    """Returns the versions of the installed packages of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
