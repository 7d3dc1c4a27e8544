"""The signature of a reward of the user's own: one `Sample`. Those of other trainers are recognised and refused."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_rl.errors import UserError

_OURS = """\
    def score(sample):  # megatron_rl.types.Sample
        return 1.0 if sample.text.strip() == sample.prompt.label else 0.0"""

_TRLS = """\
    def score(sample):  # megatron_rl.types.Sample
        return {name}(prompts=[sample.prompt.text], completions=[sample.text], answer=[sample.prompt.label])[0]

Rename `answer` to the argument that receives the label. For a function that reads `completion[0]["content"]`, give
`completions=[[{{"role": "assistant", "content": sample.text}}]]`. Other columns are in `sample.prompt.metadata`."""

_VERLS = """\
    def score(sample):  # megatron_rl.types.Sample
        return {name}(data_source="", solution_str=sample.text, ground_truth=sample.prompt.label)"""

_OTHERS = {"completions": ("TRL", _TRLS), "solution_str": ("verl", _VERLS)}
"""An argument's name -> the trainer whose rewards have it, and a reward that calls such a function."""


def check_signature(function: Any, path: str) -> None:
    """Raises UserError, with a reward that would work, unless `function` can be called with one sample."""
    problem, example = _problem(function)
    if problem:
        name = path.rpartition(":")[2]
        raise UserError(
            f"reward.name={path!r}: {problem}. A reward takes one sample and returns its score. Write one, and name "
            f"it in reward.name:\n\n{example.format(name=name)}"
        )


def _problem(function: Any) -> tuple[str | None, str]:
    """Returns what is wrong, or None, and an example of a reward."""
    if inspect.isclass(function):
        return "it is a class, not a function; an instance in the module can be a reward", _OURS
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        return "it is an async function", _OURS
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions in C have none; the trial call shows whether they work
        return None, _OURS
    for argument, (trainer, example) in _OTHERS.items():
        if argument in signature.parameters:
            return f"it has the signature of {trainer}'s rewards, {signature}", example
    try:
        signature.bind(None)
    except TypeError:
        return f"it has the signature {signature}, and cannot be called with one argument", _OURS
    return None, _OURS
