"""Draws the view of a finished demonstration as it stands in the terminal, for the README.

python benchmarks/quickstart_picture.py runs/quickstart-... [--out docs/quickstart.svg]
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.quickstart.comparison import conclusion, last_problems, outcomes, table
from examples.quickstart.demonstration import CONFIG, watched
from examples.quickstart.progress import Progress
from megatron_rl.config import load_config

FONT = re.compile(r"@font-face \{[^}]*\}")
"""rich names a font on a server. Without it a browser takes a monospaced font of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/quickstart.svg"))
    options = parser.parse_args()
    console = Console(record=True, width=110, force_terminal=True, file=io.StringIO())
    runs = watched(options.folder, load_config(CONFIG, []).train.steps)
    for run in runs.values():
        run.read()
    folders = {method: run.folder for method, run in runs.items()}
    found = outcomes(folders)
    progress = Progress(list(runs.values()), console)
    begun = (options.folder / "grpo" / "config.yaml").stat().st_mtime  # written at the start of a run
    progress.start = time.monotonic() - (max(row["time"] for run in runs.values() for row in run.rows) - begun)
    console.print(progress.render())
    console.print(table(found))
    console.print("\n" + conclusion(found, len(last_problems(folders["grpo"]))), highlight=False)
    options.out.write_text(FONT.sub("", console.export_svg(title="make quickstart", unique_id="quickstart")))
    print(options.out)


if __name__ == "__main__":
    main()
