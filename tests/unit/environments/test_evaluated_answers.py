"""Answers that a scorer of reasoning-gym would run as programs. Neither reasoning-gym nor sympy is needed here."""

from __future__ import annotations

import pytest

from megatron_rl.environments.evaluated_answers import BY_EVAL, BY_SYMPY, is_program

PLAIN = (
    "1 2 3\n4 5 6",
    "[[0, 1], [1, 0]]",
    "['A', 'B']",
    "ABCD",
    "_ Q _\nQ _ _",
    "-1",
    "",
    "no idea",
    "('x',) * (",
    "5 6",
)
FORMULAS = (
    "2*x**3 - x + C",
    "(1 + 3) * 8 - 8",
    "-3*exp(2*x)/2 + sin(x)*cos(x) + C",
    "x (x + 1)",
    "0.5*x",
    "24 = 24",
    "log( x )",
    "",
)
PROGRAMS = ("__import__('os').system('true')", "open('secret')", "entry['answer']", "exec(chr(49))", "().__class__")


@pytest.mark.parametrize("task", BY_EVAL)
def test_lists_words_and_other_texts_are_no_programs(task: str) -> None:
    assert [text for text in PLAIN if is_program(task, text)] == []
    more = (
        "[print(1)]",
        "answer.upper()",
        "oracle_answer[0]",
        "lambda: 0",
        "[x for x in entry]",
        "f'{entry}'",
        " id(1)",
    )
    assert [text for text in (*PROGRAMS, *more) if not is_program(task, text)] == []


@pytest.mark.parametrize("task", BY_SYMPY)
def test_formulas_are_no_programs(task: str) -> None:
    assert [text for text in FORMULAS if is_program(task, text)] == []
    more = (
        "x.func",
        "x . func",
        "x.\\\nfunc",
        "(x.#\nfunc)",
        "print(1)",
        "(exec)((chr)(49))",
        "exit",
        "ord(x)!",
        "\uff49d(x)",
    )
    assert [text for text in (*PROGRAMS, *more) if not is_program(task, text)] == []


def test_other_tasks_read_any_text() -> None:
    assert not any(is_program("chain_sum", text) for text in PROGRAMS)
