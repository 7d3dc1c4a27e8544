"""Description of the machine that a result was measured on, and writing of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Returns processor, memory, versions and commit for a results file."""
    import torch  # imported late, so that drivers of benchmarks start without it

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip(),
        "niceness": os.nice(0),
    }


def keep(out: Path | None, benchmark: str, **found: Any) -> None:
    """Writes the results and a description of the machine as JSON; does nothing if `out` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    out.write_text(json.dumps(kept | {"load_average": os.getloadavg()} | found, indent=1) + "\n")


def kept_before(out: Path | None, name: str) -> Any:
    """Returns what an earlier call wrote to the results file under a name; None without such a file."""
    return json.loads(out.read_text())[name] if out is not None and out.is_file() else None


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the option `--out`, which all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="where to write the results as JSON")
    return parser
