"""The processes of `test_methods_layouts.py`: the driver's own functions take a step with every method, under every
layout, through real Megatron ranks. Every rank runs the driver, with the answers of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.actor import platform
from megatron_rl.actor.optimizer.state import read_state
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import Weights, add_up
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.cluster.actors import StepResult, merge_tables
from megatron_rl.config import Config
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.passes import passes_of
from megatron_rl.models.weight_map import export_hf_weights
from megatron_rl.parallel.layout import Layout
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select
from megatron_rl.training.update import update
from tests.meeting import gathered, meeting_point, sent_to

VOCABULARY = 51  # odd: tensor parallelism pads it

TEMPERATURE = 0.9

LP_REG = {"rho": 0.5, "min_p": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "grpo, mean of sequences": {"name": "grpo", "grpo": {"aggregation": "sequence_mean_token_mean"}},
    "dr. grpo": {
        "name": "grpo",
        "advantage": "dr_grpo",
        "grpo": {"aggregation": "constant_length", "constant_length": 12},
    },
    "clip_higher": {"name": "clip_higher"},
    "dual_clip": {"name": "dual_clip", "dual_clip": {"clip_dual": 1.5}},
    "gspo": {"name": "gspo", "gspo": {"clip_low": 0.05, "clip_high": 0.05}},
    "cispo": {"name": "cispo", "cispo": {"clip_high": 0.5}},
    "kl_cov": {"name": "kl_cov", "kl_cov": {"share": 0.2}},
    "clip_cov": {"name": "clip_cov", "clip_cov": {"share": 0.1, "cov_low": 0.01, "cov_high": 3.0}},
    "high_entropy": {"name": "high_entropy"},
    "entropy_bonus": {"name": "entropy_bonus", "entropy_bonus": {"coefficient": 0.1}},
    "entropy_bonus, adapted": {
        "name": "entropy_bonus",
        "entropy_bonus": {"coefficient": 0.1, "target": 9.0, "step": 0.05},
    },
    "dppo": {"name": "dppo", "dppo": {"bound_low": 0.06, "bound_high": 0.06}},
    "dppo, kl": {"name": "dppo", "dppo": {"divergence": "kl", "bound_low": 1e-3, "bound_high": 1e-3}},
    "drpo": {"name": "drpo", "drpo": {"bound_low": 0.1, "bound_high": 0.1}},
    "sapo": {"name": "sapo"},
    "up": {"name": "up"},
    "vespo": {"name": "vespo"},
    "tre": {"name": "tre", "tre": {"coefficient": 0.1}},
    "tre, top-p": {"name": "tre", "tre": {"coefficient": 0.1, "region": "top_p", "top_p": 0.8}},
    "tre, min-p": {"name": "tre", "tre": {"coefficient": 0.1, "region": "min_p", "min_p": 0.1}},
    "stapo": {"name": "stapo", "stapo": {"tau_p": 0.5, "entropy_share": 0.7}},
    "lp_reg": {"lp_reg": LP_REG},
    "dppo, with lp_reg": {
        "name": "dppo",
        "dppo": {"bound_low": 0.06, "bound_high": 0.06},
        "with_lp_reg": LP_REG,
    },
    "gspo, with lp_reg, full, lagged": {
        "name": "gspo",
        "with_lp_reg": LP_REG | {"kl_estimator": "full"},
        "proxy_source": "lagged",
    },
    "clip_higher, with lp_reg, full": {"name": "clip_higher", "with_lp_reg": LP_REG | {"kl_estimator": "full"}},
    "lp_reg, ranked by the engine": {"lp_reg": LP_REG, "selection_log_probs": "rollout"},
    "lp_reg, current": {"lp_reg": LP_REG, "proxy_source": "current"},
    "lp_reg, lagged": {"lp_reg": LP_REG | {"require_below_proxy": True}, "proxy_source": "lagged"},
    "lp_reg, paper": {"preset": "paper", "lp_reg": LP_REG},
    "lp_reg, paper, current": {"preset": "paper", "lp_reg": LP_REG, "proxy_source": "current"},
    "lp_reg, paper, lagged": {"preset": "paper", "lp_reg": LP_REG, "proxy_source": "lagged"},
    "lp_reg, highest entropy": {"lp_reg": LP_REG | {"select_by": "entropy"}},
    "lp_reg, random": {"lp_reg": LP_REG | {"select_by": "random"}},
    "lp_reg, all negatives": {"lp_reg": LP_REG | {"select_by": "all"}},
    "lp_reg, both signs": {"lp_reg": LP_REG | {"advantage_sign": "both", "kl_estimator": "full"}},
    "lp_reg, reverse KL": {"lp_reg": LP_REG | {"kl_estimator": "reverse"}},
    "lp_reg, no tau": {"lp_reg": LP_REG | {"min_p": 0.0}, "proxy_source": "lagged"},
    "lp_reg, fixed tau": {"lp_reg": {"rho": 0.5, "fixed_tau": 0.02}},
    "grpo, reference": {"name": "grpo", "reference_kl": {"coefficient": 0.3}},
    "high_entropy, reference k1": {"name": "high_entropy", "reference_kl": {"coefficient": 0.3, "estimator": "k1"}},
    "lp_reg, truncated weights": {"lp_reg": LP_REG, "correction": {"weights": "truncated", "high": 1.05}},
    "gspo, masked weights, sequences rejected": {
        "name": "gspo",
        "correction": {"weights": "masked", "low": 0.9, "high": 1.1, "reject_sequences": True},
    },
}
"""The `algorithm` section of each method. The published rule that ranks within a micro-batch is left out on purpose."""
QUICK_METHODS = (
    *("grpo", "gspo", "kl_cov", "clip_cov", "high_entropy", "entropy_bonus, adapted", "dppo, kl", "vespo"),
    *("tre, top-p", "stapo", "lp_reg", "lp_reg, paper, lagged", "lp_reg, random", "dppo, with lp_reg"),
    *("gspo, with lp_reg, full, lagged", "grpo, reference", "gspo, masked weights, sequences rejected"),
)
"""Methods of `make test`: one or more of each that looks at the batch, the group, the sequence or another policy in a
way of its own. The other methods combine the same in other ways."""
DRAWN_BY_PLACE = ("clip_cov", "lp_reg, random")
"""Methods that draw by a token's index in the batch, so that another order of sequences gives another draw."""

