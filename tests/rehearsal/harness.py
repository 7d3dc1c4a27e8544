"""Runs cases in a process of their own for each pair of versions, and collects what they found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.patience import completed
from tests.rehearsal.__main__ import ROOT, environment
from tests.rehearsal.cases import BASE, ROWS, Case, write_model
from tests.rehearsal.versions import Pair

DRIVER = Path(__file__).with_name("drive.py")


@dataclass(frozen=True)
class Outcome:
    """What a case found, or why it failed."""

    found: Any
    error: str | None
    logits: Tensor | None = None

    def result(self) -> Any:
        assert self.error is None, self.error
        return self.found


def run_cases(
    folder: Path,
    engine: str | None,
    megatron: str,
    cases: Mapping[str, dict[str, Any]],
    *,
    plain: bool = False,
    **variables: str,
) -> dict[str, Outcome]:
    """Returns the outcome of each case; see `drive.py` for what a case is. variables: further environment."""
    for number, case in enumerate(cases.values()):
        (folder / f"{number:03d}").mkdir(parents=True)
        (folder / f"{number:03d}" / "case.json").write_text(json.dumps(case))
    variables = environment(engine, megatron, plain=plain) | variables
    what = f"Transformer Engine {engine}, megatron-core {megatron}"
    done = completed([sys.executable, str(DRIVER), str(folder)], what, ROOT, **variables)
    assert done.returncode == 0, done.stdout[-5000:]
    return {name: _outcome(folder / f"{number:03d}") for number, name in enumerate(cases)}


def _outcome(case: Path) -> Outcome:
    error = case / "error.txt"
    if error.exists():
        return Outcome(None, error.read_text()[-5000:])
    logits = case / "logits.pt"
    return Outcome(json.loads((case / "found.json").read_text()), None, torch.load(logits) if logits.exists() else None)


class Models:
    """Writes each model once, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, seed: int = 0) -> str:
        path = self.folder / f"{name}-{seed}"
        if not path.exists():
            write_model(path, name, seed)
        return str(path)


def steps_of(case: Case, models: Models, *, count: int = 3, **actor: Any) -> dict[str, Any]:
    """Returns a case of training steps for `drive.py`."""
    settings = BASE | case.actor | actor
    return {"work": "steps", "model": models(case.model), "actor": settings, "rows": ROWS, "steps": count}


def references(folder: Path, models: Models, names: set[str], megatron: str) -> dict[str, Outcome]:
    """Returns the steps of each model with the local layers, in fp32 on the CPU as what it is."""
    cases = {name: steps_of(Case(name), models, device="cpu", dtype="float32") for name in sorted(names)}
    return run_cases(folder, None, megatron, cases, plain=True)


FIRST, LATER, LOGITS = 5e-3, 2e-2, 2e-2
"""Largest relative differences between bf16 and fp32: of the first gradient norm, of later losses and norms, and of the
logits on average. A token whose two best experts are nearly equal takes the other one in bf16. Counting a shard of the
experts once too often, or too seldom, changes the norm by 1 % and more."""


def assert_alike(outcome: Outcome, expected: Outcome, *, first_only: bool = False) -> None:
    """Compares losses, norms and logits. first_only: only one step was taken, whose logits nothing compares with."""
    found, wanted = outcome.result(), expected.result()
    assert len(found["grad_norms"]) == 1 if first_only else len(found["grad_norms"]) == len(wanted["grad_norms"])
    differences = [abs(a - b) / b for a, b in zip(found["grad_norms"], wanted["grad_norms"], strict=False)]
    assert differences[0] < FIRST and max(differences) < LATER, (found["grad_norms"], wanted["grad_norms"])
    for loss, other in zip(found["losses"], wanted["losses"], strict=False):
        assert abs(loss - other) < LATER * max(abs(other), 0.1), (found["losses"], wanted["losses"])
    if not first_only:
        assert outcome.logits is not None and expected.logits is not None
        assert outcome.logits.shape == expected.logits.shape
        assert (outcome.logits - expected.logits).abs().mean() < LOGITS * expected.logits.abs().mean()


def pair_name(pair: Pair) -> str:
    return f"Transformer Engine {pair[0]}, megatron-core {pair[1]}"
