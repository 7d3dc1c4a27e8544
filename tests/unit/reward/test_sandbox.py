"""The sandbox of the code reward: attempts to leave it fail, ordinary programs run, and nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.reward import CodeSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardPool
from megatron_rl.reward.code import CodeReward, jail, restrictions, system_calls
from megatron_rl.reward.code.sandbox import Sandbox, _result, check_sandbox, invocation
from megatron_rl.types import Sample
from megatron_rl.utils.files import remove_tree
from tests.tiers import quick_of, slow
from tests.unit.reward.attacks import DRIVER, ORDINARY, PREAMBLE, PRIVILEGED

MakeSample = Callable[..., Sample]
REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
SETTINGS = CodeSettings(test_seconds=300.0, memory_mb=512)
IMPATIENT = CodeSettings(test_seconds=1.0)
PRINTS_7 = {"inputs": [""], "outputs": ["7"]}
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the attempts are system calls of x86_64")


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the attempts are aimed at: a process, files, sockets and memory of this user."""
    folder = Path(tempfile.mkdtemp(prefix="victims-"))
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to(folder / "secret")
    stream, names = str(folder / "socket"), f"\0megatron-rl-{os.getpid()}"
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=folder) as process,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract,
    ):
        server.bind(stream)
        server.listen()
        abstract.bind(names)
        segment = restrictions.LIBC.syscall(29, 0, 4096, 0o1600)
        yield {
            "folder": str(folder),
            "secret": str(folder / "secret"),
            "link": str(folder / "link"),
            "target": str(folder / "target"),
            "victim": process.pid,
            "port": tcp.getsockname()[1],
            "stream": stream,
            "abstract": names,
            "segment": segment,
        }
        restrictions.LIBC.syscall(31, segment, 0, None)  # IPC_RMID
        process.kill()
    remove_tree(folder)


@pytest.fixture(scope="module")
def inside(victims: dict[str, Any]) -> dict[str, Any]:
    """How each attempt ends in the sandbox."""
    given = json.dumps({"attempts": PRIVILEGED | ORDINARY, "victims": victims})
    with Sandbox(SETTINGS, PREAMBLE + DRIVER) as sandbox:
        done = sandbox.run("run", stdin=given)
    assert done.failure is None
    assert sorted(path.name for path in Path(victims["folder"]).iterdir()) == ["link", "secret", "socket"]
    assert psutil.Process(victims["victim"]).nice() == psutil.Process().nice()
    assert Path(victims["secret"]).read_text() == "secret"
    return dict(json.loads(done.output))


@pytest.mark.parametrize("name", ORDINARY | PRIVILEGED)
def test_the_sandbox_refuses(inside: dict[str, Any], name: str) -> None:
    assert inside[name] in REFUSED, inside[name]


@pytest.fixture(scope="module")
def outside(victims: dict[str, Any], inside: dict[str, Any]) -> dict[str, Any]:
    """How each attempt ends in a process without the sandbox."""
    given = json.dumps({"attempts": ORDINARY, "victims": victims})
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + DRIVER], input=given, capture_output=True, text=True, cwd=folder
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", ORDINARY)
def test_an_attempt_works_without_the_sandbox(outside: dict[str, Any], name: str) -> None:
    """A refusal in the sandbox is therefore the sandbox's own. The machine itself may lack or forbid a facility."""
    assert outside[name] == "done" or outside[name] in (*REFUSED, errno.EOPNOTSUPP, errno.EAFNOSUPPORT)


def test_most_attempts_work_without_the_sandbox(outside: dict[str, Any]) -> None:
    assert sum(end == "done" for end in outside.values()) >= 0.8 * len(ORDINARY), outside


