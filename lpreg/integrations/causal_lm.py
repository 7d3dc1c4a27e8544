"""Token statistics from inside the forward of a Hugging Face causal language model.

The statistics are computed inside the forward, so that wrappers (DDP, PEFT, mixed precision) see an ordinary call.
transformers is not imported.

Legend: B rows, C response positions (the last C of each row), T response tokens that carry loss.
"""

from __future__ import annotations

import functools
import types
from dataclasses import fields, replace
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lpreg.needs import StatsSettings
from lpreg.statistics.fused_head import fused_token_stats
from lpreg.statistics.fused_loss import FROM_THE_MODEL
from lpreg.statistics.proxy_store import ProxyStore
from lpreg.statistics.token_stats import TokenStats, token_stats

ANSWER = (*FROM_THE_MODEL, "proxy_store")


class Wanted(TypedDict):
    """The tokens and statistics that `model(..., wanted_stats=Wanted)` computes."""

    mask: Tensor
    """[B, C] bool, the T tokens."""
    targets: Tensor
    """[T] int64, ids of the T tokens, row after row."""
    log_z_rows: Tensor
    """[T] bool, tokens whose log Z is needed."""
    temperature: float
    settings: NotRequired[StatsSettings]
    """Arguments of `token_stats` that the method needs."""
    proxy_rows: NotRequired[Tensor]
    """[T] bool, tokens for which this policy's proxy is to be stored."""
    proxy: NotRequired[ProxyStore]
    """The stored proxy of another policy, for the T tokens."""


def add_token_stats(model: Any, *, fused: bool) -> None:
    """Makes `model(input_ids, attention_mask, wanted_stats=Wanted)` return statistics instead of logits: a dict of
    `TokenStats` fields, [T]: log_probs, entropy, log_z and in_filter, and proxy_kl and proxy_store if requested.
    Without wanted_stats the forward does not change.

    fused: project the hidden states of the T tokens chunk by chunk, so that the logits never exist as a whole (see
    `plain_head`). Otherwise the logits of the model's own forward are read, and the gradient is written over them.
    """
    original = model.forward

    # functools.wraps keeps the signature, which `generate` checks its arguments against.
    @functools.wraps(original)
    def forward(self: Any, *args: Any, wanted_stats: Wanted | None = None, **kwargs: Any) -> Any:
        if wanted_stats is None:
            return original(*args, **kwargs)
        if fused:
            stats = _of_hidden_states(self, args, kwargs, wanted_stats)
        else:
            stats = _of_logits(original, args, kwargs, wanted_stats)
        return {name: value for name in ANSWER if (value := getattr(stats, name)) is not None}

    model.forward = types.MethodType(forward, model)


def plain_head(model: Any) -> bool:
    """Whether the logits are hidden @ weight.T and nothing else: no bias, scale, soft cap or adapter.

    One forward of two tokens tests it, because model families name their factors in many ways.
    """
    head = model.get_output_embeddings()
    # Near 0 a soft cap is within rounding, so a fresh model would not show it.
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    wrapped = type(head) is not nn.Linear
    if wrapped or head.bias is not None or capped:
        return False
    tokens = torch.tensor([[1, 2]], device=head.weight.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model(input_ids=tokens, use_cache=False).logits
    model.train(training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 0.05
    plain = hidden.to(head.weight.dtype) @ head.weight.t()
    return torch.allclose(logits.float(), plain.float(), rtol=tolerance, atol=tolerance)


def _of_hidden_states(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Wanted) -> TokenStats:
    columns, weight = wanted["mask"].shape[1], model.get_output_embeddings().weight
    hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, -columns - 1 : -1]
    return fused_token_stats(
        hidden[wanted["mask"]].to(weight.dtype),
        weight,
        wanted["targets"],
        temperature=wanted["temperature"],
        log_z_rows=wanted["log_z_rows"],
        proxy=wanted.get("proxy"),
        proxy_rows=wanted.get("proxy_rows"),
        **wanted.get("settings", {}),
    )


def _of_logits(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Wanted) -> TokenStats:
    """Returns the statistics from logits. Every row is read, so that the logits need not be copied; rows without a
    token cost a read and no gradient."""
    columns = wanted["mask"].shape[1]
    logits = forward(*args, use_cache=False, logits_to_keep=columns + 1, **kwargs).logits[:, -columns - 1 :]
    # The last position predicts the token after the response.
    rows = pad(wanted["mask"], (0, 1)).flatten()
    proxy, proxy_rows = wanted.get("proxy"), wanted.get("proxy_rows")
    if proxy is not None:
        proxy = replace(proxy, stored=spread(proxy.stored, rows), counts=spread(proxy.counts, rows))
    stats = token_stats(
        logits.flatten(0, 1),
        spread(wanted["targets"], rows),
        temperature=wanted["temperature"],
        log_z_rows=spread(wanted["log_z_rows"], rows),
        inplace_backward=True,
        proxy=proxy,
        proxy_rows=None if proxy_rows is None else spread(proxy_rows, rows),
        **wanted.get("settings", {}),
    )
    values: dict[str, Any] = {field.name: getattr(stats, field.name) for field in fields(stats)}
    of_tokens: dict[str, Any] = {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in values.items()
    }
    if (store := stats.proxy_store) is not None:
        of_tokens["proxy_store"] = replace(store, stored=store.stored[rows], counts=store.counts[rows])
    return TokenStats(**of_tokens)


def spread(values: Tensor, places: Tensor) -> Tensor:
    """Returns values [T] at the places where `places` (bool, any shape) holds, and 0 elsewhere."""
    return values.new_zeros(places.shape).masked_scatter(places, values)
