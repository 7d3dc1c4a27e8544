"""The program of a sandbox process. It restricts itself irrevocably and then runs the candidate.

    python -I jail.py SCRATCH MEMORY_MB SECONDS MODE PARENT

The module uses the standard library only. SCRATCH holds solution.py, and request.json in the modes `call` and `check`.
Both modes write result.json. The mode `session` reads lines of JSON with a token and code instead, runs all of the code
in one namespace, and answers each line with its token and the JSON text of what the code printed. The kernel enforces
`restrictions` and the list of `system_calls`, whatever the candidate does.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import KeysView, ValuesView
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

if __package__:
    from . import restrictions, system_calls
else:  # as the program of an isolated process, whose path does not have this folder
    sys.path.insert(0, os.path.dirname(__file__))
    import restrictions  # type: ignore[import-not-found,no-redef]
    import system_calls  # type: ignore[import-not-found,no-redef]

    sys.path.pop(0)

LOCKED, CANDIDATE_FAILED, NO_SECCOMP, NO_LANDLOCK = 0, 1, 97, 98
"""Exit codes of the jail. Other exit codes come from the candidate or the kernel."""

LONGEST_ANSWER = 2**16
"""Characters of what one piece of code of a session prints."""
RECURSION = 50_000
"""Python's recursion limit of a candidate. The graders whose data sets are in use set this figure."""
MODULES = (
    *("array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools"),
    *("heapq", "io", "itertools", "json", "math", "operator", "os", "queue", "random", "re", "statistics", "string"),
    *("sys", "time", "typing"),
)
"""Modules that a candidate can use without an import."""
CONTENTS = (
    *("typing", "collections", "itertools", "functools", "heapq", "bisect", "math", "string", "copy", "operator"),
    *("sys", "re", "json", "io"),
)
"""Modules whose public names a candidate can use without an import. If two have the same name, the first counts."""
PARTS = {
    "dataclasses": ("dataclass", "field"),
    "datetime": ("date", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "random": ("choice", "choices", "randint", "randrange", "sample", "seed", "shuffle", "uniform"),
    "statistics": ("mean", "median", "mode"),
}
"""The same for modules that take long to import: only if the candidate mentions one of these names."""


def main() -> None:
    """Applies the restrictions, then runs the candidate in the requested mode."""
    scratch, memory_mb, seconds, mode = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    os.chdir(scratch)
    if not restrictions.die_with(parent=int(sys.argv[5])):
        os._exit(CANDIDATE_FAILED)
    restrictions.limit(memory_mb, seconds)
    landlocked = restrictions.confine_files(scratch)
    restrictions.drop_capabilities()
    if not system_calls.filter_system_calls(restrictions.LIBC):
        os._exit(NO_SECCOMP)
    if mode == "probe":
        os._exit(LOCKED if landlocked else NO_LANDLOCK)
    sys.argv, sys.path[0] = ["solution.py"], str(scratch)
    sys.setrecursionlimit(RECURSION)
    if mode == "session":
        _serve_session()
        return
    source = Path("solution.py").read_text()
    if mode == "run":
        _offer_imports(source)
        _execute("solution.py", source, _module("__main__"))
        return
    request = json.loads(Path("request.json").read_text())
    os.remove("request.json")  # the tests and the token in it are not for the candidate
    before = set(vars(builtins))
    _offer_imports(source + request.get("tests", ""))
    offered = set(vars(builtins)) - before
    namespace = _module("solution")
    _execute("solution.py", source, namespace)
    if mode == "call":
        value = _function(namespace, request["function"])(*request["arguments"])
    else:
        # Tests may use the modules, but not the functions in them: a test of `gcd` needs a `gcd` of the candidate.
        known = {name: value for name, value in vars(builtins).items() if name not in offered or name in MODULES}
        namespace["__builtins__"] = known
        _execute("tests.py", request["tests"], namespace)
        value = request["token"]
    Path("result.json").write_text(json.dumps({"value": value}, default=_as_json))


def _serve_session() -> None:
    """Runs one piece of code after another. Like a notebook, it shows the value of a last line that is an expression,
    and the last line of a traceback.

    An answer begins with the token of its request, by which the caller knows it. The standard files lead nowhere for
    the code, so that code that reads or writes them directly does not disturb the channel of requests and answers.
    """
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    sys.stdin = io.StringIO()
    namespace = _module("__main__")
    for line in requests:
        token, source = json.loads(line)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                _execute_shown(source, namespace)
            except BaseException as error:  # a candidate may raise SystemExit, and the session goes on
                print("".join(traceback.format_exception_only(error)).strip())
        answers.write(f"\n{token} {json.dumps(printed.getvalue()[:LONGEST_ANSWER])}\n")
        answers.flush()


def _execute_shown(source: str, namespace: dict[str, Any]) -> None:
    _offer_imports(source)
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "code.py", "exec", dont_inherit=True), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "code.py", "eval", dont_inherit=True), namespace)
        if value is not None:
            print(repr(value))


def _offer_imports(source: str) -> None:
    """Adds the modules and their contents that `source` mentions to the builtins.

    Programs that a model writes often lack the imports that their judge provides: `List[int]` in a signature, `deque`,
    `math`. As builtins, these names hide neither the candidate's own names nor Python's own `pow`, and a function that
    the tests call must be the candidate's.
    """
    words = set(re.findall(r"\w+", source))
    for name in words & set(MODULES):
        vars(builtins).setdefault(name, import_module(name))
    for module in map(import_module, CONTENTS):
        public: list[str] = getattr(module, "__all__", None) or [name for name in dir(module) if name[0] != "_"]
        for name in words & set(public):
            vars(builtins).setdefault(name, getattr(module, name))
    for module_name, names in PARTS.items():
        for name in words & set(names):
            vars(builtins).setdefault(name, getattr(import_module(module_name), name))


def _module(name: str) -> dict[str, Any]:
    """Returns the namespace of a new module, registered in sys.modules because dataclasses and pickle look there."""
    module = sys.modules[name] = ModuleType(name)
    return module.__dict__


def _execute(file: str, source: str, namespace: dict[str, Any]) -> None:
    exec(compile(source, file, "exec", dont_inherit=True), namespace)


def _function(namespace: dict[str, Any], name: str) -> Any:
    """Returns the function `name`, or the method of that name of a class Solution as in LeetCode problems."""
    if name in namespace:
        return namespace[name]
    if "Solution" in namespace and hasattr(namespace["Solution"], name):
        return getattr(namespace["Solution"](), name)
    raise NameError(f"there is no function {name}")


def _as_json(value: Any) -> Any:
    """Returns sequences as lists, numbers of numpy, fractions and decimals as numbers. Raises TypeError for the rest.

    A set has no order, so it is none of these.
    """
    if isinstance(value, range | deque | KeysView | ValuesView):
        return list(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy, and array.array
        return value.tolist()
    if hasattr(value, "as_integer_ratio"):
        over, under = value.as_integer_ratio()
        return over if under == 1 else over / under
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


if __name__ == "__main__":
    main()