def scored(settings: CodeSettings, make_sample: MakeSample, source: str, label: Any = PRINTS_7) -> tuple[Any, ...]:
    verifier = CodeReward(RewardSettings(name="code", code=settings))
    result = verifier(make_sample(f"```python\n{textwrap.dedent(source)}\n```", label))
    return result.score, result.outcome, result.detail


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
        ("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)", "killed by SIGSYS"),
        ("print('\ud800')", "UnicodeDecodeError"),
        ("import os\nfor _ in range(4000): os.mkdir('a'); os.chdir('a')", "wrong output"),
        ("import os; os.mkdir('a', 0); os.mkdir('b', 0o300); open('b/c', 'w'); os.mkdir('b/d', 0)", "wrong output"),
        ("import os; os.umask(0o777); os.mkdir('a'); open('c', 'w')", "wrong output"),
        ("open('result.json', 'w').write('[' * 100_000)", "wrong output"),
        ("import sys; sys.stderr.buffer.write(bytes(range(256)) * 4096); sys.exit(3)", "test 1 of 1"),
        ("open('x' * 255, 'w'); print(10**5000)", "Exceeds the limit"),
    ],
)
def test_a_hostile_program_scores_0_and_leaves_nothing(
    make_sample: MakeSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, detail: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    score, outcome, said = scored(SETTINGS, make_sample, source)
    assert (score, outcome) == (0.0, "score") and detail in said
    assert list(tmp_path.iterdir()) == []


def test_huge_numbers_compare(make_sample: MakeSample) -> None:
    label = {"fn_name": "f", "inputs": [[]], "outputs": [1.5]}
    assert scored(SETTINGS, make_sample, "def f(): return 10**400", label)[:2] == (0.0, "score")


def test_the_result_file_is_read_only_if_it_is_a_plain_file(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    for make in (lambda: result.symlink_to("/dev/zero"), lambda: os.mkfifo(result), result.mkdir):
        make()
        assert _result(tmp_path)[0] is None
        result.rmdir() if result.is_dir() else result.unlink()


def test_a_pool_removes_the_folders_of_workers_that_were_killed(
    make_sample: MakeSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = RewardSettings(name="code", workers=1, timeout_seconds=2.0, code=CodeSettings(test_seconds=60.0))
    with RewardPool(settings) as pool:
        text = "```python\nimport time\nopen('here', 'w')\ntime.sleep(60)\n```"
        assert pool.score([make_sample(text, PRINTS_7)])[0].outcome == "timeout"
        (mine,) = tmp_path.iterdir()
        assert any(path.name == "here" for path in mine.rglob("*"))
    assert list(tmp_path.iterdir()) == []


REAL_PROGRAMS = {
    "threads": """
        import queue, threading
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool:
            total = sum(pool.map(lambda x: x, [1, 2, 4]))
        done = threading.Event(); threading.Timer(0.01, done.set).start(); done.wait()
        print(total)
    """,
    "asyncio": """
        import asyncio
        async def f(x):
            await asyncio.sleep(0.001)
            return x
        async def main():
            queue = asyncio.Queue()
            await queue.put(3)
            a, b = await asyncio.gather(f(3), asyncio.to_thread(lambda: 4))
            return a + b + await queue.get() - 3
        print(asyncio.run(main()))
    """,
    "files": """
        import csv, glob, gzip, json, os, pathlib, pickle, shutil, sqlite3, tempfile, zipfile
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as file:
            path = pathlib.Path(folder, "a", "b"); path.mkdir(parents=True)
            (path / "x.json").write_text(json.dumps([7])); (path / "x.json").rename(path / "y.json")
            shutil.copyfile(path / "y.json", "z.json"); shutil.move("z.json", "w.json")
            with gzip.open("g.gz", "wt") as out: out.write("7")
            with zipfile.ZipFile("z.zip", "w") as out: out.writestr("n", "7")
            assert glob.glob("*.gz") and list(os.walk(".")) and os.path.realpath("w.json") and os.stat("w.json")
            assert os.statvfs(".").f_bsize and os.fstatvfs(1) and os.readlink("/proc/self/exe")
            data = sqlite3.connect("d.db"); data.execute("create table t (x)"); data.execute("insert into t values (7)")
            data.commit(); os.replace("w.json", "v.json"); file.write(pickle.dumps({1: 2})); file.flush()
            print(json.load(open("v.json"))[0])
    """,
    "signals and clocks": """
        import datetime, random, resource, select, signal, time, uuid, zoneinfo
        fired = []
        signal.signal(signal.SIGALRM, lambda *_: fired.append(7))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while not fired: signal.pause() if False else time.sleep(0.001)
        select.select([], [], [], 0.001); time.perf_counter(); time.process_time(); datetime.datetime.now()
        resource.getrusage(resource.RUSAGE_SELF); uuid.uuid4(); random.SystemRandom().random()
        print(fired[0])
    """,
    "mathematics": """
        import cmath, decimal, fractions, hashlib, itertools, math, mmap, secrets, statistics, struct, unicodedata, zlib
        mapped = mmap.mmap(-1, 2**20); mapped[:1] = b"7"; mapped.flush()
        assert decimal.Decimal(2).sqrt() and statistics.stdev([1, 2]) and hashlib.sha256(b"").digest()
        assert sum(1 for _ in itertools.permutations(range(7))) == 5040
        print(mapped[:1].decode())
    """,
    "system": """
        import getpass, locale, os, platform, sys, sysconfig
        assert os.cpu_count() and platform.system() == "Linux" and sys.getsizeof([]) and os.getpid() and os.uname()
        assert os.sysconf("SC_PAGE_SIZE") and os.getcwd() and os.environ["HOME"] and locale.getlocale()
        r, w = os.pipe(); os.write(w, b"7"); sys.stdout.buffer.write(os.read(r, 1)); sys.stdout.flush()
    """,
    "standard files by name": """
        print(7, file=open("/dev/stdout", "a"), flush=True)
        assert open("/dev/stdin").read() == ""
    """,
    "logging and tests": """
        import contextlib, doctest, io, logging, pprint, traceback, unittest, warnings
        logging.basicConfig(filename="log"); logging.warning("x"); warnings.warn("x")
        class T(unittest.TestCase):
            def test(self): self.assertEqual(1, 1)
        with contextlib.redirect_stderr(io.StringIO()):
            ended = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))
        print(7 if ended.wasSuccessful() else 0)
    """,
}
LIBRARIES = {
    "numpy": """
        import numpy as np
        a = np.random.default_rng(0).random((300, 300))
        assert np.allclose(np.linalg.inv(a) @ a, np.eye(300)) and np.fft.fft(a).shape and np.sort(a, axis=0).any()
        np.save("a.npy", a); assert (np.load("a.npy", mmap_mode="r") == a).all()
        print(7)
    """,
    "sympy": """
        import sympy
        x = sympy.symbols("x")
        print(sympy.solve(x**2 - 49, x)[1] if sympy.integrate(sympy.sin(x), (x, 0, sympy.pi)) == 2 else 0)
    """,
}


@pytest.mark.parametrize("name", [*REAL_PROGRAMS, *(pytest.param(name, marks=slow) for name in LIBRARIES)])
def test_a_real_program_runs(make_sample: MakeSample, name: str) -> None:
    roomy = CodeSettings(test_seconds=300.0, memory_mb=2048)
    source = (REAL_PROGRAMS | LIBRARIES)[name]
    assert scored(roomy, make_sample, source) == (1.0, "score", "correct")


def test_threads_share_the_limits_of_their_process(make_sample: MakeSample) -> None:
    """Threads are not counted, so that memory and processor time bound them."""
    source = """
        import threading
        def work():
            while True: pass
        try:
            while True: threading.Thread(target=work, daemon=True).start()
        except RuntimeError:
            work()
    """
    assert scored(IMPATIENT, make_sample, source) == (0.0, "score", "test 1 of 1: too slow")


def test_a_jailed_process_has_no_rights_and_one_filter(tmp_path: Path) -> None:
    command, options = invocation(SETTINGS, tmp_path, "session", 60.0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b'["t", "1"]\n')
        process.stdin.flush()
        while b"t" not in process.stdout.readline():
            pass
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        process.kill()
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "1")


def test_a_program_does_not_outlive_its_worker(tmp_path: Path) -> None:
    """The program asks to live on, and its parent is killed without a chance to end the program."""
    (tmp_path / "solution.py").write_text(
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nopen('pid', 'w').write(str(os.getpid()))\n"
        "os.replace('pid', 'ready')\ntime.sleep(600)"
    )
    parent = textwrap.dedent(f"""
        import subprocess, time
        from pathlib import Path
        from megatron_rl.config.reward import CodeSettings
        from megatron_rl.reward.code.sandbox import invocation
        command, options = invocation(CodeSettings(), Path({str(tmp_path)!r}), "run", 600.0)
        subprocess.Popen(command, **options).wait()
    """)
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.05)
        program = psutil.Process(int((tmp_path / "ready").read_text()))
        process.send_signal(signal.SIGKILL)
    while program.is_running() and program.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


# A kernel without a facility: a filter in front of the sandbox's own makes the call fail as such a kernel does.
_LACKING = """
import ctypes, struct, sys
def refuse(number, argument, value, error):
    lines = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16 + 8 * argument), (0x15, 0, 1, value),
             (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)
    libc.prctl(22, 2, struct.pack("<HxxxxxxQ", len(lines), ctypes.addressof(code)), 0, 0)
"""
_LACKS_LANDLOCK = "refuse(444, 2, 1, 38)\n"  # landlock_create_ruleset(..., LANDLOCK_CREATE_RULESET_VERSION): ENOSYS
_LACKS_SECCOMP = "refuse(157, 0, 22, 22)\n"  # prctl(PR_SET_SECCOMP): EINVAL


def on_a_kernel(lacks: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _LACKING + lacks + code], capture_output=True, text=True)


