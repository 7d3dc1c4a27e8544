"""Checks of lpreg's trainer for TRL: settings that it would ignore, and layouts in which it would not be exact."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import trl

from lpreg import PolicyLoss
from lpreg.losses.base import WrappedLoss
from lpreg.losses.with_lp_reg import WithLpReg

WRITTEN_FOR = "1.16."
"""TRL's release series; the trainer overrides methods that are not part of TRL's public interface."""

OF_TRLS_LOSS = {
    *("loss_type", "epsilon", "epsilon_high", "delta", "beta", "importance_sampling_level", "top_entropy_quantile"),
    *("entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold", "sapo_temperature_neg"),
    *("sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}


def check_version() -> None:
    """Raises ImportError for another release series of TRL."""
    if not trl.__version__.startswith(WRITTEN_FOR):
        raise ImportError(f"lpreg.integrations.trl is written for TRL {WRITTEN_FOR}x, not for {trl.__version__}")


OF_TRLS_ADVANTAGES = {"scale_rewards", "multi_objective_aggregation"}


def check_config(config: trl.GRPOConfig, *, own_advantages: bool = False) -> None:
    """Raises ValueError for settings of TRL's own loss, or of its advantages if lpreg computes these, and for updates
    that are not complete when they begin."""
    changed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    if own_advantages and (unread := sorted(changed & OF_TRLS_ADVANTAGES)):
        raise ValueError(
            f"GRPOConfig: {', '.join(unread)}: settings of TRL's own advantages, which `advantage` replaces; leave "
            "them out"
        )
    if ignored := [f.name for f in fields(config) if f.name in changed & OF_TRLS_LOSS]:
        raise ValueError(
            f"GRPOConfig: {', '.join(ignored)}: settings of TRL's own loss, which `loss` replaces; leave them out and "
            "give the method its own, as in loss=lpreg.make_loss('clip_higher', clip_high=0.3)"
        )
    if config.steps_per_generation % config.gradient_accumulation_steps:
        raise ValueError(
            f"GRPOConfig: steps_per_generation is {config.steps_per_generation}; it must be a multiple of "
            f"gradient_accumulation_steps, {config.gradient_accumulation_steps}, so that all tokens of an update are "
            "known, ranked and counted, before its first backward"
        )


def check_trainer(trainer: Any, loss: PolicyLoss, *, sharded: bool) -> None:
    """Raises ValueError for models and layouts that are not supported."""
    inner = loss.loss if isinstance(loss, WithLpReg) else loss
    if isinstance(inner, WrappedLoss):
        raise ValueError(
            f"lpreg.integrations.trl takes a method, not one with {inner.name} around it: TRL corrects for its engine "
            "itself (GRPOConfig(vllm_importance_sampling_mode=...)), and has no reference model without `beta`"
        )
    if trainer._is_vlm:
        raise ValueError("lpreg.integrations.trl trains text-only models, but the processing class is a processor")
    if trainer.aux_loss_enabled:
        raise ValueError(
            "lpreg.integrations.trl has no mixture-of-experts auxiliary loss; turn it off by "
            "GRPOConfig(router_aux_loss_coef=0.0)"
        )
    parallel = trainer.args.parallelism_config
    if parallel is not None and parallel.tp_size > 1:
        raise ValueError(
            f"lpreg.integrations.trl splits data over ranks, nothing else, but parallelism_config has tp_size="
            f"{parallel.tp_size}; for tensor parallelism use megatron_rl"
        )
    if sharded and loss.proxy_source == "lagged":
        raise ValueError(
            "proxy_source='lagged' swaps whole weights, which FSDP and DeepSpeed shard; use 'current' or 'old'"
        )
