"""Plain restatements of every method, token by token on dense logits with autograd, that lpreg must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpreg import PolicyLoss, make_loss, with_lp_reg

Definition = Callable[["Batch", bool], Tensor]
"""(batch, on-policy) -> the loss, a mean over the whole batch. On-policy: the current policy generated the batch."""


@dataclass
class Batch:
    logits: Tensor
    old_logits: Tensor
    """Logits of the policy that generated the batch."""
    lagged_logits: Tensor
    """Logits of a third policy."""
    targets: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_ids: Tensor
    update: Tensor
    """Tokens of the update whose loss is computed; they are ranked among all tokens that count."""

    def log_p(self) -> Tensor:
        """Log-probs [T, V], with the gradient."""
        return torch.log_softmax(self.logits, -1)

    def of_targets(self, rows: Tensor) -> list[Tensor]:
        return list(rows.gather(1, self.targets[:, None])[:, 0])


def old_values(data: Batch, on_policy: bool) -> tuple[list[float], list[float]]:
    """Returns log-prob and entropy of each token under the policy that generated the batch."""
    log_p = torch.log_softmax(data.logits.detach() if on_policy else data.old_logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return [float(x) for x in data.of_targets(log_p)], entropy.tolist()


def ppo(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    bounded = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.maximum(-ratio * advantage, -bounded * advantage)


def ratios(data: Batch, on_policy: bool) -> list[Tensor]:
    old, _ = old_values(data, on_policy)
    return [(new - before).exp() for new, before in zip(data.of_targets(data.log_p()), old, strict=True)]


def counted(data: Batch) -> list[int]:
    return (data.mask & data.update).nonzero().squeeze(1).tolist()


def ranked(data: Batch) -> list[int]:
    return data.mask.nonzero().squeeze(1).tolist()


def token_mean(data: Batch, terms: Callable[[int], Tensor]) -> Tensor:
    places = counted(data)
    return torch.stack([terms(t) for t in places]).mean()


def clipped(low: float, high: float) -> Definition:
    def definition(data: Batch, on_policy: bool) -> Tensor:
        r, a = ratios(data, on_policy), data.advantages.tolist()
        return token_mean(data, lambda t: ppo(r[t], a[t], low, high))

    return definition


def over_sequences(data: Batch, of_sequence: Callable[[list[int]], Tensor]) -> Tensor:
    ids = data.sequence_ids.tolist()
    sequences = set(data.sequence_ids[data.update].tolist())
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        places = [t for t in counted(data) if ids[t] == sequence]
        if places:
            total = total + of_sequence(places)
    return total / len(sequences)


def sequence_mean(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()
    return over_sequences(data, lambda ts: torch.stack([ppo(r[t], a[t], 0.2, 0.2) for t in ts]).mean())


def dr_grpo(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()
    return over_sequences(data, lambda ts: torch.stack([ppo(r[t], a[t], 0.2, 0.2) for t in ts]).sum() / 12)


def dual(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()

    def term(t: int) -> Tensor:
        usual = ppo(r[t], a[t], 0.2, 0.2)
        return usual if a[t] >= 0 else usual.clamp(max=-1.3 * a[t])

    return token_mean(data, term)


def gspo(data: Batch, on_policy: bool) -> Tensor:
    """The sequence form, which equals the token form if all tokens of a response have the same advantage."""
    old, _ = old_values(data, on_policy)
    new, a = data.of_targets(data.log_p()), data.advantages.tolist()

    def response(ts: list[int]) -> Tensor:
        s = torch.stack([new[t] - old[t] for t in ts]).mean().exp()
        return ppo(s, a[ts[0]], 0.1, 0.15)

    return over_sequences(data, response)


def cispo(data: Batch, on_policy: bool) -> Tensor:
    r, a, new = ratios(data, on_policy), data.advantages.tolist(), data.of_targets(data.log_p())
    return token_mean(data, lambda t: -min(max(float(r[t].detach()), 0.7), 1.2) * a[t] * new[t])


def covariances(data: Batch, on_policy: bool) -> dict[int, float]:
    (old, _), a, places = old_values(data, on_policy), data.advantages.tolist(), ranked(data)
    mean_a, mean_old = (sum(x[t] for t in places) / len(places) for x in (a, old))
    return {t: (a[t] - mean_a) * (old[t] - mean_old) for t in places}


def top(scores: dict[int, float], share: float) -> set[int]:
    """Returns the tokens with the highest share of the scores, at least one, including ties up to rounding."""
    count = max(1, math.floor(round(share * len(scores), 9)))
    cut = sorted(scores.values(), reverse=True)[count - 1]
    return {t for t, score in scores.items() if score >= cut - 1e-12}


def kl_cov(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()
    penalised = top(covariances(data, on_policy), 0.3)
    return token_mean(data, lambda t: -r[t] * a[t] + (0.5 * r[t].log().abs() if t in penalised else 0))


def clip_cov(data: Batch, on_policy: bool) -> Tensor:
    """With a share of 1 every token of the range is drawn, so that nothing is random."""
    r, a = ratios(data, on_policy), data.advantages.tolist()
    inside = {t for t, value in covariances(data, on_policy).items() if 0.1 < value < 1}
    return token_mean(data, lambda t: 0 * r[t] if t in inside else ppo(r[t], a[t], 0.9, 0.5))


def high_entropy(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()
    _, entropy = old_values(data, on_policy)
    chosen = top({t: entropy[t] for t in ranked(data)}, 0.4)
    return torch.stack([ppo(r[t], a[t], 0.2, 0.28) for t in counted(data) if t in chosen]).mean()


def probabilities(data: Batch, on_policy: bool) -> tuple[list[Tensor], list[float]]:
    """Returns the probability of each sampled token now, and under the policy that generated the batch."""
    old, _ = old_values(data, on_policy)
    return [x.exp() for x in data.of_targets(data.log_p())], [math.exp(x) for x in old]


def dppo(divergence: str, low: float, high: float, bound: float) -> Definition:
    def definition(data: Batch, on_policy: bool) -> Tensor:
        (p, p_old), a, new = probabilities(data, on_policy), data.advantages.tolist(), data.of_targets(data.log_p())

        def term(t: int) -> Tensor:
            now, before = float(p[t].detach()), p_old[t]
            far = abs(now - before)
            if divergence == "kl":
                far = before * math.log(before / now) + (1 - before) * math.log((1 - before) / (1 - now))
            stopped = (a[t] > 0 and now > before and far > high) or (a[t] < 0 and now < before and far > low)
            return 0 * new[t] if stopped else -a[t] * min(now / before, bound) * new[t]

        return token_mean(data, term)

    return definition


def drpo(data: Batch, on_policy: bool) -> Tensor:
    """By its gradient: -A r (1 - sign(A) (p - p_old) / bound) per log-prob; the value is the paper's."""
    r, a, (p, p_old) = ratios(data, on_policy), data.advantages.tolist(), probabilities(data, on_policy)

    def term(t: int) -> Tensor:
        d = 0.1 if a[t] > 0 else 0.05
        value = float(-(a[t] * r[t] - abs(a[t]) * (p[t] - p_old[t]) ** 2 / (2 * d * p_old[t])).detach())
        weight = float((r[t] * (a[t] - abs(a[t]) * (p[t] - p_old[t]) / d)).detach())
        return value - weight * (p[t].log() - p[t].log().detach())

    return token_mean(data, term)