GRADE = """
from megatron_rl.config.reward import CodeSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward.code import CodeReward
from megatron_rl.types import Prompt, Response, Sample
try:
    verifier = CodeReward(RewardSettings(name="code", code=CodeSettings(require_landlock={required})))
except UserError as error:
    raise SystemExit(str(error))
source = '''
try: open("/etc/passwd"); print("read")
except OSError: print("not read")
import os
try: os.fork(); print("forked")
except OSError: print("not forked")
'''
prompt = Prompt("p:0", (1,), "", {{"inputs": [""], "outputs": ["read not forked"]}})
print(verifier(Sample(prompt, Response([2], [-0.5], "stop", 0), "```python" + source + "```")).detail)
"""


def test_a_kernel_without_landlock_is_refused() -> None:
    done = on_a_kernel(_LACKS_LANDLOCK, GRADE.format(required=True))
    assert done.returncode == 1
    assert "no Landlock" in done.stderr and "reward.code.require_landlock=false" in done.stderr


def test_a_user_can_choose_the_weaker_mode() -> None:
    """Programs then read files, and still start no process."""
    done = on_a_kernel(_LACKS_LANDLOCK, GRADE.format(required=False))
    assert done.stdout.strip() == "correct", done.stderr


def test_a_kernel_without_seccomp_is_refused_in_every_mode() -> None:
    done = on_a_kernel(_LACKS_SECCOMP, GRADE.format(required=False))
    assert done.returncode == 1 and "reward.name=remote" in done.stderr


