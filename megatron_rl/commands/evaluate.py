"""`megatron-rl eval`: evaluates a model on benchmark suites."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config.evaluation import ProtocolSettings
    from megatron_rl.evaluation.sources import CompletionServer, ModelFolder, Source

PLAIN_WIDTH = 140
"""Width in columns if standard output is not a terminal."""


def add(commands: Any) -> None:
    """Declares `eval`."""
    command = commands.add_parser("eval", help="evaluate a model on benchmark suites")
    command.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder or id, a checkpoint, a run's folder, or http://HOST:PORT"
    )
    command.add_argument(
        "--suites", default="paper", metavar="FILE.yaml", help="suite file, or a built-in one; default: paper"
    )
    command.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the suites' data files")
    command.add_argument("--only", metavar="SUITE,...", help="evaluate these suites only")
    command.add_argument(
        "--output",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the results; default: evaluations/<model>. An unfinished evaluation in it is continued",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch", type=int, default=32, metavar="N", help="problems per batch; each batch is saved")
    command.add_argument("--device", default="auto", help="for a folder or a checkpoint: auto, cpu or cuda")
    command.add_argument("--dtype", default="auto", help="for a folder or a checkpoint: auto, float32 or bfloat16")
    command.add_argument(
        "--base", type=Path, metavar="FOLDER", help="for a checkpoint: folder of the model it was trained from"
    )
    command.add_argument(
        "--max-positions",
        type=int,
        metavar="N",
        help="for a folder or a checkpoint: longest sequence; default: what the model is made for, by its config.json",
    )
    command.add_argument(
        "--model-name", metavar="NAME", help="for a server: name of the model; default: its only model"
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="for a server: tokenizer for chat templates and prompt lengths"
    )
    command.add_argument(
        "--concurrency", type=int, default=64, metavar="N", help="for a server: number of requests in flight"
    )
    command.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="for a server: longest duration of a request"
    )
    command.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_rl.config.remarks import greedy_samples
    from megatron_rl.evaluation.protocol import load_protocol
    from megatron_rl.reward.grader import check_reward

    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: give at least 1")
    if options.max_positions is not None and options.max_positions < 1:
        raise UserError(f"--max-positions {options.max_positions}: give at least 1")
    protocol = load_protocol(options.suites, options.data, options.only.split(",") if options.only else None)
    check_reward(protocol.reward)
    for remark in greedy_samples(protocol):
        print(f"warning: {options.suites}: {remark}", file=sys.stderr)
    with ExitStack() as stack:
        model = _source(options, stack)
        source: Source = _with_agent(model, protocol) if protocol.agent else model
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # after the downloads
        _run(options, protocol, source)


def _run(options: argparse.Namespace, protocol: ProtocolSettings, source: Source) -> None:
    from rich.console import Console

    from megatron_rl.evaluation.evaluate import SUMMARY, Evaluation, Progress
    from megatron_rl.evaluation.table import table_of

    folder = options.output or Path("evaluations", _name(options.model))
    evaluation = Evaluation(protocol, source, folder, seed=options.seed, batch=options.batch)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(f"first prompt, as the model sees it (template: {protocol.template}):", highlight=False)
    console.print(next(iter(evaluation.prompts.values()))[0].text, markup=False, highlight=False)
    with _progress_bar(console, evaluation) as bar:
        tasks = {name: bar.add_task(name, total=len(prompts), score="") for name, prompts in evaluation.prompts.items()}

        def report(progress: Progress) -> None:
            bar.update(tasks[progress.suite], completed=progress.done, score=f"{100 * progress.right:.1f}")
            if not console.is_terminal:
                console.print(f"{progress.suite}: {progress.done} of {progress.total}, {100 * progress.right:.1f}")

        measures = evaluation.run(report)
    console.print(table_of(measures, f"{options.model}, suites {options.suites}"))
    console.print(f"per problem: {folder}/<suite>.parquet; all figures: {folder / SUMMARY}", highlight=False)


def _source(options: argparse.Namespace, stack: ExitStack) -> ModelFolder | CompletionServer:
    from megatron_rl.checkpoint.as_model import find_checkpoint, link_as_model
    from megatron_rl.data.hub import local_model
    from megatron_rl.evaluation.sources import CompletionServer, ModelFolder

    if options.model.startswith(("http://", "https://")):
        return CompletionServer(
            options.model,
            model=options.model_name,
            tokenizer=options.tokenizer,
            concurrency=options.concurrency,
            timeout=options.timeout,
        )
    folder = local_model(Path(options.model), "MODEL")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a Hugging Face folder, a checkpoint, or http://HOST:PORT")
    if checkpoint := find_checkpoint(folder):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-rl-")))
        link_as_model(checkpoint, folder, options.base)
    return ModelFolder(
        folder,
        name=str(checkpoint or folder),
        device=options.device,
        dtype=options.dtype,
        max_positions=options.max_positions,
    )


def _with_agent(source: ModelFolder | CompletionServer, protocol: ProtocolSettings) -> Source:
    from megatron_rl.evaluation.agents import AgentSource

    return AgentSource(source, protocol)


def _name(model: str) -> str:
    """Returns a folder name for a model, such as `a-hf` for `runs/a/hf`."""
    parts = [part for part in model.replace("://", "/").replace(":", "/").split("/") if part not in ("", ".", "..")]
    return "-".join(parts[-2:])


def _progress_bar(console: Any, evaluation: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("problems"),
        TextColumn("{task.fields[score]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
