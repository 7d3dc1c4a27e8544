"""Tokens per second of the embedded engine and of Hugging Face's `generate`, on the quickstart's rollouts.

    python benchmarks/embedded_engine.py MODEL [--out benchmarks/results/embedded_engine.json]

MODEL: the quickstart's policy, `runs/<name>/hf` of a run, or `runs/cache/warm_start-2-*`, which RL starts from.
A call has 16 prompts of the task's data, 8 responses each, at most 46 tokens, temperature 1, float32, one thread. Both
take turns on the same prompts, pair after pair. The result is the ratio within a pair (median and quartiles) in process
time, which other programs disturb least. Tokens are counted up to and including each response's end token. The embedded
engine also returns log-probs; `generate` does not. The floor of each is the time of its matrix products alone: those of
the model's linear layers in one call, repeated on inputs of the same shapes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.data.countdown import write_task
from megatron_rl.data.rows import read_rows
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import SamplingParams

PROMPTS, RESPONSES, TOKENS = 16, 8, 46
PAIRS, WARM_UP = 50, 5
"""Number of pairs that are timed, after a few that are not."""


def ours(engine: TransformersEngine, prompts: list[list[int]], sampling: SamplingParams) -> int:
    return sum(len(response.token_ids) for group in engine.generate(prompts, sampling) for response in group)


@torch.inference_mode()
def theirs(engine: TransformersEngine, prompts: list[list[int]], sampling: SamplingParams) -> int:
    (end,) = sampling.stop_token_ids
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sequences = engine.model.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_tokens,
        num_return_sequences=sampling.n,
        eos_token_id=end,
        pad_token_id=0,
    )
    ends = sequences[:, longest:] == end
    return int((ends.cumsum(1) - ends.long() == 0).sum())


def products_alone(engine: TransformersEngine, generate: Callable[[], int]) -> tuple[float, int]:
    """Returns the seconds that a call spends in its linear layers at least, and the positions that these compute."""
    inputs: list[tuple[torch.nn.Linear, torch.Size]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given: inputs.append((layer, given[0].shape)))
        for layer in engine.model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    generate()
    for hook in hooks:
        hook.remove()
    positions = sum(shape[:-1].numel() for layer, shape in inputs if layer is inputs[0][0])
    with torch.inference_mode():
        products = [(torch.randn(shape), layer.weight) for layer, shape in inputs]
        start = time.process_time()
        for given, weight in products:
            torch.nn.functional.linear(given, weight)
        return time.process_time() - start, positions


def rate(generate: Callable[[], int]) -> float:
    start = time.process_time()
    return generate() / (time.process_time() - start)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = TransformersEngine(options.model, "cpu", "float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder) / "task")
        rows = [row["prompt"] for _, row in read_rows(Path(folder) / "task/train.jsonl")][: PROMPTS * (PAIRS + WARM_UP)]
    prompts = [tokenizer(row)["input_ids"] for row in rows]
    rates: list[tuple[float, float]] = []
    for pair in range(PAIRS + WARM_UP):
        batch = prompts[PROMPTS * pair : PROMPTS * (pair + 1)]
        sampling = SamplingParams(RESPONSES, TOKENS, 1.0, (tokenizer.eos_token_id,), seed=pair)
        found: dict[str, float] = {}
        for generate in (ours, theirs) if pair % 2 else (theirs, ours):
            found[generate.__name__] = rate(partial(generate, engine, batch, sampling))
        rates.append((found["ours"], found["theirs"]))
    rates = rates[WARM_UP:]
    floors = {}
    for name, generate in (("embedded engine", ours), ("transformers generate", theirs)):
        call = partial(generate, engine, batch, sampling)
        seconds, positions = min(products_alone(engine, call) for _ in range(5))
        floors[name] = {"share": seconds * rate(call) / call(), "positions": positions}
    low, middle, high = statistics.quantiles([own / other for own, other in rates], n=4)
    result = {
        "tokens_per_second": {
            "embedded engine": statistics.median(own for own, _ in rates),
            "transformers generate": statistics.median(other for _, other in rates),
        },
        "matrix_products_alone": floors,
        "ratio": {"median": middle, "quartiles": [low, high], "pairs": PAIRS},
    }
    table = Table("", "tokens/s", "matrix products alone", "positions of a call")
    for name, value in result["tokens_per_second"].items():
        table.add_row(name, f"{value:,.0f}", f"{floors[name]['share']:.0%}", f"{floors[name]['positions']:,}")
    table.add_row("ratio", f"{middle:.2f} (quartiles {low:.2f}, {high:.2f})")
    Console().print(table)
    keep(options.out, "embedded_engine", **result)


if __name__ == "__main__":
    main()
