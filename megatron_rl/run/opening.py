"""Opens a run: checks everything that can be checked, the cheapest first, then starts the processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.checkpoint.manifest import ModelFolder, Origin
from megatron_rl.checkpoint.retention import Retention
from megatron_rl.checkpoint.save import Saver
from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.runtime import Nodes, ray_runtime
from megatron_rl.cluster.watch import Watch
from megatron_rl.config import Config
from megatron_rl.config.checks import contradictions
from megatron_rl.config.passes import passes_of
from megatron_rl.data.cursor import Cursor
from megatron_rl.data.prompts import PromptSet
from megatron_rl.errors import UserError
from megatron_rl.observability.diagnosis import Diagnosis
from megatron_rl.observability.make_view import make_view
from megatron_rl.observability.metrics import MetricsLog, read_metrics
from megatron_rl.observability.provenance import Provenance
from megatron_rl.observability.sinks import open_sinks
from megatron_rl.observability.state import KeptView
from megatron_rl.observability.timing import Phases
from megatron_rl.observability.view import View
from megatron_rl.parallel.layout import layout_of
from megatron_rl.parallel.placement import Placement, placement_of
from megatron_rl.reward.decode import decoder_of
from megatron_rl.reward.grader import open_grader
from megatron_rl.reward.grading import Grading
from megatron_rl.rollout.collector import RolloutCollector
from megatron_rl.rollout.contract import Contract
from megatron_rl.rollout.group_filter import group_filter_of
from megatron_rl.rollout.replay import Replay
from megatron_rl.run import folder as run_folder
from megatron_rl.run.inputs import InputChecks
from megatron_rl.run.launch import launch_of
from megatron_rl.run.prepare import prepare
from megatron_rl.run.recorder import Recorder
from megatron_rl.run.reference import find_reference
from megatron_rl.run.requirements import check_engine, check_gpus, check_trackers
from megatron_rl.run.resume import changed_metrics, check_resumption, data_file, origin_of, resume, same_data
from megatron_rl.run.run import Inputs, Run
from megatron_rl.run.sampling import rollout_sampling, step_sampling
from megatron_rl.run.stack import check_stack
from megatron_rl.run.warm_start import warm_start
from megatron_rl.run.weights import open_weight_sync
from megatron_rl.training.learner import Learner
from megatron_rl.utils import heartbeat
from megatron_rl.utils.format import counted

LONGEST_EXAMPLE = 2_000
"""Number of characters of a prompt that are shown before training."""


def load_inputs(config: Config) -> Inputs:
    """Loads and checks everything that a run reads. Nothing is started or written yet. Raises UserError."""
    inputs = InputChecks(config)
    for _, check in inputs.in_order():
        check()
    assert inputs.prompts
    return Inputs(
        tokenizer=inputs.tokenizer,
        train=inputs.prompts.train,
        suites={name: suite.prompts for name, suite in inputs.prompts.suites.items()},
        probes=inputs.probes,
        stop_token_ids=inputs.stop_token_ids,
    )


def with_device(config: Config) -> Config:
    """Returns the configuration with `actor.device: auto` decided, so that every process agrees."""
    if config.actor.device != "auto":
        return config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decided = config.model_copy(update={"actor": config.actor.model_copy(update={"device": device})})
    if problems := contradictions(decided):  # some settings need a GPU
        raise UserError("\n".join(problems))
    return decided


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Yields a run that is ready for its next step. All processes end with the block, however it ends."""
    config = with_device(config)
    with ExitStack() as stack:
        if resuming := run_folder.holds_run(config.run.folder):  # before a checkpoint is chosen that the run may remove
            stack.enter_context(run_folder.held(config.run.folder))
        resumption = run_folder.checkpoint_to_resume(config)
        state = resumption.manifest.state if resumption else None
        replay = _replay(config)
        choice = LossChoice.of(config.algorithm)
        loss = choice.make()
        placement = placement_of(config)
        _check_machine(config, placement)
        shown = make_view(config.observability.view, config.train.steps, config.run.name)
        view = stack.enter_context(KeptView(shown, config.run.folder, config.train.steps, config.run.name))
        prepare(config, view)
        view.phase("loading data")
        inputs = load_inputs(config)
        data, continues = data_file(config), False
        if resumption:
            check_resumption(config, resumption)
            continues = same_data(config, data, resumption)
        cursor = Cursor(len(inputs.train.prompts), config.seed, config.data.shuffle)
        if state and continues:
            cursor.load_state(state.cursor)
        if not resuming:
            stack.enter_context(run_folder.held(config.run.folder))
            run_folder.check_still_free(config.run.folder)
        changes = run_folder.create(config)
        view.open()
        provenance = Provenance(config)
        decode = decoder_of(inputs.tokenizer)
        grader = stack.enter_context(open_grader(config.reward, config.run.folder / "logs" / "reward.log", decode))
        grading = Grading(grader, config.reward)
        for line in (*_introduction(config, inputs.train, changes), *changed_metrics(config.run.folder, resumption)):
            view.message(line)
        last_step = None if config.resume == "never" else (state.step if state else -1)
        sinks = open_sinks(
            config.observability, config.run.name, config.run.folder, config.model_dump(mode="json"), last_step
        )
        metrics = MetricsLog(config.run.folder, keep_up_to_step=last_step, sinks=sinks)
        stack.callback(metrics.close)
        rows = read_metrics(config.run.folder)
        view.history(rows)
        view.phase("starting Ray")
        nodes = _start_ray(config, placement, stack)
        provenance.ran_on(nodes.hosts)
        origin = resumption.manifest.origin if resumption else None
        actors, engines, reference = _start(config, choice, inputs, view, stack, nodes, origin)
        weights = open_weight_sync(config, actors, engines, view, stack) if engines else None
        sampler = _sampler(config, engines, actors, inputs, stack)
        phase = Phases(view.phase)
        run = Run(
            config=config,
            folder=config.run.folder,
            inputs=inputs,
            cursor=cursor,
            rollouts=replay or _collector(config, sampler, inputs, cursor, grading, phase),
            grading=grading,
            learner=Learner(config, actors, loss, passes_of(config)),
            engines=engines,
            sampler=sampler,
            weights=weights,
            contract=_contract(config, inputs, view),
            saver=stack.enter_context(_saver(config, actors, origin_of(config, reference, data), view)),
            recorder=Recorder(config, config.run.folder, actors, phase),
            view=view,
            metrics=metrics,
            diagnosis=Diagnosis(config.run.folder, config.observability.diagnosis, config.algorithm, rows),
            phase=phase,
            provenance=provenance,
        )
        if resumption:
            resume(run, resumption, with_buffer=continues)
        view.phase("sending weights to the engines")
        run.sync_weights()
        yield run


