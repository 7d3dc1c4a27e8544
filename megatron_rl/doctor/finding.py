"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table."""

    check: str
    state: State
    found: str
    remedy: str = ""
    """What to do about a failure or a warning; why a check was skipped."""


def judged(check: str, good: bool, found: str, remedy: str, *, otherwise: State = "failure") -> Finding:
    """ok, or what is wrong and what to do about it."""
    return Finding(check, "ok", found) if good else Finding(check, otherwise, found, remedy)
