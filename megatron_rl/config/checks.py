"""Checks across several keys: settings that contradict each other, and combinations that are not available."""

from __future__ import annotations

from collections.abc import Iterator

from lpreg.advantages import ESTIMATORS
from lpreg.losses.registry import METHODS
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind, supporting

from .algorithm import CorrectionSettings
from .evaluation import MACRO_MEAN
from .kernels import impossible_kernels
from .methods import lp_reg_term, method_problems, method_settings
from .passes import passes_of
from .reward import REMOTE
from .rollout import ServerSettings
from .schema import Config
from .weight_sync import BROADCASTS


def contradictions(config: Config) -> list[str]:
    """Returns one sentence per problem, with the keys involved; an empty list if the settings are consistent."""
    return [
        *_algorithm(config),
        *_updates(config),
        *_parallel(config),
        *_rollout(config),
        *_weight_sync(config),
        *_reward(config),
        *_rest(config),
    ]


def _algorithm(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    within_group = algorithm.advantage in ESTIMATORS and algorithm.advantage != "reinforce_plus_plus"
    if config.rollout.samples_per_prompt < 2 and within_group:
        yield (
            "rollout.samples_per_prompt: 1 is given, but advantages are relative to the other responses of a group "
            f"(algorithm.advantage: {algorithm.advantage}); give at least 2"
        )
    if config.rollout.dynamic_sampling and config.rollout.samples_per_prompt < 2:
        yield "rollout.dynamic_sampling: a group of one response (rollout.samples_per_prompt: 1) never has a signal"
    if algorithm.overlong.buffer_tokens > config.rollout.max_response_tokens:
        yield (
            f"algorithm.overlong.buffer_tokens: {algorithm.overlong.buffer_tokens} is more than "
            f"rollout.max_response_tokens: {config.rollout.max_response_tokens}"
        )
    if algorithm.advantage == "maxrl":
        yield from _negative_rewards(config)
    correction = list(_correction(algorithm.correction))
    yield from correction
    if not correction:  # the method's passes cannot be stated for a correction that is wrong
        yield from _method(config)


def _negative_rewards(config: Config) -> Iterator[str]:
    """The settings that lower rewards below the verifier's score, which for wrong answers is 0."""
    overlong = config.algorithm.overlong
    tokens = overlong.buffer_tokens
    causes = {
        f"algorithm.overlong.buffer_tokens: {tokens} would cause; set it to 0": tokens > 0 and overlong.penalty > 0,
        "reward.format.penalty would cause; leave reward.format out": config.reward.format is not None,
    }
    for cause, given in causes.items():
        if given:
            yield f"algorithm.advantage: maxrl takes no negative rewards, which {cause}"


def _correction(correction: CorrectionSettings) -> Iterator[str]:
    if correction.weights == "masked" and correction.low >= correction.high:
        yield f"algorithm.correction.low: {correction.low} must be below algorithm.correction.high: {correction.high}"
    if correction.reject_sequences and correction.sequence_low >= correction.sequence_high:
        yield (
            f"algorithm.correction.sequence_low: {correction.sequence_low} must be below "
            f"algorithm.correction.sequence_high: {correction.sequence_high}"
        )


def _method(config: Config) -> Iterator[str]:
    """Checks the settings of the method against other sections. A user's own method is not imported here."""
    algorithm = config.algorithm
    if algorithm.name not in METHODS or method_problems(algorithm):
        return
    passes = passes_of(config)
    term = lp_reg_term(algorithm)
    settings = term or method_settings(algorithm)
    section = "algorithm.with_lp_reg" if term else f"algorithm.{algorithm.name}"
    if (passes.stores_old_proxy or passes.stores_lagged_proxy) and getattr(settings, "min_p", None) == 0:
        yield (
            f"{section}.min_p: 0 with the full KL and algorithm.proxy_source: {algorithm.proxy_source} would "
            f"store the whole vocabulary for every selected token; set {section}.kl_estimator to k3"
        )


def _updates(config: Config) -> Iterator[str]:
    train, prompts = config.train, config.rollout.prompts_per_step
    if train.updates_per_rollout % train.epochs_per_rollout:
        yield (
            f"train.updates_per_rollout: {train.updates_per_rollout} is not a multiple of train.epochs_per_rollout: "
            f"{train.epochs_per_rollout}, so the passes over the rollouts cannot have equally many updates"
        )
    elif prompts * train.epochs_per_rollout % train.updates_per_rollout:
        yield (
            f"rollout.prompts_per_step: {prompts} cannot be split into "
            f"{train.updates_per_rollout // train.epochs_per_rollout} equal mini-batches "
            "(train.updates_per_rollout / train.epochs_per_rollout)"
        )


def _mini_batch_prompts(config: Config) -> int:
    """Returns the prompts per update: at least 1, so that a wrong setting elsewhere causes no second error."""
    train = config.train
    return max(1, config.rollout.prompts_per_step * train.epochs_per_rollout // train.updates_per_rollout)


def _parallel(config: Config) -> Iterator[str]:
    actor = config.actor
    if actor.device == "cpu" and actor.context_parallel > 1:
        yield (
            f"actor.context_parallel: {actor.context_parallel} is not for a CPU: it needs the attention of Transformer "
            "Engine, which runs on CUDA only; set it to 1 and raise tensor_parallel or pipeline_parallel instead"
        )
    if actor.device == "cpu" and actor.fp8 != "none":
        yield f"actor.fp8: {actor.fp8} is not for a CPU: FP8 needs Transformer Engine on CUDA; set it to none"
    if actor.device == "cpu" and actor.expert_gemm == "grouped":
        yield (
            "actor.expert_gemm: grouped is not for a CPU: grouped matrix products need Transformer Engine, which runs "
            "on CUDA only; set it to auto or sequential"
        )
    if actor.device != "cpu" and actor.context_parallel > 1 and actor.dtype != "bfloat16":
        yield (
            f"actor.context_parallel: {actor.context_parallel} needs actor.dtype: bfloat16: Transformer Engine has no "
            "context-parallel attention in float32"
        )
    if actor.fp8 != "none" and actor.dtype != "bfloat16":
        yield f"actor.fp8: {actor.fp8} is a form of bfloat16 training; set actor.dtype to bfloat16"
    yield from impossible_kernels(actor)
    for key, forms in (("context_parallel", ("prefix_tree", "padded")), ("virtual_pipeline", ("padded",))):
        if getattr(actor, key) > 1 and actor.rows in forms:
            yield f"actor.{key}: {getattr(actor, key)} needs packed rows, not {actor.rows}; set actor.rows to packed"
    rows = _mini_batch_prompts(config) * config.rollout.samples_per_prompt
    if actor.data_parallel > rows:
        yield (
            f"actor.data_parallel: {actor.data_parallel} copies are more than the {rows} rows of an update "
            "(rollout.prompts_per_step x rollout.samples_per_prompt x train.epochs_per_rollout / "
            "train.updates_per_rollout)"
        )
    if config.rollout.engines > config.rollout.prompts_per_step:
        yield (
            f"rollout.engines: {config.rollout.engines} engines are more than "
            f"rollout.prompts_per_step: {config.rollout.prompts_per_step}"
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.replay and config.evaluation.suites:
        yield "evaluation.suites: a run that replays rollouts has no engine for evaluation; give evaluation.suites={}"
    if rollout.replay and config.train.rollout_only:
        yield "rollout.replay and train.rollout_only together leave nothing to do; give only one of them"
    ahead = 1 + rollout.max_staleness - rollout.asynchronous
    if rollout.asynchronous and not rollout.max_staleness:
        yield (
            "rollout.asynchronous: responses that are sampled during training are one step old when they are trained "
            "on, which rollout.max_staleness: 0 forbids; set it to 1 or more"
        )
    elif rollout.max_staleness and rollout.over_sampling > ahead:
        yield (
            f"rollout.over_sampling: {rollout.over_sampling:g} prompts in flight per prompt needed cannot all be "
            f"trained on within rollout.max_staleness: {rollout.max_staleness} steps"
            f"{' of an asynchronous run' if rollout.asynchronous else ''}; give at most {ahead}"
        )
    if rollout.max_staleness and config.algorithm.correction.weights == "none":
        yield (
            "algorithm.correction.weights: none would treat tokens of older weights (rollout.max_staleness: "
            f"{rollout.max_staleness}) as if the current policy had sampled them; set it to truncated or masked"
        )
    if rollout.server.quantised and config.algorithm.correction.weights == "none":
        yield (
            "algorithm.correction.weights: none would treat the tokens of quantised engines (--quantization in "
            "rollout.server.arguments) as if the actor had sampled them; set it to truncated or masked"
        )
    if config.reward.name == "agent" and not config.rollout.agent:
        yield "reward.name: agent takes the reward of an agent, but rollout.agent names none"
    yield from _engine(config)
    if rollout.server.urls and len(rollout.server.urls) != rollout.engines:
        yield (
            f"rollout.server.urls: {len(rollout.server.urls)} servers are given for rollout.engines: "
            f"{rollout.engines}; give one server per engine"
        )
    if rollout.asynchronous and config.cluster.colocate:
        yield "rollout.asynchronous: engines on the actor's GPUs (cluster.colocate) cannot sample during training"
    if rollout.server.urls and config.cluster.colocate:
        yield "cluster.colocate: external servers (rollout.server.urls) share no GPUs with the actor"


def _engine(config: Config) -> Iterator[str]:
    rollout, transport = config.rollout, config.weight_sync.transport
    try:
        kind = engine_kind(rollout.engine)
    except UserError as error:
        yield str(error)
        return
    if kind.embedded and rollout.server != ServerSettings():
        yield f"rollout.server: read by servers only, such as rollout.engine: sglang or vllm, not by {kind.name}"
    elif rollout.server.router and not (isinstance(kind, ServerKind) and kind.router):
        yield f"rollout.server.router: sglang-router is for rollout.engine: sglang, not for {kind.name}"
    if transport != "auto" and transport not in kind.transports:
        others = " or ".join(supporting(transport))
        yield (
            f"weight_sync.transport: {transport} is for rollout.engine: {others}; {kind.name} supports "
            f"{', '.join(kind.transports)}"
        )


def _weight_sync(config: Config) -> Iterator[str]:
    transport = config.weight_sync.transport
    if transport == "cuda_ipc":
        yield from _cuda_ipc(config)
    if transport in BROADCASTS and config.cluster.colocate and config.actor.device != "cpu":
        yield (
            f"weight_sync.transport: {transport} is not for cluster.colocate: nccl allows one process per GPU; set "
            "shared_memory or disk"
        )
    if transport == "shared_memory" and config.cluster.nodes > 1 and not config.cluster.colocate:
        yield (
            "weight_sync.transport: shared_memory reaches several nodes only if every engine is on a node of the actor "
            "(cluster.colocate); set disk, or collective for servers with GPUs of their own"
        )
    if transport not in ("disk", "auto") and config.weight_sync.folder:
        yield f"weight_sync.folder: used by weight_sync.transport: disk only, not by {transport}"


def _cuda_ipc(config: Config) -> Iterator[str]:
    if config.actor.device == "cpu":
        yield "weight_sync.transport: cuda_ipc is memory of GPUs, but actor.device is cpu; set shared_memory"
        return
    if config.cluster.nodes > 1:
        yield "weight_sync.transport: cuda_ipc reaches one node only, but cluster.nodes is larger; set shared_memory"
    elif not config.cluster.colocate:
        yield (
            "weight_sync.transport: cuda_ipc is for engines on the actor's GPUs (cluster.colocate); for engines with "
            "GPUs of their own, set collective"
        )


def _reward(config: Config) -> Iterator[str]:
    name = config.reward.name
    if (name == REMOTE) != (config.reward.remote is not None):
        yield "reward.name: remote and reward.remote.url: URL go together; give both or neither"
    if name == "code" and config.reward.timeout_seconds <= config.reward.code.test_seconds:
        yield (
            f"reward.timeout_seconds: {config.reward.timeout_seconds:g} covers all tests of a program and must exceed "
            f"reward.code.test_seconds: {config.reward.code.test_seconds:g}, which covers one test"
        )


def _rest(config: Config) -> Iterator[str]:
    optimizer = config.actor.optimizer
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= config.train.steps:
        yield (
            f"actor.optimizer.warmup_steps: {optimizer.warmup_steps} leaves no step of train.steps: "
            f"{config.train.steps} for the {optimizer.schedule} schedule"
        )
    yield from _keep_best(config)
    if config.evaluation.probes and not config.evaluation.suites:
        yield "evaluation.probes are measured on suites, but evaluation.suites is empty"


def _keep_best(config: Config) -> Iterator[str]:
    keep, evaluation = config.train.keep_best, config.evaluation
    if keep is None:
        return
    suite, _, measure = keep.metric.removeprefix("eval/").rpartition("/")
    if keep.metric == MACRO_MEAN:
        if len(evaluation.suites) < 2:
            yield (
                f"train.keep_best.metric: {MACRO_MEAN} is the mean over several suites, and evaluation.suites has "
                f"{len(evaluation.suites)}; give eval/<suite>/<measure>, or more suites"
            )
    elif not keep.metric.startswith("eval/") or suite not in evaluation.suites or not measure:
        suites = ", ".join(evaluation.suites) or "none"
        yield (
            f"train.keep_best.metric: {keep.metric!r} is not measured; give eval/<suite>/<measure>, such as "
            f"eval/<suite>/avg@{evaluation.samples_per_prompt}, with one of evaluation.suites: {suites}, "
            f"or {MACRO_MEAN}"
        )
    save, every = config.train.save_every, evaluation.every
    if not (save and every and (save % every == 0 or every % save == 0)):
        yield (
            f"train.keep_best compares the evaluations of saved steps: give both train.save_every ({save}) and "
            f"evaluation.every ({every}), with one a multiple of the other"
        )