def _introduction(config: Config, prompts: PromptSet, changes: Sequence[str]) -> list[str]:
    lines = [f"run folder: {config.run.folder}", _describe(prompts), _example(config, prompts)]
    return lines + [f"resumed with another setting: {change}" for change in changes]


def _check_machine(config: Config, placement: Placement) -> None:
    """Raises UserError if this machine lacks what the configuration asks for."""
    check_gpus(placement)
    check_trackers(config)
    check_engine(config)
    check_stack(config)


def _start_ray(config: Config, placement: Placement, stack: ExitStack) -> Nodes:
    logs = config.run.folder / "logs"
    stack.callback(shutil.rmtree, logs / heartbeat.FOLDER, ignore_errors=True)
    shutil.rmtree(logs / heartbeat.FOLDER, ignore_errors=True)  # left by a killed run
    return stack.enter_context(ray_runtime(placement, Watch(logs, config.observability.hang_seconds)))


def _start(
    config: Config,
    choice: LossChoice,
    inputs: Inputs,
    view: View,
    stack: ExitStack,
    nodes: Nodes,
    resumed: Origin | None,
) -> tuple[Actors, Engines | None, ModelFolder | None]:
    """Starts the actor with its loss and optimizer, and the engines; returns both, and the reference model.

    `resumed`: origin of the checkpoint that the run resumes from. The checkpoint has the weights: no warm start.
    """
    logs, layout = config.run.folder / "logs", layout_of(config.actor)
    view.phase("starting the actor")
    actors = Actors(config.actor, layout, config.model.path, logs, nodes)
    stack.callback(actors.close)
    stack.enter_context(actors.losses_named())
    view.message(f"actor: {counted(layout.world_size, 'rank')}, {actors.description}")
    warm_started = cache(partial(warm_start, config, actors, inputs.tokenizer, view))
    model_folder = config.model.path if resumed else warm_started()
    reference = find_reference(config, resumed.reference if resumed else None, warm_started)
    if reference:
        actors.load_hf(Path(reference.path))
        actors.snapshot("reference")
    actors.load_hf(model_folder)
    actors.prepare(choice, config.actor.optimizer)
    if config.rollout.replay:
        return actors, None, reference
    view.phase("starting engines")
    engines = Engines(config.rollout, launch_of(config, model_folder), logs, nodes, view.message)
    stack.callback(engines.close)
    return actors, engines, reference


