"""Token statistics from inside the forward of a Hugging Face causal language model.

Inside, so that wrappers (DDP, PEFT, mixed precision) see an ordinary call. transformers is not
imported.

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
from lpreg.statistics.proxy_store import ProxyStore
from lpreg.statistics.token_stats import TokenStats, token_stats

ANSWER = ("log_probs", "entropy", "log_z", "kept", "proxy_kl", "proxy_store")


class Wanted(TypedDict):
    """What `model(..., wanted_stats=Wanted)` is to look at."""

    mask: Tensor
    """[B, C] bool, the T tokens."""
    targets: Tensor
    """[T] int64, their ids, row after row."""
    log_z_rows: Tensor
    """[T] bool, where log Z is needed."""
    temperature: float
    settings: NotRequired[StatsSettings]
    """What the method asks for."""
    proxy_rows: NotRequired[Tensor]
    """[T] bool, where this policy's proxy is to be stored."""
    proxy: NotRequired[ProxyStore]
    """Another policy's, of the T tokens."""


def add_token_stats(model: Any, *, fused: bool) -> None:
    """Let `model(input_ids, attention_mask, wanted_stats=Wanted)` answer with statistics instead of logits: a dict of
    `TokenStats` fields, [T]: log_probs, entropy, log_z and kept, and what was asked for of proxy_kl and proxy_store.
    Without it the forward stays what it was.

    fused: project the hidden states of the T tokens chunk by chunk, so that logits are never whole (see `plain_head`).
    Else read the logits of the model's own forward, whose memory the gradient then takes over.
    """
    original = model.forward

    # Keeps the signature: `generate` checks its arguments against it.
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

    Asked of the model itself, by one forward of two tokens: families hide factors under many names.
    """
    head = model.get_output_embeddings()
    # Near 0 a soft cap is no more than rounding, so a fresh model would not show it.
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
    """Of every row, so that the logits need not be copied; those without a token cost a read and no gradient."""
    columns = wanted["mask"].shape[1]
    logits = forward(*args, use_cache=False, logits_to_keep=columns + 1, **kwargs).logits[:, -columns - 1 :]
    # The last position predicts what comes after the response.
    rows = pad(wanted["mask"], (0, 1)).flatten()
    proxy, proxy_rows = wanted.get("proxy"), wanted.get("proxy_rows")
    if proxy is not None:
        proxy = replace(proxy, stored=_spread(proxy.stored, rows), counts=_spread(proxy.counts, rows))
    stats = token_stats(
        logits.flatten(0, 1),
        _spread(wanted["targets"], rows),
        temperature=wanted["temperature"],
        log_z_rows=_spread(wanted["log_z_rows"], rows),
        inplace_backward=True,
        proxy=proxy,
        proxy_rows=None if proxy_rows is None else _spread(proxy_rows, rows),
        **wanted.get("settings", {}),
    )
    values: dict[str, Any] = {field.name: getattr(stats, field.name) for field in fields(stats)}
    of_tokens: dict[str, Any] = {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in values.items()
    }
    if (store := stats.proxy_store) is not None:
        of_tokens["proxy_store"] = replace(store, stored=store.stored[rows], counts=store.counts[rows])
    return TokenStats(**of_tokens)


def _spread(values: Tensor, places: Tensor) -> Tensor:
    """[T] to the places where [N] bool holds; 0 elsewhere."""
    return values.new_zeros(places.shape).masked_scatter(places, values)
