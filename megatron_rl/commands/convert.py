"""`megatron-rl convert`: a model from one format to another."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare `convert`."""
    convert = commands.add_parser(
        "convert", help="convert a model between Hugging Face, a run's checkpoint and Megatron, and prove it"
    )
    convert.add_argument(
        "source", type=Path, help="a Hugging Face folder, a run or its checkpoint, a Megatron checkpoint"
    )
    convert.add_argument("target", type=Path, help="a folder that does not exist yet")
    convert.add_argument(
        "--format",
        choices=("hf", "torch_dist"),
        help="of the target; default: torch_dist for a Hugging Face folder, hf for anything else",
    )
    convert.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the source's Hugging Face folder, where nothing beside it says so"
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the source's; of a run's checkpoint that of its model's config.json",
    )
    convert.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file of weights; default: 5GB")
    convert.add_argument("--no-logits", action="store_true", help="compare the weights only")
    convert.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from megatron_rl.conversion.convert import convert
    from megatron_rl.models.hf_shards import parse_bytes

    convert(
        options.source,
        options.target,
        to=options.format,
        model=options.model,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_bytes=parse_bytes(options.max_shard_size),
        logits=not options.no_logits,
    )