SEQUENCE_BY_SEQUENCE = "one rank, one sequence at a time"
PLAIN: dict[str, Any] = {"rows": "padded", "lm_head": "materialised"}
VARIANTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one rank": (Layout(), PLAIN),
    "one rank, fused": (Layout(), {}),
    "one rank, packed": (Layout(), {"rows": "packed", "lm_head": "materialised", "micro_batch_tokens": 60}),
    "one rank, rows shuffled": (Layout(), {}),
    SEQUENCE_BY_SEQUENCE: (Layout(), {"micro_batch_tokens": 1}),
    "tp2, padded and materialised": (Layout(tensor=2), PLAIN),
    "tp2": (Layout(tensor=2), {}),
    "tp4": (Layout(tensor=4), {"micro_batch_tokens": 40}),
    "pp2": (Layout(pipeline=2), {"micro_batch_tokens": 40}),
    "dp2": (Layout(data=2), {}),
    "dp4": (Layout(data=4), {"micro_batch_tokens": 40}),
    "tp2-pp2": (Layout(tensor=2, pipeline=2), {"micro_batch_tokens": 40}),
}
"""All others are compared with the first: padded rows, materialised logits."""
GROUPS, SAMPLES, SEED = 6, 3, 7
SAMPLED = "sampled.pt"
POLICIES = ("lagged", "reference", "old", "new")
"""Folders of four models of one shape."""


def prompts() -> list[tuple[Array, int]]:
    """Returns the prompt and the number of sampled tokens of each sequence, group after group."""
    random = np.random.default_rng(5)
    of_groups = [random.integers(0, VOCABULARY, random.integers(1, 6)) for _ in range(GROUPS)]
    return [(prompt, int(random.integers(1, 13))) for prompt in of_groups for _ in range(SAMPLES)]


def batch(folder: Path, order: Array) -> TrainingBatch:
    """Sequences as the engine sampled them, in the given order. Two groups have no advantage."""
    sampled = torch.load(folder / SAMPLED)
    sequences = SequenceBatch.of(
        [tokens.numpy() for tokens in sampled["tokens"]], [len(prompt) for prompt, _ in prompts()]
    )
    groups = np.repeat(np.arange(GROUPS), SAMPLES)
    advantages = np.random.default_rng(4).normal(size=len(groups)).round(2)
    advantages[np.isin(groups, (1, 4))] = 0.0
    per_token = sequences.per_token(advantages).astype(np.float32)
    sequences = sequences.with_values(advantages=per_token, rollout_log_probs=sampled["log_probs"].numpy())
    fresh = np.ones(sequences.num_sampled_tokens, dtype=bool)
    return TrainingBatch(sequences.take(order), groups[order], advantages[order], fresh)


