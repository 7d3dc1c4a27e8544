"""Makes the pictures of README and docs from runs, in the Chromium of this machine.

    python tools/pictures.py runs/quickstart-.../lp_reg --compared runs/rarity-{grpo,dppo,dppo-lp_reg,lp_reg}

writes docs/report.png (the head of the run's report), and with compared runs docs/rarity.png (what their losses do to
rare tokens; `benchmarks/rarity.py` makes such runs) and docs/runs.png (the start page of `megatron-rl view` for their
folder).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.observability.report import write_report
from megatron_rl.observability.serve import start_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1200, 1330


def take(page: Any, html: Path, picture: str, selector: str | None = None) -> None:
    """Writes a picture of the top of a page, or of one of its elements."""
    page.goto(html.resolve().as_uri())
    page.wait_for_timeout(500)  # the charts are drawn
    shot = page.locator(selector).first if selector else page
    shot.screenshot(path=DOCS / picture)
    print(DOCS / picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--compared", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": WIDTH, "height": HEIGHT}
        )
        take(page, write_report(options.run, Path(folder) / "one.html"), "report.png")
        if options.compared:
            several = write_report(options.compared, Path(folder) / "several.html")
            take(page, several, "rarity.png", "figure:has(#figure0)")
            runs, among = Path(folder) / "runs.html", options.compared[0].parent
            runs.write_text(start_page(among).replace(str(among), "runs"), encoding="utf-8")
            page.set_viewport_size({"width": WIDTH, "height": 420})
            take(page, runs, "runs.png")


if __name__ == "__main__":
    main()
