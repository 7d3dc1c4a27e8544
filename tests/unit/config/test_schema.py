"""Properties of the schema that its readers and the loader rely on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from megatron_rl.config import Config
from megatron_rl.config.fields import Section


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def fields_of(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{section.__name__}.{name}", field
        for inner in sections_in(field.annotation):
            yield from fields_of(inner)


def test_every_key_is_documented():
    undocumented = [
        name
        for name, field in fields_of(Config)
        if not field.description and not any(section.__doc__ for section in sections_in(field.annotation))
    ]
    assert undocumented == []


def test_null_can_mean_unset_everywhere():
    """The loader drops nulls, which would lose an intended None if the default were something else."""
    wrong = [
        name
        for name, field in fields_of(Config)
        if type(None) in get_args(field.annotation) and field.get_default(call_default_factory=True) is not None
    ]
    assert wrong == []


def test_importing_the_configuration_loads_nothing_heavy():
    code = (
        "import sys, megatron_rl.config\n"
        "print([m for m in ('torch', 'ray', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