class AllRanks:
    """`cluster.actors.Actors` without Ray: this process is one of the ranks and receives the results of the others."""

    def __init__(self, worker: MegatronWorker) -> None:
        self.worker = worker
        self.ran = {"forwards": 0, "backwards": 0}
        """Number of micro-batches through this rank's part of the model in the latest call."""
        self.passes: list[dict[str, Any]] = []
        worker.model.register_forward_pre_hook(lambda *_: self._count("forwards"))
        worker.model.decoder.register_full_backward_pre_hook(lambda *_: self._count("backwards"))

    def _count(self, what: str) -> None:
        self.ran[what] += 1

    def _note(self, what: str, batch: SequenceBatch) -> None:
        self.passes.append({"what": what, "rows": len(batch), **self.ran})
        self.ran = dict.fromkeys(self.ran, 0)

    def score(self, batch: SequenceBatch, *, temperature: float, weights: Weights = "current") -> dict[str, Array]:
        return self.score_and_store(batch, temperature=temperature, weights=weights)[0]

    def score_and_store(
        self, batch: SequenceBatch, *, temperature: float, weights: Weights = "current"
    ) -> tuple[dict[str, Array], StoredProxy]:
        if not len(batch):
            return merge_tables(batch, [])
        tables = gathered(self.worker.score(sent_to(self.worker, batch), temperature, weights))
        self._note(weights, batch)
        return merge_tables(batch, tables)

    def train(self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float) -> StepResult:
        parts = gathered(self.worker.train(sent_to(self.worker, batch), lr, denominator, temperature))
        self._note("train", batch)
        return StepResult(
            values=merge_tables(batch, [part.table for part in parts])[0],
            loss=sum(part.loss for part in parts),
            metrics=add_up(part.metrics for part in parts),
            grad_norm=parts[0].grad_norm,
        )

    def gradient(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update by Hugging Face name: Adam's first moment, which here holds nothing of the
        past."""
        state, _ = read_state(self.worker.optimizer, self.worker.model)
        parts = gathered(dict(export_hf_weights(self.worker.model, self.worker.hf_config, state["exp_avg"])))
        return {name: tensor for part in parts for name, tensor in part.items()}


def learner_of(algorithm: dict[str, Any], updates: int, actors: Any) -> Learner:
    config = Config.model_validate(
        {
            "run": {"name": "x", "folder": "x"},
            "model": {"path": "x"},
            "data": {"train": "x.jsonl"},
            "rollout": {"prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_response_tokens": 12}
            | {"temperature": TEMPERATURE},
            "reward": {"name": "math"},
            "algorithm": algorithm,
            "train": {"steps": 1, "updates_per_rollout": updates},
        }
    )
    return Learner(config, actors, LossChoice.of(config.algorithm).make(), passes_of(config))


def step(name: str, updates: int, actors: AllRanks, folder: Path, shuffled: bool) -> dict[str, Any]:
    """Takes one step: scores the old policy and, with several updates, updates a new policy on mini-batches."""
    worker, algorithm = actors.worker, METHODS[name]
    order = np.arange(GROUPS * SAMPLES)
    in_order = batch(folder, order)
    if shuffled:
        order = np.random.default_rng(9).permutation(len(order))
    learner, before = learner_of(algorithm, updates, actors), batch(folder, order)
    actors.passes = []
    worker.load_hf(folder / "old")
    worker.set_loss(LossChoice.of(learner.config.algorithm))
    after = score_old_policy(learner, before)
    after, metrics = select(learner, after, SEED)
    after = score_reference(learner, score_lagged_policy(learner, 2, after))
    if updates > 1:
        worker.load_hf(folder / "new")
    after, updated = update(learner, 2, after, lr=0.0, seed=SEED)
    selected = np.zeros(after.sequences.num_sampled_tokens, dtype=bool)
    selected[in_order.sequences.token_index(order)] = after.sequences.values.get("selected", False)
    return {
        "selected": selected,
        "metrics": metrics | updated,
        "gradient": actors.gradient(),
        "passes": actors.passes,
    }


def find(rank: int, name: str, methods: list[str], folder: Path) -> dict[str, Any]:
    """Returns the results of the methods under one layout."""
    layout, settings = VARIANTS[name]
    actor = ActorSettings.model_validate({"device": "cpu"} | settings)
    worker = MegatronWorker(actor, layout, rank)
    worker.start(*meeting_point(worker, folder / f"{name}.port"), folder / "old")
    for policy in ("lagged", "reference"):
        worker.load_hf(folder / policy)
        worker.snapshot(policy)
    worker.build_optimizer(OptimizerSettings(betas=(0.0, 0.999), clip_grad=0.0))
    actors = AllRanks(worker)
    found = {
        (method, updates): step(method, updates, actors, folder, "shuffled" in name)
        for method in methods
        for updates in (1, 2)
    }
    dist.barrier()
    worker.close()
    return found


def run_rank(rank: int, names: list[str], methods: list[str], folder: Path) -> dict[str, Any]:
    """Returns, by name of a layout, what each method did under it."""
    platform.prepare("cpu")
    return {name: find(rank, name, methods, folder) for name in names if rank < VARIANTS[name][0].world_size}
