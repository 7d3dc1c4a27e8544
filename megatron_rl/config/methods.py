"""A section a method: overrides, where unset means what the preset, or else the method (`lpreg/losses/`), says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import NonNegative, Positive, PositiveInt, Section, Share, ShareOrZero


class _ClipSettings(Section):
    clip_low: ShareOrZero | None = None
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative | None = None
    """The probability ratio is clipped above at 1 + clip_high."""


class LpRegSettings(_ClipSettings):
    """Overrides for Lp-Reg; read only with `algorithm.name: lp_reg`."""

    rho: Share | None = None
    """Share of the batch's response tokens, lowest probability first, that the term may act on."""
    beta: NonNegative | None = None
    """Weight of the regularisation term."""
    min_p: ShareOrZero | None = None
    """Kappa: the proxy keeps tokens with at least this share of the likeliest token's probability; 0 keeps all."""
    fixed_tau: Share | None = None
    """Instead of min_p: the proxy keeps tokens with at least this probability."""
    kl_estimator: Literal["k3", "full", "reverse"] | None = None
    """k3: on the sampled token; full: KL(proxy || policy) over the vocabulary; reverse: KL(policy || proxy) on it."""
    select_by: Literal["log_prob", "entropy", "random", "all"] | None = None
    """What the share rho is of: the least probable tokens, those of highest entropy, any; or all, whatever rho."""
    advantage_sign: Literal["negative", "both"] | None = None
    """Which advantage a token must have for the term to act on it."""
    selection_scope: Literal["batch", "micro_batch_negatives"] | None = None
    """The tokens rho is a share of: the step's, or only those of a micro-batch that have negative advantage."""
    require_below_proxy: bool | None = None
    """Act only where the policy is below the proxy."""
    k3_clamp: Positive | Literal["none"] | None = None
    """Upper bound of the k3 value; beyond it its gradient is zero. "none" for no bound."""
    clip_negative_upper: bool | None = None
    """Whether the upper clip also stops tokens with negative advantage."""


class GrpoSettings(_ClipSettings):
    """Overrides for GRPO; read only with `algorithm.name: grpo`."""

    aggregation: Literal["token_mean", "sequence_mean_token_mean", "constant_length"] | None = None
    """How token losses become one: their mean, the mean of the responses' means, or Dr. GRPO's sum over a constant."""
    constant_length: PositiveInt | None = None
    """Tokens that a response counts as, whatever its length; with that aggregation only."""


class ClipHigherSettings(GrpoSettings):
    """Overrides for Clip-Higher; read only with `algorithm.name: clip_higher`."""


class DualClipSettings(_ClipSettings):
    """Overrides for dual-clip PPO; read only with `algorithm.name: dual_clip`."""

    clip_dual: Annotated[float, Field(gt=1)] | None = None
    """The probability ratio is clipped above at this where the advantage is negative."""


class GspoSettings(_ClipSettings):
    """Overrides for GSPO; read only with `algorithm.name: gspo`. The ratio is a response's."""


class CispoSettings(_ClipSettings):
    """Overrides for CISPO; read only with `algorithm.name: cispo`. The clip bounds a weight, not the gradient."""


class KlCovSettings(Section):
    """Overrides for KL-Cov; read only with `algorithm.name: kl_cov`."""

    share: Share | None = None
    """Of the batch's response tokens, highest covariance of advantage and log-prob first, that are penalised."""
    beta: NonNegative | None = None
    """Weight of the penalty."""


class ClipCovSettings(_ClipSettings):
    """Overrides for Clip-Cov; read only with `algorithm.name: clip_cov`."""

    share: Share | None = None
    """Of the batch's response tokens, those that lose their gradient, drawn from a range of covariance."""
    cov_low: float | None = None
    """Lower end of the range."""
    cov_high: float | None = None
    """Upper end of the range."""


class HighEntropySettings(_ClipSettings):
    """Overrides for 80/20; read only with `algorithm.name: high_entropy`."""

    share: Share | None = None
    """Of the batch's response tokens, highest entropy first, that carry the loss."""


class EntropyBonusSettings(_ClipSettings):
    """Overrides for GRPO with an entropy loss; read only with `algorithm.name: entropy_bonus`."""

    coefficient: NonNegative | None = None
    """Weight of the mean entropy, nats."""