def sapo(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()

    def term(t: int) -> Tensor:
        tau = 1.3 if a[t] > 0 else 2.0
        return -a[t] * 4 / tau / (1 + (-tau * (r[t] - 1)).exp())

    return over_sequences(data, lambda ts: torch.stack([term(t) for t in ts]).mean())


def up(data: Batch, on_policy: bool) -> Tensor:
    """The negative branch as published: -max(min(r A, clip(r) A), c A)."""
    r, a, (p, _) = ratios(data, on_policy), data.advantages.tolist(), probabilities(data, on_policy)

    def term(t: int) -> Tensor:
        if a[t] > 0:
            return -a[t] * p[t] / p[t].detach()
        return ppo(r[t], a[t], 0.2, 0.2).clamp(max=-1.3 * a[t])

    return token_mean(data, term)


def vespo(data: Batch, on_policy: bool) -> Tensor:
    r, a, new = ratios(data, on_policy), data.advantages.tolist(), data.of_targets(data.log_p())
    ids, places = data.sequence_ids.tolist(), counted(data)

    def term(t: int) -> Tensor:
        w = math.prod(float(r[other].detach()) for other in places if ids[other] == ids[t])
        k, decay = (2, 3) if a[t] > 0 else (3, 2)
        return -math.exp(decay) * w**k * math.exp(-decay * w) * a[t] * new[t]

    return token_mean(data, term)


def stapo(data: Batch, on_policy: bool) -> Tensor:
    r, a = ratios(data, on_policy), data.advantages.tolist()
    old, entropy = old_values(data, on_policy)
    lowest = sorted(entropy[t] for t in ranked(data))
    bound = lowest[min(max(1, len(lowest) // 2), len(lowest) - 1)]
    staying = [t for t in counted(data) if not (a[t] > 0 and math.exp(old[t]) < 0.3 and entropy[t] < bound)]
    total = 0 * data.logits.sum()
    for t in staying:
        total = total + ppo(r[t], a[t], 0.2, 0.2) / len(staying)
    return total


def entropy_bonus(data: Batch, on_policy: bool) -> Tensor:
    r, a, log_p = ratios(data, on_policy), data.advantages.tolist(), data.log_p()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return token_mean(data, lambda t: ppo(r[t], a[t], 0.2, 0.2) - 0.3 * entropy[t])


def tre(region: str) -> Definition:
    def definition(data: Batch, on_policy: bool) -> Tensor:
        r, a, log_p = ratios(data, on_policy), data.advantages.tolist(), data.log_p()

        def bonus(t: int) -> Tensor:
            ranked_p, order = log_p[t].detach().exp().sort(descending=True)
            kept = order[:3]
            if region == "top_p":
                kept = order[: 1 + int((ranked_p.cumsum(0) < 0.8).sum())]
            if region == "min_p":
                kept = order[ranked_p >= 0.2 * ranked_p[0]]
            log_q = torch.log_softmax(log_p[t, kept], 0)
            entropy = -(log_q.exp() * log_q).sum()
            return entropy * math.log(log_p.shape[1]) / math.log(len(kept)) if len(kept) > 1 else 0 * entropy

        return token_mean(data, lambda t: ppo(r[t], a[t], 0.2, 0.2) - 0.3 * bonus(t))

    return definition


def lp_reg(
    estimator: str = "k3",
    source: str = "current",
    *,
    share: float | None = 0.4,
    by: str = "log_prob",
    both_signs: bool = False,
    min_p: float = 0.1,
    tau: float | None = None,
    beta: float = 0.7,
    bounds: tuple[float, float] = (0.0, 10.0),
    upper_for_negatives: bool = True,
    below: bool = False,
    clamp: float = math.inf,
    surrogate: bool = True,
) -> Definition:
    """Equation 6 and its variations, without its first term if `surrogate` is False. share None: all tokens; by
    "negatives": the current policy's lowest of those of negative advantage."""

    def definition(data: Batch, on_policy: bool) -> Tensor:
        old, entropy = old_values(data, on_policy)
        r, a, log_p = ratios(data, on_policy), data.advantages.tolist(), data.log_p()
        places = [t for t in counted(data) if a[t] < 0] if by == "negatives" else ranked(data)
        now = [float(x) for x in data.of_targets(log_p.detach())]
        rank = {"entropy": entropy, "log_prob": [-x for x in old], "negatives": [-x for x in now]}[by]
        chosen = set(places) if share is None else top({t: rank[t] for t in places}, share) if places else set()
        of = {
            "current": data.logits,
            "old": data.logits if on_policy else data.old_logits,
            "lagged": data.lagged_logits,
        }
        p = of[source].detach().softmax(-1)
        inside = p >= (min_p * p.amax(-1, keepdim=True) if tau is None else tau)
        q = torch.where(inside, p, 0) / torch.where(inside, p, 0).sum(-1, keepdim=True)
        log_q = q.log()

        def term(t: int) -> Tensor:
            bounded = r[t].clamp(min=bounds[0]) if a[t] < 0 else r[t]
            bounded = bounded if surrogate else 0 * bounded
            if a[t] >= 0 or upper_for_negatives:
                bounded = bounded.clamp(max=bounds[1])
            v = int(data.targets[t])
            d = log_q[t, v] - log_p[t, v]
            signed = a[t] < 0 or (both_signs and a[t] != 0)
            if t not in chosen or not signed or not inside[t, v] or (below and d <= 0):
                return -a[t] * bounded
            if estimator == "full":
                kl = (q[t, inside[t]] * (log_q[t] - log_p[t])[inside[t]]).sum()
            else:
                kl = d * d / 2 if estimator == "reverse" else (d.exp() - d - 1).clamp(max=clamp)
            return -a[t] * bounded + beta * kl

        return token_mean(data, term)

    return definition


def added(*parts: Definition) -> Definition:
    return lambda data, on_policy: sum((part(data, on_policy) for part in parts), torch.zeros((), dtype=torch.float64))


LP_REG: dict[str, Any] = {"rho": 0.4, "beta": 0.7, "min_p": 0.1}

DEFINITIONS: dict[str, tuple[PolicyLoss, Definition]] = {
    "lp_reg, paper": (make_loss.preset("lp_reg", "paper", **LP_REG), lp_reg("full")),
    "lp_reg, paper off-policy": (
        make_loss.preset("lp_reg", "paper", **LP_REG, proxy_source="old"),
        lp_reg("full", "old"),
    ),
    "lp_reg, paper lagged": (
        make_loss.preset("lp_reg", "paper", **LP_REG, proxy_source="lagged"),
        lp_reg("full", "lagged"),
    ),
    "lp_reg, reference": (
        make_loss.preset("lp_reg", "reference", **LP_REG, proxy_source="old", k3_clamp=0.05),
        lp_reg(source="old", by="negatives", below=True, clamp=0.05, upper_for_negatives=False),
    ),
    "lp_reg, k3": (make_loss("lp_reg", **LP_REG), lp_reg()),
    "lp_reg, old": (make_loss("lp_reg", **LP_REG, proxy_source="old"), lp_reg(source="old")),
    "lp_reg, lagged": (
        make_loss("lp_reg", **LP_REG, proxy_source="lagged", clip_low=0.2, clip_high=0.1),
        lp_reg(source="lagged", bounds=(0.8, 1.1)),
    ),
    "lp_reg, by entropy": (make_loss("lp_reg", **LP_REG, select_by="entropy"), lp_reg(by="entropy")),
    "lp_reg, all": (make_loss("lp_reg", **LP_REG, select_by="all"), lp_reg(share=None)),
    "lp_reg, both signs": (make_loss("lp_reg", **LP_REG, advantage_sign="both"), lp_reg(both_signs=True)),
    "lp_reg, reverse": (make_loss("lp_reg", **LP_REG, kl_estimator="reverse"), lp_reg("reverse")),
    "lp_reg, fixed tau": (make_loss("lp_reg", **LP_REG, fixed_tau=0.01), lp_reg(tau=0.01)),
    "lp_reg, no tau": (
        make_loss("lp_reg", rho=0.4, beta=0.7, min_p=0, proxy_source="lagged"),
        lp_reg(source="lagged", min_p=0),
    ),
    "lp_reg on dppo": (
        with_lp_reg(make_loss("dppo", bound_low=0.05, bound_high=0.1, weight_bound=1.5), **LP_REG),
        added(dppo("tv", 0.05, 0.1, 1.5), lp_reg(surrogate=False)),
    ),
    "lp_reg on clip_higher, full, lagged": (
        with_lp_reg(make_loss("clip_higher"), **LP_REG, kl_estimator="full", proxy_source="lagged"),
        added(clipped(0.2, 0.28), lp_reg("full", "lagged", surrogate=False)),
    ),
    "lp_reg on cispo, full, old": (
        with_lp_reg(make_loss("cispo", clip_low=0.3, clip_high=0.2), **LP_REG, kl_estimator="full", proxy_source="old"),
        added(cispo, lp_reg("full", "old", surrogate=False)),
    ),
    "lp_reg on entropy_bonus": (
        with_lp_reg(make_loss("entropy_bonus", coefficient=0.3), **LP_REG, select_by="entropy"),
        added(entropy_bonus, lp_reg(by="entropy", surrogate=False)),
    ),
    "lp_reg on tre, all": (
        with_lp_reg(make_loss("tre", coefficient=0.3, region="min_p", min_p=0.2), beta=0.7, min_p=0.2, select_by="all"),
        added(tre("min_p"), lp_reg(share=None, min_p=0.2, surrogate=False)),
    ),
    "grpo": (make_loss("grpo"), clipped(0.2, 0.2)),
    "grpo, mean of sequences": (make_loss("grpo", aggregation="sequence_mean_token_mean"), sequence_mean),
    "dr. grpo": (make_loss("grpo", aggregation="constant_length", constant_length=12), dr_grpo),
    "clip_higher": (make_loss("clip_higher"), clipped(0.2, 0.28)),
    "dual_clip": (make_loss("dual_clip", clip_dual=1.3), dual),
    "gspo": (make_loss("gspo", clip_low=0.1, clip_high=0.15), gspo),
    "cispo": (make_loss("cispo", clip_low=0.3, clip_high=0.2), cispo),
    "kl_cov": (make_loss("kl_cov", share=0.3, beta=0.5), kl_cov),
    "clip_cov": (make_loss("clip_cov", clip_low=0.9, clip_high=0.5, share=1.0, cov_low=0.1, cov_high=1.0), clip_cov),
    "high_entropy": (make_loss("high_entropy", share=0.4), high_entropy),
    "entropy_bonus": (make_loss("entropy_bonus", coefficient=0.3), entropy_bonus),
    "dppo, tv": (make_loss("dppo", bound_low=0.05, bound_high=0.1, weight_bound=1.5), dppo("tv", 0.05, 0.1, 1.5)),
    "dppo, kl": (make_loss("dppo", divergence="kl", bound_low=0.01, bound_high=0.02), dppo("kl", 0.01, 0.02, 20)),
    "drpo": (make_loss("drpo", bound_low=0.05, bound_high=0.1), drpo),
    "sapo": (make_loss("sapo", tau_positive=1.3, tau_negative=2.0), sapo),
    "up": (make_loss("up", clip_dual=1.3), up),
    "vespo": (make_loss("vespo"), vespo),
    "tre, top-k": (make_loss("tre", coefficient=0.3, top_k=3), tre("top_k")),
    "tre, top-p": (make_loss("tre", coefficient=0.3, region="top_p", top_p=0.8), tre("top_p")),
    "tre, min-p": (make_loss("tre", coefficient=0.3, region="min_p", min_p=0.2), tre("min_p")),
    "stapo": (make_loss("stapo", tau_p=0.3, entropy_share=0.5), stapo),
}
