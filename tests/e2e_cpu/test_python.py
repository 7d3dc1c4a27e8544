"""Training from a script: no guard around the call, paths as text, twice in one process, a result as an object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_rl.data.countdown import write_task
from tests.patience import completed

from .conftest import QUICKSTART, REPOSITORY

SCRIPT = """\
import json

from megatron_rl import load_config, train

print("the script is run")
small = [
    "warm_start=null", "train.steps=1", "train.save_every=0", "rollout.prompts_per_step=4", "rollout.engines=1",
    "actor.tensor_parallel=1", "evaluation.suites={}", "evaluation.probes={}", "observability.tensorboard=false",
]
config = load_config(QUICKSTART, [*small, "run.name=first"])
for result in (train(config), train(QUICKSTART, [*small, "run.name=second", "train.rollout_only=true"])):
    found = [str(result.folder), result.steps, len(result.metrics), str(result.export), str(result.report)]
    print("result:", json.dumps(found))
"""


def test_a_script_trains_without_a_guard(tmp_path: Path) -> None:
    write_task(tmp_path / "runs/countdown-task")
    (tmp_path / "script.py").write_text(SCRIPT.replace("QUICKSTART", repr(str(QUICKSTART))))
    done = completed([sys.executable, "script.py"], "the script", tmp_path, PYTHONPATH=str(REPOSITORY))
    output = done.stdout
    assert done.returncode == 0, output[-5000:]
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/*/logs/*.log"))
    assert (output + logs).count("the script is run") == 1
    first, second = [json.loads(line[8:]) for line in output.splitlines() if line.startswith("result: ")]
    assert first == ["runs/first", 1, 2, "runs/first/hf", "runs/first/report.html"]
    assert second[:2] == ["runs/second", 1] and second[3] == "None"
