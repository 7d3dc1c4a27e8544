"""Draws the view of a finished demonstration as a moving picture, for the README.

    python tools/quickstart_picture.py runs/quickstart-... [--out docs/quickstart.svg]

Every frame is what the terminal showed at that time, from the logs of both runs; the last one has the conclusion. A
reader whose system asks for less motion sees the last frame only.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, RenderableType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.quickstart.comparison import conclusion, last_problems, outcomes, table
from examples.quickstart.demonstration import CONFIG, watched
from examples.quickstart.progress import Progress, Watched
from megatron_rl.config import load_config

FRAMES, FRAME_SECONDS, LAST_SECONDS = 20, 0.4, 8.0
WIDTH = 110
FONT = re.compile(r"@font-face \{[^}]*\}")
"""rich names a font on a server. Without it a browser takes a monospaced font of its own."""
STYLE = """
.frame {{ visibility: hidden; animation: frame {total}s step-end infinite; }}
.last {{ animation-name: last; }}
@keyframes frame {{ 0% {{ visibility: visible; }} {share}% {{ visibility: hidden; }} }}
@keyframes last {{ 0% {{ visibility: visible; }} {last}% {{ visibility: hidden; }} }}
@media (prefers-reduced-motion: reduce) {{
  .frame {{ animation: none; }}
  .last {{ visibility: visible; }}
}}
"""


def drawn(parts: list[RenderableType], name: str, lines: int = 0) -> tuple[str, int]:
    """Returns a terminal with these parts as SVG, filled up to a number of lines, and the number of its lines."""
    console = Console(record=True, width=WIDTH, force_terminal=True, file=(shown := io.StringIO()))
    for part in parts:
        console.print(part, highlight=False)
    printed = shown.getvalue().count("\n")
    for _ in range(lines - printed):
        console.print()
    return FONT.sub("", console.export_svg(title="make quickstart", unique_id=name)), printed


def frames(runs: list[Watched], begun: float) -> Iterator[RenderableType]:
    """Yields the view at equally spaced times from the first step to the end."""
    rows = {run.label: run.rows for run in runs}
    times = sorted(row["time"] for each in rows.values() for row in each)
    first = max(min(row["time"] for row in each if row["step"] > 0) for each in rows.values())
    for index in range(FRAMES):
        now = first + (times[-1] - first) * index / (FRAMES - 1)
        for run in runs:
            run.rows = [row for row in rows[run.label] if row["time"] <= now]
        progress = Progress(runs, Console(width=WIDTH, file=io.StringIO()))
        progress.start = time.monotonic() - (now - begun)
        yield progress.render()


def animated(pictures: list[str]) -> str:
    """Returns one SVG that shows the pictures one after the other, the last one for longer."""
    total = FRAME_SECONDS * (len(pictures) - 1) + LAST_SECONDS
    style = STYLE.format(
        total=total, share=round(100 * FRAME_SECONDS / total, 3), last=round(100 * LAST_SECONDS / total, 3)
    )
    box = re.search(r'viewBox="([^"]*)"', pictures[-1])
    assert box
    assert all(f'viewBox="{box[1]}"' in picture for picture in pictures), "frames of different sizes"
    shown = [
        f'<g class="frame{" last" if picture is pictures[-1] else ""}" '
        f'style="animation-delay: {round(index * FRAME_SECONDS, 3)}s">{picture}</g>'
        for index, picture in enumerate(pictures)
    ]
    head = f'<svg viewBox="{box[1]}" xmlns="http://www.w3.org/2000/svg"><style>{style}</style>'
    return "\n".join([head, *shown, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/quickstart.svg"))
    options = parser.parse_args()
    runs = watched(options.folder, load_config(CONFIG, []).train.steps)
    for run in runs.values():
        run.read()
    folders = {method: run.folder for method, run in runs.items()}
    found = outcomes(folders)
    begun = (options.folder / "grpo" / "config.yaml").stat().st_mtime  # written at the start of a run
    views = list(frames(list(runs.values()), begun))
    words = "\n" + conclusion(found, len(last_problems(folders["grpo"])))
    last, lines = drawn([views[-1], table(found), words], "last")
    pictures = [drawn([view], f"at{index}", lines)[0] for index, view in enumerate(views)]
    options.out.write_text(animated([*pictures, last]))
    print(options.out)


if __name__ == "__main__":
    main()
