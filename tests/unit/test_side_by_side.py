"""`tools/side_by_side.py` runs targets of a Makefile two at a time and tells all that fail."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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
	@echo 'this is what went wrong'; false
lost:
	@echo 'this too went wrong'; exit 3
"""


IN_BACKGROUND = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
"""A shell makes a command that it starts in the background ignore Ctrl-C, and so all that the command starts."""


def start(folder: Path, *targets: str) -> subprocess.Popen[str]:
    (folder / "Makefile").write_text(MAKEFILE)
    command = [*IN_BACKGROUND, sys.executable, str(SCRIPT), *targets]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_two_targets_run_at_a_time_and_each_is_reported(tmp_path: Path) -> None:
    process = start(tmp_path, "one", "two", "late")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    for target, last in (("one", "one has met two"), ("two", "two is done"), ("late", "")):
        assert f"{target} starts: build/parts/{target}.log\n" in output
        assert re.search(rf"{target} ended after 0:\d\d \(0:\d\d of processor time\) with 0: {last}\n", output)
    assert (tmp_path / "late.began").exists()


def test_a_failure_stops_no_other_target_and_all_failures_come_last(tmp_path: Path) -> None:
    process = start(tmp_path, "broken", "one", "two", "lost", "late")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert (tmp_path / "late.began").exists()
    last = output[output.index("late ended") :]
    assert "this is what went wrong" in last and "broken failed\n" in last
    assert "this too went wrong" in last and last.endswith("lost failed\n")
    assert "one failed" not in output and "two is done\n\n" not in last


def test_an_interrupt_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    process = start(tmp_path, "endless", "one", "late")
    while not (tmp_path / "endless.began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "endless was interrupted\n" in output and not (tmp_path / "late.began").exists()
    assert (tmp_path / "endless.interrupted").exists(), "it was killed"
