"""The arms of the evidence: methods and controls with their settings, and the values that tuning tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """A method with its settings."""

    label: str
    settings: Mapping[str, object]
    """Keys of the configuration and their values."""
    tuned: tuple[str, tuple[object, ...]] | None = None
    """A further key, and the values among which the tuning split decides. The first is taken without tuning."""
    follows: tuple[str, str, float] | None = None
    """(arm, key, factor): the key takes the value that tuning chose for the other arm, times the factor. A control has
    no tuning of its own."""
    kind: Literal["on-policy", "off-policy", "long tail"] = "on-policy"
    """on-policy: Countdown, one update per step. off-policy: Countdown, eight. long tail: Countdown with many noise
    words, one update per step."""

    @property
    def title(self) -> str:
        """The label, with the kind if it is not the usual one."""
        return self.label + ("" if self.kind == "on-policy" else f", {self.kind}")

    @property
    def baseline(self) -> str:
        """The arm of GRPO in the same circumstances."""
        return {"on-policy": "grpo", "off-policy": "grpo-off", "long tail": "grpo-tail"}[self.kind]


RHO = "algorithm.lp_reg.rho"
LITERAL = {
    "algorithm.name": "lp_reg",
    "algorithm.proxy_source": "current",
    "algorithm.lp_reg.require_below_proxy": "false",
}
RHOS = (0.05, 0.01, 0.2)
LAGGED = {"algorithm.name": "lp_reg"}
RATES, RATES_OFF = (3e-4, 1.5e-4, 6e-4), (2e-4, 1e-4, 4e-4)
LR = "actor.optimizer.lr"

ON_POLICY = {
    "grpo": Arm("GRPO", {"algorithm.name": "grpo"}, (LR, RATES)),
    "maxrl": Arm("GRPO, MaxRL advantage", {"algorithm.name": "grpo", "algorithm.advantage": "maxrl"}, (LR, RATES)),
    "entropy_bonus": Arm(
        "entropy bonus",
        {"algorithm.name": "entropy_bonus"},
        ("algorithm.entropy_bonus.coefficient", (0.01, 0.002, 0.03)),
    ),
    "high_entropy": Arm("80/20", {"algorithm.name": "high_entropy"}, ("algorithm.high_entropy.share", (0.2, 0.1, 0.4))),
    "stapo": Arm("STAPO", {"algorithm.name": "stapo"}, ("algorithm.stapo.tau_p", (0.01, 0.05, 0.2))),
    "tre": Arm("TRE-K", {"algorithm.name": "tre"}, ("algorithm.tre.coefficient", (0.01, 0.001, 0.03))),
    "lp_reg-k3": Arm("Lp-Reg, literal, k3", LITERAL, (RHO, RHOS)),
    "lp_reg-full": Arm("Lp-Reg, literal, full KL", LITERAL | {"algorithm.lp_reg.kl_estimator": "full"}, (RHO, RHOS)),
    "lp_reg-lagged": Arm("Lp-Reg, lagged proxy", LAGGED, (RHO, RHOS)),
    "all": Arm("control: lagged KL on all negative tokens", LAGGED | {"algorithm.lp_reg.select_by": "all"}),
    "random": Arm(
        "control: lagged KL on as many random tokens",
        LAGGED | {"algorithm.lp_reg.select_by": "random"},
        follows=("lp_reg-lagged", RHO, 1.8),  # the KL acts on 2.4 % of all tokens with rho 5 %, on 1.3 % of random ones
    ),
    "half_push": Arm(
        "control: half push on rare tokens",
        {"algorithm.name": "benchmarks.evidence.half_push:HalfPush"},
        follows=("lp_reg-lagged", "algorithm.settings.rho", 1.0),
    ),
}


def _off(label: str, settings: Mapping[str, object], key: str, values: tuple[object, ...]) -> Arm:
    return Arm(label, settings, (key, values), kind="off-policy")


TERM = {"algorithm.with_lp_reg.kl_estimator": "k3"}
OFF_POLICY = {
    "grpo-off": _off("GRPO", {"algorithm.name": "grpo"}, LR, RATES_OFF),
    "clip_higher-off": _off(
        "Clip-Higher", {"algorithm.name": "clip_higher"}, "algorithm.clip_higher.clip_high", (0.28, 0.4, 0.6)
    ),
    "gspo-off": _off(
        "GSPO",
        {"algorithm.name": "gspo"},
        "algorithm.gspo",
        tuple(f"{{clip_low: {3 * x:g}, clip_high: {4 * x:g}}}" for x in (1e-4, 1e-3, 1e-2)),
    ),
    "kl_cov-off": _off("KL-Cov", {"algorithm.name": "kl_cov"}, "algorithm.kl_cov.share", (2e-3, 2e-2, 2e-4)),
    "dppo-off": _off(
        "DPPO",
        {"algorithm.name": "dppo"},
        "algorithm.dppo",
        tuple(f"{{bound_low: {x}, bound_high: {x}}}" for x in (0.2, 0.05, 0.5)),
    ),
    "sapo-off": _off(
        "SAPO",
        {"algorithm.name": "sapo"},
        "algorithm.sapo",
        tuple(f"{{tau_positive: {x}, tau_negative: {1.05 * x:g}}}" for x in (1.0, 2.0, 4.0)),
    ),
    "lp_reg-off": _off("Lp-Reg, old proxy, full KL", LAGGED | {"algorithm.lp_reg.kl_estimator": "full"}, RHO, RHOS),
    "dppo-lp_reg-off": _off("Lp-Reg over DPPO", {"algorithm.name": "dppo"} | TERM, "algorithm.with_lp_reg.rho", RHOS),
}


def _tail(arm: str) -> Arm:
    return replace(ON_POLICY[arm], kind="long tail")


TAIL = {f"{name}-tail": _tail(name) for name in ("grpo", "entropy_bonus", "lp_reg-k3", "lp_reg-full", "lp_reg-lagged")}
TAIL |= {
    "all-tail": Arm(
        "control: k3 on all negative tokens", LITERAL | {"algorithm.lp_reg.select_by": "all"}, kind="long tail"
    ),
    "random-tail": Arm(
        "control: k3 on random tokens",
        LITERAL | {"algorithm.lp_reg.select_by": "random"},
        follows=("lp_reg-k3-tail", RHO, 1.0),
        kind="long tail",
    ),
}
ARMS = ON_POLICY | OFF_POLICY | TAIL
