"""The choice of a run's view of its progress."""

from __future__ import annotations

import sys
from typing import Literal

from rich.console import Console

from .live_view import LiveView
from .view import PlainView, View

Kind = Literal["auto", "live", "plain", "off"]


def make_view(kind: Kind, total_steps: int, title: str) -> View:
    """Returns the view for a run.

    `auto` is the live view if standard output is a terminal that can move its cursor, and the plain view otherwise.
    """
    console = Console()
    if kind == "off":
        return View()
    if kind == "live" or (kind == "auto" and sys.stdout.isatty() and not console.is_dumb_terminal):
        return LiveView(total_steps, title, console)
    return PlainView(total_steps, title)
