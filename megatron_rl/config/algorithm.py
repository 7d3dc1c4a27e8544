"""The `algorithm` section."""

from __future__ import annotations

from typing import Literal

from .fields import Count, FilePath, NonNegative, Positive, PositiveInt, Section
from .methods import (
    CispoSettings,
    ClipCovSettings,
    ClipHigherSettings,
    DualClipSettings,
    EntropyBonusSettings,
    GrpoSettings,
    GspoSettings,
    HighEntropySettings,
    KlCovSettings,
    LpRegSettings,
)

Method = Literal[
    "lp_reg",
    "grpo",
    "clip_higher",
    "dual_clip",
    "gspo",
    "cispo",
    "kl_cov",
    "clip_cov",
    "high_entropy",
    "entropy_bonus",
]


class OverlongSettings(Section):
    """A penalty on responses that come near the longest allowed (DAPO)."""

    buffer_tokens: Count = 0
    """Last tokens of rollout.max_response_tokens, over which the penalty grows from 0 in a straight line; 0: none."""
    penalty: NonNegative = 1.0
    """What a response of rollout.max_response_tokens loses of its reward."""


class CorrectionSettings(Section):
    """Correction for the gap between engine and actor: w = p_actor / p_rollout of a token before the first update."""

    weights: Literal["none", "truncated", "masked"] = "none"
    """What advantages are multiplied by: nothing; min(w, high) (TIS); or w where it lies in [low, high], else 0
    (MIS)."""
    low: NonNegative = 0.5
    """Lowest w; masked only."""
    high: Positive = 2.0
    """Highest w."""
    reject_sequences: bool = False
    """Leave out responses whose geometric mean of w lies outside [sequence_low, sequence_high]."""
    sequence_low: NonNegative = 0.99
    """Lowest geometric mean."""
    sequence_high: Positive = 1.01
    """Highest geometric mean."""


class ReferenceKlSettings(Section):
    """A penalty for leaving a frozen reference model, which waits on the CPU between uses."""

    coefficient: NonNegative = 0.0
    """Weight of KL(policy || reference), averaged as the method averages its own loss; 0: no reference model."""
    estimator: Literal["k1", "k3"] = "k3"
    """On the sampled token, with d = log ref - log p: k3 is exp(d) - d - 1, k1 is -d with the gradient of d^2 / 2."""
    model: FilePath | None = None
    """A Hugging Face folder of the policy's own architecture; unset: the policy as RL starts from it."""


class AlgorithmSettings(Section):
    """Which loss, from which statistics."""

    name: Method = "lp_reg"
    """The policy loss. With one update a rollout, no probability ratio has moved: clips, and all of kl_cov's own, are
    inert."""
    preset: Literal["paper", "reference"] | None = None
    """The paper's settings to the letter, or those of its published scripts; unset: the method's defaults here."""
    proxy_source: Literal["current", "old", "lagged"] = "old"
    """Which policy Lp-Reg's proxy comes from: the one in training, the one that sampled (the paper; with one update a
    rollout they are the same), or an older snapshot."""
    proxy_refresh_steps: PositiveInt = 25
    """Steps between refreshes of the lagged snapshot; read only with `proxy_source: lagged`."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"] = "grpo"
    """How rewards become advantages: within a prompt's group, or for reinforce_plus_plus within the step."""
    selection_log_probs: Literal["auto", "rollout", "actor"] = "auto"
    """Log-probs that rank the tokens: the engine's, or the actor's before the first update. auto: the actor's where
    they are known anyway (several updates a rollout), else the engine's, which cost no forward. Entropies are always
    the actor's."""
    overlong: OverlongSettings = OverlongSettings()
    correction: CorrectionSettings = CorrectionSettings()
    reference_kl: ReferenceKlSettings = ReferenceKlSettings()
    lp_reg: LpRegSettings = LpRegSettings()
    """Overrides for Lp-Reg."""
    grpo: GrpoSettings = GrpoSettings()
    """Overrides for GRPO."""
    clip_higher: ClipHigherSettings = ClipHigherSettings()
    """Overrides for Clip-Higher."""
    dual_clip: DualClipSettings = DualClipSettings()
    """Overrides for dual-clip PPO."""
    gspo: GspoSettings = GspoSettings()
    """Overrides for GSPO."""
    cispo: CispoSettings = CispoSettings()
    """Overrides for CISPO."""
    kl_cov: KlCovSettings = KlCovSettings()
    """Overrides for KL-Cov."""
    clip_cov: ClipCovSettings = ClipCovSettings()
    """Overrides for Clip-Cov."""
    high_entropy: HighEntropySettings = HighEntropySettings()
    """Overrides for 80/20."""
    entropy_bonus: EntropyBonusSettings = EntropyBonusSettings()
    """Overrides for GRPO with an entropy loss."""
