"""The sources that tests of the structure read."""

from __future__ import annotations

import ast
import gc


def parsed(source: str) -> ast.Module:
    """Returns the syntax tree of a program.

    CPython 3.11 raises SystemError if a garbage collection in the middle of `ast.parse` runs code that parses, too.
    """
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()
