"""The maths reward in its worker: endless comparisons end as time-outs, and imports are not a sample's time."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool
from megatron_rl.types import Sample
from tests.patience import command_of
from tests.tiers import quick_of

ENDLESS = r"\boxed{\int_0^1 e^{e^{e^{x^x}}}\,dx}"


@pytest.mark.parametrize("grader", quick_of(["standard", "published"], ["standard"]))
def test_an_endless_comparison_is_a_timeout_and_leaves_no_process_behind(
    make_sample: Callable[..., Sample], grader: str
) -> None:
    settings = RewardSettings(name="math", workers=1, timeout_seconds=5.0, math={"grader": grader})
    with RewardPool(settings) as pool:
        results = pool.score([make_sample(ENDLESS, "5"), make_sample(r"\boxed{5}", "5")])
    outcomes = [(result.outcome, result.score) for result in results]
    assert outcomes == [("timeout", 0.0), ("score", 1.0)]
    left = [" ".join(command_of(process)) for process in psutil.Process().children(recursive=True)]
    assert [command for command in left if "spawn_main" in command] == []


@pytest.mark.parametrize("grader", ["standard", "published"])
def test_a_worker_imports_the_algebra_when_it_starts(tmp_path: Path, grader: str) -> None:
    program = f"""
    import sys
    from pathlib import Path
    from megatron_rl.config.reward import RewardSettings
    from megatron_rl.reward import pool
    from megatron_rl.types import Prompt, Response, Sample

    def grade(label, answer):
        response = Response([1], [0.0], "stop", 0)
        return pool._score(Sample(Prompt("x:0", (1,), "", label), response, "\\\\boxed{{" + answer + "}}")).score

    settings = RewardSettings(name="math", math={{"grader": "{grader}"}})
    assert "sympy" not in sys.modules, "a login node imports this"
    pool._prepare_worker(settings, None, None, Path({str(tmp_path)!r}))
    loaded = set(sys.modules)
    assert {{"sympy", "math_verify", "latex2sympy2_extended"}} <= loaded
    assert grade("x^2+2x+1", "(x+1)^2") == 1.0
    assert grade("(0,1)", "(0,1)") == 1.0
    new = [name for name in set(sys.modules) - loaded if name.split(".")[0] in ("math_verify", "latex2sympy2_extended")]
    assert new == [], new
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
