"""Tests with the real libraries of environments: `make test-environments`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MODULES = Path(__file__).parent / "modules"


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the tests' own environments, whose modules are found, also by the processes of tools."""
    monkeypatch.syspath_prepend(str(MODULES))
    monkeypatch.setenv("PYTHONPATH", f"{MODULES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return MODULES
