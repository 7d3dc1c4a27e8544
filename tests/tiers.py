"""Two tiers of tests: `make test` leaves out what is marked `slow`, `make test-all` runs all.

Most slow tests are further cases of what a quick one proves: another layout, another shape, another loss formula.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

slow = pytest.mark.slow
"""Only in `make test-all`."""


def quick_of(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Returns the cases for `parametrize`; those that are not among the quick ones are marked `slow`.

    A case of several values counts as quick by its last value. Raises KeyError if a quick one is not a case.
    """
    cases = list(cases)
    key = {id(case): case[-1] if isinstance(case, tuple) else case for case in cases}
    if unknown := set(quick) - set(key.values()):
        raise KeyError(f"not among the cases: {sorted(map(str, unknown))}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if key[id(case)] in quick else slow)
        for case in cases
    ]


def chosen(request: pytest.FixtureRequest, name: str) -> set[Any]:
    """Returns the values that the parameter `name` has in the selected tests of the requesting file.

    A module's fixture prepares just these, so that `-m "not slow"` and `-k` spare the work itself.
    """
    return {
        item.callspec.params[name]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec") and name in item.callspec.params
    }


def examples(most: int) -> settings:
    """Returns hypothesis settings with the profile's number of examples, but no more than `most`."""
    return settings(max_examples=min(most, settings.default.max_examples))


def fewer_examples(divisor: int) -> settings:
    """Returns hypothesis settings with a part of the profile's examples, for a test that has many parameters."""
    return settings(max_examples=max(1, settings.default.max_examples // divisor))
