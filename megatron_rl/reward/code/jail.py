"""The program of a sandbox process. It restricts itself irrevocably and then runs the candidate.

    python -I jail.py SCRATCH MEMORY_MB SECONDS MODE PARENT

The module uses the standard library only. SCRATCH holds solution.py, and request.json in the modes `call` and `check`.
Both modes write result.json. The mode `session` reads lines of JSON with a token and code instead, runs all of the code
in one namespace, and answers each line with its token and the JSON text of what the code printed. The kernel enforces
these restrictions whatever the candidate does:

- no capabilities, even for root, and no way to regain any
- limits on processor time, address space, file size and open files; no core dumps
- Landlock: read access to Python's own files and SCRATCH, write access to SCRATCH only
- seccomp: no sockets, no new processes or programs, no signals to other processes, no tracing, no namespaces
- the process dies with its parent
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import io
import json
import os
import platform
import re
import resource
import signal
import struct
import sys
import traceback
from collections import deque
from collections.abc import KeysView, ValuesView
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

LOCKED, CANDIDATE_FAILED, NO_SECCOMP, NO_LANDLOCK = 0, 1, 97, 98
"""Exit codes of the jail. Other exit codes come from the candidate or the kernel."""

LARGEST_FILE = 16 * 2**20
OPEN_FILES = 64
LONGEST_ANSWER = 2**16
"""Characters of what one piece of code of a session prints."""
RECURSION = 50_000
"""Python's recursion limit of a candidate. The graders whose data sets are in use set this figure."""
STACK = 128 * 2**20
"""Most bytes of the main thread's stack, which is part of the address space. Linux keeps this room free. Recursion
through C, as in a function under lru_cache or a key of sorted, takes up to 2.5 KB a level in CPython 3.11."""
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
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Applies the restrictions, then runs the candidate in the requested mode."""
    scratch, memory_mb, seconds, mode = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    os.chdir(scratch)
    _die_with(parent=int(sys.argv[5]))
    _limit(memory_mb, seconds)
    landlocked = _landlock([scratch])
    _drop_capabilities()
    if not _seccomp():
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


def _die_with(parent: int) -> None:
    _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(CANDIDATE_FAILED)


def _limit(memory_mb: int, seconds: float) -> None:
    memory, processor = memory_mb * 2**20, int(seconds) + 1
    most_stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK if most_stack == resource.RLIM_INFINITY else min(STACK, most_stack)
    for what, most in (
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_STACK, stack),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _drop_capabilities() -> None:
    _LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _LIBC.capset(header, struct.pack("<6I", *[0] * 6))


# Landlock (linux/landlock.h). Its three system calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_DIRECTORY_ONLY = _READ_DIR | ((1 << 14) - 1) & ~((1 << 4) - 1)


def _landlock(writable: list[Path]) -> bool:
    """Restricts file access. Returns whether the kernel accepted the ruleset."""
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = _RIGHTS_BY_VERSION[min(version, 3)]
    attributes = ctypes.create_string_buffer(struct.pack("<Q", rights), 8)
    ruleset = _LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    readable |= {"/dev/urandom", "/dev/null", "/dev/zero", "/etc/localtime"}
    for path in map(Path, sorted(readable)):
        _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
    _allow(ruleset, Path("/dev/null"), 1 << 1)
    for path in writable:
        _allow(ruleset, path, rights)
    _LIBC.prctl(38, 1, 0, 0, 0)
    taken: int = _LIBC.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return taken == 0


def _allow(ruleset: int, path: Path, rights: int) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        rights &= ~_DIRECTORY_ONLY
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, handle), 12)
    _LIBC.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    os.close(handle)


# seccomp (linux/seccomp.h, linux/filter.h): a classic BPF program that the kernel runs for every system call.
# The table gives the audit architecture and the call numbers per machine: x86_64 from
# arch/x86/entry/syscalls/syscall_64.tbl, aarch64 from include/uapi/asm-generic/unistd.h. The latter is untested.
_ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "unshare": 272, "setns": 308, "bpf": 321, "keyctl": 250, "add_key": 248,
        "request_key": 249, "perf_event_open": 298, "io_uring_setup": 425, "userfaultfd": 323, "pidfd_open": 434,
        "pidfd_getfd": 438, "pidfd_send_signal": 424, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "tkill": 200,
        "shmget": 29, "semget": 64, "msgget": 68, "mount": 165, "setpriority": 141, "sched_setaffinity": 203,
        "clone": 56, "clone3": 435, "kill": 62, "tgkill": 234, "prlimit64": 302,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "execve": 221, "execveat": 281, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "unshare": 97, "setns": 268, "bpf": 280, "keyctl": 219, "add_key": 217,
        "request_key": 218, "perf_event_open": 241, "io_uring_setup": 425, "userfaultfd": 282, "pidfd_open": 434,
        "pidfd_getfd": 438, "pidfd_send_signal": 424, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "tkill": 130,
        "shmget": 194, "semget": 190, "msgget": 186, "mount": 40, "setpriority": 140, "sched_setaffinity": 122,
        "clone": 220, "clone3": 435, "kill": 129, "tgkill": 131, "prlimit64": 261,
    }),
}  # fmt: skip
_SPECIAL = ("clone", "clone3", "kill", "tgkill", "prlimit64")
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _NO_SUCH_CALL = 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x00010000


def _seccomp() -> bool:
    """Restricts system calls. Returns whether the kernel accepted the filter."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    architecture, numbers = _ARCHITECTURES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER, 0, 1, 0x40000000),  # x32 has the same calls under other numbers
        (_RETURN, 0, 0, _KILL),
    ]
    for name, number in numbers.items():
        if name not in _SPECIAL:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOT_PERMITTED)]
    # Without clone3, glibc falls back to clone, whose flags the filter can read: threads may start, processes may not.
    program += [(_JUMP_EQUAL, 0, 1, numbers["clone3"]), (_RETURN, 0, 0, _NO_SUCH_CALL)]
    program += _when(numbers["clone"], (_JUMP_SET, 0, 1, _CLONE_THREAD))
    for name in ("kill", "tgkill"):
        program += _when(numbers[name], (_JUMP_EQUAL, 0, 1, os.getpid()))
    program += _when(numbers["prlimit64"], (_JUMP_EQUAL, 0, 1, 0))
    program.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    pointer = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    taken: int = _LIBC.prctl(22, 2, pointer, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return taken == 0


def _when(number: int, allowed: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """Returns the instructions that permit one system call only if its first argument passes the test."""
    test = (allowed[0], 0, 1, allowed[3])
    return [
        (_JUMP_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        test,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOT_PERMITTED),
    ]


if __name__ == "__main__":
    main()
