"""The `algorithm` section. A method's keys are overrides: unset means what the preset, or else the method, says."""

from __future__ import annotations

from typing import Literal

from .fields import NonNegative, Positive, PositiveInt, Section, Share, ShareOrZero


class LpRegSettings(Section):
    """Overrides for Lp-Reg; read only with `algorithm.name: lp_reg`."""

    rho: Share | None = None
    """Share of the batch's response tokens, lowest probability first, that the term may act on."""
    beta: NonNegative | None = None
    """Weight of the regularisation term."""
    min_p: Share | None = None
    """Kappa: the proxy keeps tokens with at least this share of the likeliest token's probability."""
    fixed_tau: Share | None = None
    """Instead of min_p: the proxy keeps tokens with at least this probability."""
    kl_estimator: Literal["k3", "full"] | None = None
    """k3: on the sampled token; full: KL(proxy || policy) over the vocabulary."""
    selection_scope: Literal["batch", "micro_batch_negatives"] | None = None
    """The tokens rho is a share of: the step's, or only those of a micro-batch that have negative advantage."""
    require_below_proxy: bool | None = None
    """Act only where the policy is below the proxy."""
    k3_clamp: Positive | Literal["none"] | None = None
    """Upper bound of the k3 value; beyond it its gradient is zero. "none" for no bound."""
    clip_low: ShareOrZero | None = None
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative | None = None
    """The probability ratio is clipped above at 1 + clip_high."""
    clip_negative_upper: bool | None = None
    """Whether the upper clip also stops tokens with negative advantage."""


class GrpoSettings(Section):
    """Overrides for GRPO; read only with `algorithm.name: grpo`."""

    clip_low: ShareOrZero | None = None
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative | None = None
    """The probability ratio is clipped above at 1 + clip_high."""


class AlgorithmSettings(Section):
    """Which loss, from which statistics."""

    name: Literal["lp_reg", "grpo"] = "lp_reg"
    """The policy loss."""
    preset: Literal["paper", "reference"] | None = None
    """The paper's settings to the letter, or those of its published scripts; unset: the method's defaults here."""
    proxy_source: Literal["current", "old", "lagged"] = "current"
    """Which policy Lp-Reg's proxy comes from: the one in training, the one that sampled, or an older snapshot."""
    proxy_refresh_steps: PositiveInt = 25
    """Steps between refreshes of the lagged snapshot; read only with `proxy_source: lagged`."""
    advantage: Literal["grpo"] = "grpo"
    """How rewards become advantages within a group."""
    selection_log_probs: Literal["rollout", "actor"] = "rollout"
    """Log-probabilities that rank the tokens: the engine's (no extra forward), or recomputed by the actor."""
    lp_reg: LpRegSettings = LpRegSettings()
    """Overrides for Lp-Reg."""
    grpo: GrpoSettings = GrpoSettings()
    """Overrides for GRPO."""
