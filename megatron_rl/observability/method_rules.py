"""What the warnings about a method watch, and the remedies in keys of that method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lpreg.losses.lp_reg_term import LpRegTermSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.methods import lp_reg_term, method_settings

SELECTED = "lpreg/selected_fraction"
KEPT = "lpreg/kept_fraction"
TERM = "algorithm.with_lp_reg"
_OWN_SELECTION = {
    "kl_cov": (SELECTED, "the penalty acts on no token", "raise algorithm.kl_cov.share"),
    "clip_cov": (
        SELECTED,
        "no token loses its gradient",
        "raise algorithm.clip_cov.share, or widen the range from algorithm.clip_cov.cov_low to "
        "algorithm.clip_cov.cov_high",
    ),
    "high_entropy": (SELECTED, "no token carries the loss", "raise algorithm.high_entropy.share"),
    "stapo": (
        "lpreg/spurious_fraction",
        "no token counts as spurious",
        "raise algorithm.stapo.tau_p or algorithm.stapo.entropy_share",
    ),
}
"""Method that selects tokens -> its metric, what it means that the metric is 0, and the remedy."""
_REGIONS = {"top_k": ("raise", "lower"), "top_p": ("raise", "lower"), "min_p": ("lower", "raise")}
"""Region of TRE -> how its setting makes the region larger, and smaller."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A metric of a method whose extreme value means that a part of the method has no effect."""

    metric: str
    meaning: str
    """What an extreme value means."""
    remedy: str


def selections(algorithm: AlgorithmSettings) -> list[Watched]:
    """Returns the metrics that must not stay 0: the shares of tokens on which the method and Lp-Reg's term act."""
    found = []
    term, section = _term(algorithm)
    own = _OWN_SELECTION.get(algorithm.name)
    if own:
        metric, meaning, remedy = own
        found.append(Watched(metric, meaning, f"This part of {algorithm.name} has no effect: {remedy}"))
    if term:
        # The term's metric has another name beside a method that reports a share of its own.
        metric = "lpreg/lp_reg_selected_fraction" if own and own[0] == SELECTED else SELECTED
        remedy = f"The regulariser has no effect: {' or '.join(_more_selected(term, section))}"
        found.append(Watched(metric, "Lp-Reg's term acts on no token", remedy))
    if algorithm.name == "tre":
        region = getattr(method_settings(algorithm), "region", "top_k")
        remedy = f"The bonus has no effect: {_REGIONS[region][0]} algorithm.tre.{region}"
        found.append(Watched("lpreg/filter_entropy", "one token alone is plausible everywhere", remedy))
    return found


def filters(algorithm: AlgorithmSettings) -> list[Watched]:
    """Returns the metrics that must not stay 1: the shares of tokens that pass a filter."""
    term, section = _term(algorithm)
    if term and (term.min_p or term.fixed_tau is not None):  # min_p: 0 keeps all tokens on purpose
        key = f"{section}.min_p" if term.fixed_tau is None else f"{section}.fixed_tau"
        remedy = f"The proxy filters nothing, so the term has no effect: raise {key}"
        return [Watched(KEPT, "the proxy's filter", remedy)]
    if algorithm.name == "tre":
        region = getattr(method_settings(algorithm), "region", "top_k")
        remedy = f"The bonus is that of all tokens: {_REGIONS[region][1]} algorithm.tre.{region}"
        return [Watched(KEPT, "the region of plausible tokens", remedy)]
    return []


def more_entropy(algorithm: AlgorithmSettings) -> str:
    """Returns what keeps the entropy of this method up."""
    term, section = _term(algorithm)
    steps = []
    if term:
        if term.select_by != "all":
            steps.append(f"select more tokens ({section}.rho)")
        steps.append(f"weight them more ({section}.beta)")
    if weight := _weight(algorithm):
        steps.append(f"raise {weight}")
    if not steps:
        steps.append(f"add Lp-Reg's term ({TERM})")
    return f"Exploration is being lost: {', '.join(steps)}, or lower actor.optimizer.lr"


def less_entropy(algorithm: AlgorithmSettings) -> str:
    """Returns what keeps the entropy of this method down."""
    term, section = _term(algorithm)
    weights = [key for key in (_weight(algorithm), f"{section}.beta" if term else None) if key]
    return (
        f"The policy is turning into noise: lower {', '.join(['actor.optimizer.lr', *weights])}, and continue from an "
        "earlier checkpoint"
    )


def _term(algorithm: AlgorithmSettings) -> tuple[LpRegTermSettings | None, str]:
    """Returns Lp-Reg's term, of the method `lp_reg` or on another one, and the section of its settings."""
    if (term := lp_reg_term(algorithm)) is not None:
        return term, TERM
    settings: Any = method_settings(algorithm) if algorithm.name == "lp_reg" else None
    return settings, "algorithm.lp_reg"


def _more_selected(term: LpRegTermSettings, section: str) -> list[str]:
    steps = []
    if term.select_by != "all":
        steps.append(f"raise {section}.rho")
    if term.fixed_tau is not None:
        steps.append(f"lower {section}.fixed_tau, which must be well below lpreg/delta,")
    elif term.min_p:
        steps.append(f"lower {section}.min_p")
    if term.require_below_proxy:
        steps.append(f"set {section}.require_below_proxy to false")
    return steps or [f"set {section}.advantage_sign to both"]


def _weight(algorithm: AlgorithmSettings) -> str | None:
    """Returns the key of the method's own term for entropy."""
    names = {"entropy_bonus": "coefficient", "tre": "coefficient", "kl_cov": "beta", "clip_cov": "share"}
    return f"algorithm.{algorithm.name}.{names[algorithm.name]}" if algorithm.name in names else None