def _sampler(
    config: Config, engines: Engines | None, actors: Actors, inputs: Inputs, stack: ExitStack
) -> Engines | AgentRollouts | None:
    """What samples the responses: the engines, or the agent that uses them."""
    settings = config.rollout.agent
    if engines is None or settings is None:
        return engines
    longest = launch_of(config, config.model.path).max_tokens
    sampler = stack.enter_context(AgentRollouts(settings, load_agent(settings), engines, inputs.tokenizer, longest))
    if config.rollout.asynchronous:
        actors.meanwhile = sampler.keep_going
    return sampler


def _collector(
    config: Config,
    sampler: Engines | AgentRollouts | None,
    inputs: Inputs,
    cursor: Cursor,
    grading: Grading,
    phase: Phases,
) -> RolloutCollector:
    assert sampler, "only a replay has no engines"
    return RolloutCollector(
        config,
        sampler,
        inputs.train.prompts,
        cursor,
        grading,
        partial(step_sampling, config, inputs.stop_token_ids),
        phase,
        group_filter_of(config.rollout),
    )


def _contract(config: Config, inputs: Inputs, view: View) -> Contract:
    sampling = rollout_sampling(config, inputs.stop_token_ids)
    return Contract(config.rollout, config.actor.dtype, inputs.train.prompts, sampling, view.message)


def _replay(config: Config) -> Replay | None:
    """Raises UserError if there are fewer recorded steps than the configuration needs."""
    if config.rollout.replay is None:
        return None
    replay = Replay(config.rollout.replay)
    if config.train.steps > len(replay):
        raise UserError(
            f"train.steps: {config.train.steps}, but {replay.folder} holds the rollouts of {len(replay)} steps"
        )
    return replay


def _saver(config: Config, actors: Actors, origin: Origin, view: View) -> Saver:
    keep = Retention(config.train.keep_checkpoints, config.train.keep_best)
    return Saver(config.run.folder / "checkpoints", actors, origin, keep, view.message)


def _example(config: Config, prompts: PromptSet) -> str:
    text = prompts.prompts[0].text
    shown = text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} ..."
    return f"first prompt, as the model sees it (data.template: {config.data.template}):\n{shown}"


def _describe(prompts: PromptSet) -> str:
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in prompts.dropped.items())
    truncated = f", {prompts.truncated} truncated" if prompts.truncated else ""
    return f"data: {len(prompts.prompts)} prompts ({prompts.schema} schema){dropped}{truncated}"
