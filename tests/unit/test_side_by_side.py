"""`tools/side_by_side.py` runs targets of a Makefile two at a time and stops at the first that fails."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/side_by_side.py"
MAKEFILE = """
one:
	@while [ ! -e two.began ]; do sleep 0.05; done; echo 'one has met two'
two:
	@touch two.began; echo 'two is done'
late:
	@touch late.began
endless:
	@trap 'touch endless.interrupted; exit 1' INT; touch endless.began; sleep 1000
broken:
	@while [ ! -e endless.began ]; do sleep 0.05; done; echo 'this is what went wrong'; false
"""


MAKEFILE_OF_TWO = """
first second:
	@touch $@.began; while [ ! -e first.began -o ! -e second.began ]; do sleep 0.01; done; echo '$@ went wrong'; false
"""


IN_BACKGROUND = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
"""A shell makes a command that it starts in the background ignore Ctrl-C, and so all that the command starts."""


def run(folder: Path, *targets: str, makefile: str = MAKEFILE) -> tuple[int, str]:
    (folder / "Makefile").write_text(makefile)
    command = [*IN_BACKGROUND, sys.executable, SCRIPT, *targets]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_two_targets_run_at_a_time_and_each_is_reported(tmp_path: Path) -> None:
    status, output = run(tmp_path, "one", "two", "late")
    assert status == 0, output
    for target, last in (("one", "one has met two"), ("two", "two is done"), ("late", "")):
        assert f"{target} starts: build/parts/{target}.log\n" in output
        assert f"{target} ended after 0:0" in output and f"with 0: {last}\n" in output
    assert (tmp_path / "late.began").exists()


@pytest.mark.parametrize("targets", [("endless", "broken", "late"), ("broken", "endless", "late")])
def test_the_first_failure_ends_all_and_is_printed_last(tmp_path: Path, targets: tuple[str, ...]) -> None:
    status, output = run(tmp_path, *targets)
    assert status == 1
    assert "endless was interrupted\n" in output and not (tmp_path / "late.began").exists()
    assert (tmp_path / "endless.interrupted").exists(), "it was killed"
    last = output[output.index("endless was interrupted") :]
    assert "this is what went wrong" in last and last.endswith("broken failed\n")


def test_two_failures_at_once_end_with_what_the_first_printed(tmp_path: Path) -> None:
    status, output = run(tmp_path, "first", "second", makefile=MAKEFILE_OF_TWO)
    assert status == 1 and output.endswith(("first failed\n", "second failed\n")), output
    assert "went wrong" in output
