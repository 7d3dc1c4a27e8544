"""Regression check: compares the costs of a step, in counts that do not depend on the machine, with the kept counts.

    python benchmarks/check.py            # fails if a count exceeds the kept one; under a minute
    python benchmarks/check.py --keep     # after an intended change: check the table, then commit the file

The counts come from a Qwen3 of four small layers in one process: operations and calls into torch of a training step,
bytes of a batch that is sent to the actor, bytes that a step at the paper's size holds and moves in the driver
(`driver.py`), bytes of a server's answer and the garbage collections while it is parsed (`engine_answers.py`), bytes
allocated to publish weights, modules that the command line loads to show its help, imbalance of
512 sequences on 64 replicas, and, on a simulated clock with made-up rates (`scaling_simulator.py`), the time of a step
if rollouts are not synchronous. (torch counts no operations of attention
on a CPU, so the count is smaller than the number needed.) `tests/invariance/test_methods_layouts.py` counts the passes
through the model for every method.
"""

from __future__ import annotations

import gc
import json
import pickle
import pickletools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from benchmarks.batching import case, draw
from benchmarks.engine_answers import GROUP, Answers, sglang_answer, vllm_frame
from benchmarks.machine import arguments
from benchmarks.scaling import log_normal
from benchmarks.scaling_check import MODES, QUICKSTART
from benchmarks.scaling_simulator import Fleet, Rates, simulate
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config import load_config
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.flops import pass_flops
from megatron_rl.models.weight_map import publish_hf_weights
from megatron_rl.parallel.layout import Layout
from megatron_rl.rollout.servers.server import parse_json

KEPT = Path(__file__).parent / "results/check.json"
ROOM = 1.05
"""A count may exceed the kept one by this factor, as versions of torch differ a little."""
ROWS, VOCABULARY = 64, 1000
PAPER_RESPONSES, PAPER_MEAN = 2048, 4000
MODEL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


class Calls(TorchDispatchMode):
    """Counts calls into torch that compute or copy, and the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = [*args, *(kwargs or {}).values()]  # `out` may be one of them
        given = {arg.untyped_storage().data_ptr() for arg in known if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.calls += 1
            self.bytes += out.nbytes
        return out


def rows() -> SequenceBatch:
    random = np.random.default_rng(0)
    lengths = random.integers(10, 80, ROWS)
    batch = SequenceBatch.of([random.integers(0, VOCABULARY, length + 8) for length in lengths], np.full(ROWS, 8))
    tokens = batch.num_sampled_tokens
    return batch.with_values(
        advantages=random.normal(size=tokens).astype(np.float32),
        rollout_log_probs=-random.random(tokens).astype(np.float32),
        selected=random.random(tokens) < 0.01,
    )


def worker_of(folder: Path) -> MegatronWorker:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **MODEL)).save_pretrained(folder)
    worker = MegatronWorker(ActorSettings(device="cpu"), Layout(), 0)
    worker.start("127.0.0.1", worker.open_port("127.0.0.1"), folder)
    worker.load_hf(folder)
    worker.set_loss(LossChoice.of(AlgorithmSettings()))
    worker.build_optimizer(OptimizerSettings())
    return worker


def count() -> dict[str, float]:
    batch, found = rows(), {}
    with tempfile.TemporaryDirectory() as folder:
        worker = worker_of(Path(folder))
        worker.train(batch, 1e-6, batch.num_sampled_tokens, 1.0)  # builds what is built once
        with FlopCounterMode(display=False) as flops:
            worker.train(batch, 1e-6, batch.num_sampled_tokens, 1.0)
        with Calls() as calls:
            worker.train(batch, 1e-6, batch.num_sampled_tokens, 1.0)
        with Calls() as export:
            tensors = publish_hf_weights(worker.model, worker.hf_config, reuse_memory=True)
            size = sum(tensor.nbytes for _, tensor in tensors)
        shape = Architecture.from_hf(worker.hf_config)
        worker.close()
    needed = 3 * pass_flops(shape, batch.lengths.tolist(), batch.num_sampled_tokens)
    found["operations of a training step over those it needs"] = flops.get_total_flops() / needed
    found["calls into torch in a training step"] = calls.calls
    found["bytes allocated in a training step per token"] = calls.bytes / batch.lengths.sum()
    found["bytes allocated to publish weights over their size"] = export.bytes / size
    found["bytes of a batch on its way to the actor per token"] = len(pickle.dumps(batch, 5)) / batch.lengths.sum()
    found["modules loaded to show the help"] = modules_of_help()
    found["largest of 64 replicas over their mean, 512 sequences"] = 1 + case(draw(512, 0.6, 0), 64, 3e4)["imbalance"]
    found |= counts_of_driver() | counts_of_answers()
    synchronous = simulated("synchronous")
    for mode in list(MODES)[1:]:
        found[f"a simulated step over a synchronous one, {mode}"] = simulated(mode) / synchronous
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def counts_of_driver() -> dict[str, float]:
    """The arrays of a step at the paper's size, per response token, and the Python objects of an engine's answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver.write_answers(folder, PAPER_RESPONSES, PAPER_MEAN)
        step = driver.step(PAPER_RESPONSES, PAPER_MEAN, folder)
        opcodes = sum(1 for _ in pickletools.genops((folder / "0.pickle").read_bytes()))
    tokens = step["response_tokens"]
    return {
        "bytes of an engine's answer per token": step["answers"] / tokens,
        "bytes of a step's arrays and texts in the driver per token": step["arrays"] / tokens,
        "bytes from the driver to the actor in a step per token": step["sent"] / tokens,
        "pickled objects of an engine's answer per response": opcodes / driver.SAMPLES,
    }


