"""How far the log-probs of an engine in FP8 are from those of the actor in bf16, with FP8 simulated on a CPU.

    python -m benchmarks.fp8_rollouts MODEL [--out benchmarks/results/fp8_rollouts.json]

MODEL is a Hugging Face folder, such as that of examples/smollm2. A copy of it, whose matrix products take weights and
activations rounded to E4M3, samples responses to questions; the model in bf16 scores them, and so does the model in
fp32, which shows what bf16 alone does. "blocks" scales weights per 128 x 128 elements and activations per token and 128
channels, as engines do for FP8 checkpoints; "tensor" scales each by one number. Products are taken in fp32: the
rounding of a GPU's accumulation is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.machine import keep

BLOCK = 128
LARGEST = 448.0
"""The largest number of E4M3."""
QUESTIONS = (
    "Tom has 3 boxes with 12 pens each and gives away 7 pens. How many pens does he have left?",
    "A train travels 240 miles in 4 hours. How far does it travel in 7 hours at the same speed?",
    "Mary buys 5 apples at 2 dollars each and pays with 20 dollars. How much change does she get?",
    "There are 28 children in a class, and 3 of 4 of them walk to school. How many walk?",
)
RESPONSES, TOKENS = 4, 64
Round = Callable[[Tensor], Tensor]


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(values.dtype) * scale


def by_tensor(values: Tensor) -> Tensor:
    return rounded(values, values.abs().amax().clamp_min(1e-12) / LARGEST)


def by_groups(activations: Tensor) -> Tensor:
    """A scale per token and BLOCK channels; activations [..., C]."""
    return torch.cat(
        [rounded(part, part.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST) for part in blocks(activations)],
        -1,
    )


def by_blocks(weights: Tensor) -> Tensor:
    """A scale per BLOCK x BLOCK elements; weights [out, in]."""
    return torch.cat([torch.cat([by_tensor(part) for part in blocks(rows)], -1) for rows in weights.split(BLOCK)])


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(BLOCK, -1)


RECIPES: dict[str, tuple[Round, Round]] = {"blocks": (by_blocks, by_groups), "tensor": (by_tensor, by_tensor)}
"""Name -> rounding of weights, and of activations."""


def quantise(model: PreTrainedModel, recipe: str) -> None:
    """Rounds the layers' matrices, and their inputs at every call. Embeddings and head stay as they are."""
    of_weights, of_activations = RECIPES[recipe]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            with torch.no_grad():
                module.weight.copy_(of_weights(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (of_activations(inputs[0]), *inputs[1:]))


@torch.inference_mode()
def log_probs(model: PreTrainedModel, sequence: Tensor, start: int) -> Tensor:
    """Log-probs of the tokens of `sequence` [1, S] from position `start` on."""
    logits = model(sequence).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, sequence[0, start:, None])[:, 0]


def sequences(model: PreTrainedModel, folder: Path) -> list[tuple[Tensor, int]]:
    """Samples responses. Returns each with its prompt [1, S], and the prompt's length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        sampled = model.generate(
            **prompt, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=TOKENS, num_return_sequences=RESPONSES
        )
        for row in sampled:
            ends = (row[prompt["input_ids"].shape[1] :] == tokenizer.eos_token_id).nonzero()
            end = prompt["input_ids"].shape[1] + (int(ends[0]) + 1 if len(ends) else TOKENS)
            found.append((row[None, :end], prompt["input_ids"].shape[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = AutoModelForCausalLM.from_pretrained
    actor, exact = load(options.model, dtype=torch.bfloat16), load(options.model, dtype=torch.float32)
    results: dict[str, dict[str, float]] = {}
    for recipe in ("bf16", *RECIPES):
        engine = load(options.model, dtype=torch.float32)
        if recipe != "bf16":
            quantise(engine, recipe)
        torch.manual_seed(0)
        started, rows = time.monotonic(), sequences(engine, options.model)
        scored = torch.cat([log_probs(actor, *row) for row in rows])
        other = torch.cat([log_probs(exact if recipe == "bf16" else engine, *row) for row in rows])
        gap = (scored - other).abs()
        ratio = (scored - other).exp()
        results[recipe] = {
            "tokens": len(gap),
            "mean": float(gap.mean()),
            "largest": float(gap.max()),
            "mean_surprisal": -float(scored.mean()),
            "kept_by_ratios_up_to_2": float((ratio < 2).float().mean()),
        }
        line = ", ".join(f"{name} {value:.3g}" for name, value in results[recipe].items())
        print(f"{recipe}: {line} ({time.monotonic() - started:.0f} s)", flush=True)
    keep(options.out, "fp8_rollouts", model=options.model.name, responses=len(rows), differences=results)


if __name__ == "__main__":
    main()
