"""`megatron-rl convert`: converts a model between formats."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def add(commands: Any) -> None:
    """Declares `convert`."""
    convert = commands.add_parser(
        "convert",
        help="convert a model between Hugging Face, run checkpoint and Megatron formats, and verify the result",
    )
    convert.add_argument(
        "source",
        type=Path,
        help="a Hugging Face folder or an id of the Hub, a run or its checkpoint, or a Megatron checkpoint",
    )
    target = convert.add_argument("target", type=Path, help="a folder that does not exist yet")
    convert.add_argument(
        "--output", action=_Output, type=Path, target=target, metavar="FOLDER", help="another way to give the target"
    )
    convert.add_argument(
        "--format",
        choices=("hf", "torch_dist"),
        help="format of the target; default: torch_dist for a Hugging Face folder, hf for any other source",
    )
    convert.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the Hugging Face folder or Hub id of the source's model, if no file beside the source names it",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: that of the source; for a run's checkpoint, that of its model's config.json",
    )
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest size of a weight file; default: 5GB"
    )
    convert.add_argument("--no-logits", action="store_true", help="verify by comparing weights only, not logits")
    convert.set_defaults(command=_convert)


class _Output(argparse.Action):
    """The option in place of the positional argument `target`.

    With nargs="?" the argument could not come after an option: argparse would take it as left out.
    """

    def __init__(self, *, target: argparse.Action, **options: Any) -> None:
        super().__init__(**options)
        self._target = target

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        self._target.required = False
        namespace.output = values


def _convert(options: argparse.Namespace) -> None:
    from megatron_rl.data.hub import local_model

    if options.target and options.output:
        raise UserError(f"convert: two targets: {options.target} and --output {options.output}; give one")
    source = local_model(options.source, "source")
    model = local_model(options.model, "--model") if options.model else None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from megatron_rl.conversion.convert import convert
    from megatron_rl.models.hf_shards import parse_bytes

    convert(
        source,
        options.target or options.output,
        to=options.format,
        model=model,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_bytes=parse_bytes(options.max_shard_size),
        logits=not options.no_logits,
    )