@pytest.mark.parametrize("version", quick_of([1, 2, 3, 4, 5], {1}))
def test_older_versions_of_landlock_protect_files_too(tmp_path: Path, version: int, victims: dict[str, Any]) -> None:
    """These kernels know fewer rights; the list of system calls makes up for truncation."""
    files = {name: code for name, code in ORDINARY.items() if name.split(":")[0] in ("files", "metadata", "links")}
    setup = f"""
import os, sys
from pathlib import Path
from megatron_rl.reward.code import restrictions, system_calls
os.chdir({str(tmp_path)!r})
assert restrictions.confine_files(Path.cwd(), newest={version})
restrictions.drop_capabilities()
assert system_calls.filter_system_calls(restrictions.LIBC)
"""
    given = json.dumps({"attempts": files, "victims": victims | {"target": str(tmp_path.parent / "taken")}})
    done = subprocess.run(
        [sys.executable, "-c", setup + PREAMBLE + DRIVER], input=given, capture_output=True, text=True
    )
    ends = json.loads(done.stdout)
    assert set(ends.values()) <= set(REFUSED), ends


def test_both_architectures_have_the_calls_and_only_known_rules() -> None:
    (_, x86), (_, arm) = system_calls._ARCHITECTURES.values()
    assert arm.keys() < x86.keys() and len(set(x86.values())) == len(x86) and len(set(arm.values())) == len(arm)
    assert system_calls._rules().keys() <= arm.keys()


def test_a_machine_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert not system_calls.filter_system_calls(restrictions.LIBC)


def test_the_probe_passes_on_this_machine() -> None:
    check_sandbox(CodeSettings())
    assert jail.LOCKED == 0 and UserError
