"""Named settings of each method: "paper" (arXiv 2510.03222) and "reference" (as its published scripts run it)."""

from __future__ import annotations

from typing import Any

# U = 10: the ratio is clipped to [0, 10].
_LP_REG_SHARED: dict[str, Any] = {"rho": 0.01, "beta": 1.0, "min_p": 0.02, "clip_low": 1.0, "clip_high": 9.0}

# The scripts run the paper's settings.
_BOTH: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "entropy_bonus": {"clip_low": 0.2, "clip_high": 0.2, "coefficient": 0.002},
    "clip_higher": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    # The 32B run's share; KL-Cov's own paper has 2e-3 for a 7B model.
    "kl_cov": {"share": 2e-4, "beta": 1.0},
    "clip_cov": {"clip_low": 1.0, "clip_high": 1.0, "share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    "high_entropy": {"clip_low": 0.2, "clip_high": 0.28, "share": 0.2},
    # Not in the paper's table: the sources of these are in their files.
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "clip_dual": 10.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"paper": settings, "reference": settings} for name, settings in _BOTH.items()},
    "lp_reg": {
        # Equation 6 on-policy. rho is the 14B model's; the 32B run used 0.005.
        "paper": _LP_REG_SHARED
        | {
            "kl_estimator": "full",
            "selection_scope": "batch",
            "require_below_proxy": False,
            "k3_clamp": None,
            "clip_negative_upper": True,
        },
        # The scripts' rules, without their accidents: a small micro-batch still selects, target and log-prob come from
        # one forward, the filter follows the temperature, the mean is exact. Off-policy: proxy_source="old".
        "reference": _LP_REG_SHARED
        | {
            "kl_estimator": "k3",
            "selection_scope": "micro_batch_negatives",
            "require_below_proxy": True,
            "k3_clamp": 10.0,
            "clip_negative_upper": False,
        },
    },
}
