"""Prints a plan as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.config.passes import passes_of
from megatron_rl.plan.memory import host_bytes, node_bytes
from megatron_rl.plan.parameters import model_parameters
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.search import Choice
from megatron_rl.plan.times import checkpoint_bytes, step_flops
from megatron_rl.utils.format import counted, duration
from megatron_rl.utils.hardware import GIB


def show_plan(plan: Plan, alternatives: Sequence[tuple[Choice, Plan]], console: Console) -> None:
    """Prints a plan. alternatives: layouts that fit, if this one does not."""
    _show_run(plan, console)
    console.print(_placement(plan), _actor(plan))
    _show_engine(plan, console)
    console.print(_seconds(plan))
    for remark in plan.remarks:
        console.print(f"[yellow]note[/] {remark}")
    for problem in plan.problems:
        console.print(f"[bold red]does not fit[/] {problem}")
    if plan.problems:
        console.print("Nearest layouts that fit:" if alternatives else "No layout fits. Use more or larger GPUs.")
        for choice, other in alternatives:
            changed = set(choice.overrides) - set(Choice.of(plan.setup.config).overrides)
            console.print(f"  {' '.join(sorted(changed))}  ({duration(other.step_seconds)} per step)", highlight=False)
    else:
        console.print("[green]fits[/]")
    _show_assumptions(plan, console)


def show_layouts(found: Sequence[tuple[Choice, Plan]], count: int, console: Console) -> None:
    table = Table("TP", "PP", "DP", "recompute", "offload", "engines", "GiB", "s/step", "GPU hours", box=SIMPLE_HEAD)
    for choice, plan in found[:count]:
        table.add_row(
            *(str(value) for value in (choice.tensor, choice.pipeline, choice.data, choice.recompute)),
            "yes" if choice.offload else "no",
            f"{choice.engines} x TP {choice.engine_tensor}",
            f"{max(rank.peak for rank in plan.actor) / GIB:.1f}",
            f"{plan.step_seconds:.0f}",
            f"{plan.gpu_hours:,.0f}",
        )
    console.print(table, f"{len(found)} layouts fit; the {min(count, len(found))} fastest are shown")
    if found:
        console.print("The fastest:", " ".join(found[0][0].overrides), highlight=False, soft_wrap=True)


def _show_run(plan: Plan, console: Console) -> None:
    setup = plan.setup
    flops = sum(step_flops(setup).values())
    console.print(
        f"{setup.config.model.path}: {setup.model.family}, {model_parameters(setup.model) / 1e9:.2f} B parameters, "
        f"{setup.config.actor.dtype}\n"
        f"{plan.gpus} x {setup.gpu.name} on {counted(setup.config.cluster.nodes, 'node')}\n"
        f"each step: {setup.sequences} responses, {setup.step_tokens / 1e6:.2f} M tokens, "
        f"{flops:.2e} operations of the actor\n"
        f"{passes_of(setup.config)}\n"
        f"{counted(setup.config.train.steps, 'step')} of {duration(plan.step_seconds)}: "
        f"{duration(plan.step_seconds * setup.config.train.steps)}, {plan.gpu_hours:,.0f} GPU hours; "
        f"a checkpoint takes {checkpoint_bytes(setup) / GIB:.0f} GiB",
        highlight=False,
    )


def _placement(plan: Plan) -> Table:
    placement, layout = plan.setup.placement, plan.setup.layout
    table = Table("node", "actor ranks", "engines", box=SIMPLE_HEAD, title="placement", title_justify="left")
    for node in placement.nodes:
        ranks = [rank for rank, place in enumerate(placement.actors) if place == node]
        engines = [str(engine) for engine, place in enumerate(placement.engines) if place == node]
        if placement.shared:
            engines = [f"{engine} (ranks {_span(placement.shared[int(engine)])})" for engine in engines]
        stages = sorted({layout.stage_of(rank) for rank in ranks})
        text = f"{ranks[0]}-{ranks[-1]} (stage {', '.join(map(str, stages))})" if ranks else ""
        table.add_row(str(node), text, ", ".join(engines))
    return table


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _actor(plan: Plan) -> Table:
    """Returns the table of memory by phase; each phase shows the stage that needs the most."""
    title = f"memory of an actor rank in GiB ({plan.setup.gpu.name} has {plan.setup.gpu.memory / GIB:.1f})"
    table = Table("phase", "total", "parts", box=SIMPLE_HEAD, title=title, title_justify="left")
    for phase in plan.actor[0].phases:
        rank = max(plan.actor, key=lambda rank: rank.total(phase))
        parts = rank.phases[phase] | rank.reserved
        total = rank.total(phase)
        style = "bold red" if total > plan.setup.gpu.memory else ""
        table.add_row(phase, Text(f"{total / GIB:.1f}", style), _listed(parts))
    host = max(host_bytes(plan.setup, rank.stage) for rank in plan.actor)
    table.add_row("host memory", f"{host / GIB:.1f}", "per rank, besides its process")
    node = node_bytes(plan.setup)
    table.add_row("of a node", f"{sum(node.values()) / GIB:.1f}", _listed(node))
    return table


def _listed(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > 0.05 * GIB)


def _show_engine(plan: Plan, console: Console) -> None:
    if plan.engine is None:
        return
    rollout, engine = plan.setup.config.rollout, plan.engine
    size, room = engine.weights / GIB, max(0.0, engine.cache) / GIB
    console.print(
        f"each engine ({rollout.engine}, {rollout.engines} x TP {rollout.server.tensor_parallel}): "
        f"weights {size:.1f} GiB per GPU, KV cache {room:.1f} GiB = {engine.tokens:,.0f} tokens",
        highlight=False,
    )


def _seconds(plan: Plan) -> Table:
    table = Table("part of a step", "seconds", "share", box=SIMPLE_HEAD)
    for name, seconds in plan.seconds.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / plan.step_seconds:.0%}")
    table.add_row("total", f"{plan.step_seconds:.1f}", f"{plan.utilisation:.0%} of the matrix rate of all GPUs")
    return table


def _show_assumptions(plan: Plan, console: Console) -> None:
    assumed = plan.setup.assumed
    training = assumed.experts if plan.setup.model.experts else assumed.training
    console.print(
        f"[dim]Estimated, not measured. Assumed: prompts of {assumed.mean_prompt:.0f} and responses of "
        f"{assumed.mean_response:.0f} tokens on average, {training:.0%} of {plan.setup.gpu.flops / 1e12:.0f} "
        f"TFLOPS in training, {assumed.decoding:.0%} of {plan.setup.gpu.bandwidth / 1e12:.2f} TB/s in decoding, and "
        f"{assumed.links:.0%} of the rates of the links. Change an assumption with --assume name=value.[/]"
    )
