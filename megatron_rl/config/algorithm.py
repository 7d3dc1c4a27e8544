"""The `algorithm` section."""

from __future__ import annotations

from typing import Literal

from .fields import PositiveInt, Section
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
