"""Runs the cases of one pair of versions in one process, whose ranks are forked from it: imports take place once.

Run as: drive.py FOLDER. Every folder in FOLDER that has a case.json is a case: {"work": name in `works.WORKS`,
"actor": settings, ...}. A case that fails leaves its traceback in error.txt, and the others go on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException

from megatron_rl.config.actor import ActorSettings
from tests.rehearsal.works import WORKS


def main(folder: Path) -> None:
    import megatron.core.extensions.transformer_engine  # noqa: F401 (it can be imported without Transformer Engine)

    torch.set_num_threads(1)
    for case in sorted(path.parent for path in folder.glob("*/case.json")):
        settings = json.loads((case / "case.json").read_text())
        ranks = ActorSettings.model_validate(settings["actor"]).world_size
        print(f"{case.name}: {ranks} ranks", flush=True)
        try:
            torch.multiprocessing.start_processes(WORKS[settings["work"]], (case,), ranks, start_method="fork")
        except ProcessException as error:
            (case / "error.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
