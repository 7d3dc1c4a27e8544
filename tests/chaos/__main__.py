"""`make chaos`: runs meet random faults, and must end as if they had met none.

    python -m tests.chaos --out runs/chaos --faults 100 --minutes 20 --seed 1

Outcomes are kept in `OUT/outcomes.jsonl`, a line per fault, and those of `--files` in `OUT/files.jsonl`; the same
command later goes on with the next run.
`--summary` writes their table by kind, phase and outcome. As root, runs get small disks and a /dev/shm of their own;
other users miss the faults that need these. A clock that jumps needs libfaketime (Debian: faketime).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.chaos.episode import Episode, Met, rows
from tests.chaos.faults import FAULTS
from tests.chaos.files import play as play_files
from tests.chaos.outcomes import kept, read
from tests.chaos.world import World


def main() -> int:
    options = _options()
    world = World(options.out, engine=options.engine)
    path = options.out / ("files.jsonl" if options.files else "outcomes.jsonl")
    until = time.monotonic() + 60 * options.minutes
    known = read(path)
    number, count = max((row["episode"] for row in known), default=0), 0
    bad: list[Met] = []
    began = time.monotonic()
    while count < options.faults and time.monotonic() < until:
        number += 1
        most = min(options.per_run, options.faults - count)
        if options.files:
            met = play_files(world, options.seed, number, most)
        else:
            met = Episode(world, options.seed, number, most, tuple(options.only)).play(until)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(met))
        count += len(met)
        found = [one for one in met if one.verdict != "equal"]
        bad += found
        print(f"run {number}: {len(met)} faults, {found[0].verdict if found else 'equal'}", flush=True)
    if options.summary:
        options.summary.write_text(json.dumps(kept(options.out), indent=1) + "\n")
    seconds = (time.monotonic() - began) / max(1, count)
    print(
        f"{count} faults, {seconds:.1f} seconds each, {len(bad)} in runs that did not end as the undisturbed one",
        flush=True,
    )
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the runs and outcomes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=50, help="number of faults after which it ends")
    parser.add_argument("--minutes", type=float, default=10.0, help="time after which it begins no other run")
    parser.add_argument("--per-run", type=int, default=20, help="largest number of faults of one run")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "vllm", "sglang", "router"))
    parser.add_argument("--only", nargs="*", default=[], choices=FAULTS, help="kinds of faults")
    parser.add_argument("--files", action="store_true", help="damage files only, and ask their readers, without runs")
    parser.add_argument("--summary", type=Path, help="write the table of all outcomes so far, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
