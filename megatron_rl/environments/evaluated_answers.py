r"""Answers that scorers of reasoning-gym 0.1.25 hand to Python's `eval`, or to sympy's `parse_expr`, which calls it.

The policy writes these answers. A program would run with all rights of the reward worker, and could read the right
answer from the scorer's own variables. This file tells programs from answers.
"""

from __future__ import annotations

import ast
import re

BY_EVAL = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Tasks whose answer may be written as a Python list."""
BY_SYMPY = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
"""Tasks whose answer is a formula."""
NAMES = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs", "Rational", "Integral", "pi"),
)
"""Names of two letters or more that a formula may have. One letter is a variable, and no function of Python."""
_NAME = re.compile(r"[^\W\d]\w+")
_SIGN = re.compile(r"""['"\[\]{}_@;#\\]|\.\s*[^\W\d]""")
"""Signs that no formula has: those of texts, subscripts, private names, comments and attributes."""


def is_program(task: str, answer: str) -> bool:
    """Whether the task's scorer would run the answer as something else than a literal, a single name or a formula."""
    if task in BY_EVAL:
        return not _is_plain(answer.strip())
    return task in BY_SYMPY and bool(_SIGN.search(answer) or set(_NAME.findall(answer)) - set(NAMES))


def _is_plain(answer: str) -> bool:
    """Whether `eval` raises a SyntaxError, reads a literal, or looks up one name."""
    try:
        tree = ast.parse(answer, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    try:
        ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return isinstance(tree, ast.Name)
    return True
