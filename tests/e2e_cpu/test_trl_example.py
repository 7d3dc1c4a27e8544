"""A shortened examples/trl/countdown.py runs in an empty folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.patience import completed
from tests.tiers import slow

ROOT = Path(__file__).parents[2]
SHORTER = {
    "write_task(TASK)": "write_task(TASK, warm_start_traces=(256, 128))",
    '"max_steps": 200': '"max_steps": 2',
    '"eval_steps": 50': '"eval_steps": 2',
    '"use_cpu": True': '"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1',
}


@slow
@pytest.mark.e2e
def test_the_trl_example_trains(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "trl" / "countdown.py").read_text()
    for original, shorter in SHORTER.items():
        assert original in code
        code = code.replace(original, shorter)
    (tmp_path / "countdown.py").write_text(code)
    done = completed([sys.executable, "countdown.py"], "the example for TRL", tmp_path, PYTHONPATH=str(ROOT))
    output = done.stdout
    assert done.returncode == 0, output
    evaluations = re.findall(r"'eval_reward': '([\d.e-]+)'", output)
    assert len(evaluations) == 2
    assert len(re.findall(r"'lpreg/selected_fraction': '([\d.e-]+)'", output)) == 2