def counts_of_answers() -> dict[str, float]:
    """The answers of both servers to one prompt, on their way to an engine's process and parsed there."""
    group = Answers.draw(GROUP, PAPER_MEAN).group(0)
    collections: list[str] = []

    def seen(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    content = sglang_answer(group)
    gc.callbacks.append(seen)
    parse_json(content)
    gc.callbacks.remove(seen)
    tokens = sum(len(ids) for ids, _ in group)
    return {
        "bytes of vLLM's answer per token": len(vllm_frame(0, group)) / tokens,
        "garbage collections while SGLang's answer is parsed": collections.count("start"),
    }


def simulated(mode: str) -> float:
    """Returns seconds per step: 64 groups of uneven lengths on eight engines, and training that takes about as long."""
    config = load_config(QUICKSTART, [*MODES[mode], "rollout.prompts_per_step=64", "train.steps=1000"])
    rates = Rates(lambda rows, before: 1e-2 + 1e-4 * rows, lambda prefixes: 1e-5 * float(prefixes.sum()), 200.0)
    steps = simulate(config, Fleet(8, rates), log_normal(8), lambda tokens: 5e-5 * tokens, 6)
    return sum(step.whole for step in steps[2:])


def modules_of_help() -> int:
    code = (
        "import sys\nbefore = len(sys.modules)\n"
        "try:\n    from megatron_rl.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
        "print(len(sys.modules) - before, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the present counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, found = json.loads(KEPT.read_text()) if KEPT.exists() else {}, count()
    table, worse = Table("count", "kept", "now", ""), []
    for name, value in found.items():
        limit = kept.get(name, value) * ROOM
        if value > limit:
            worse.append(name)
        table.add_row(name, f"{kept.get(name, '')}", f"{value:g}", "[red]more[/]" if value > limit else "")
    Console().print(table)
    if options.keep:
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
    elif worse or kept.keys() != found.keys():
        raise SystemExit(f"more than the kept counts in {KEPT.name}: {', '.join(worse) or 'the names differ'}")


if __name__ == "__main__":
    main()
