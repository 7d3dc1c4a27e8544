"""Checks of arguments before anything is computed. Each raises ValueError and names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_settings(
    temperature: float, min_p: float, fixed_tau: float | None, top_k: int | None, top_p: float | None, entropy: str
) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if not 0 < min_p <= 1:
        raise ValueError(f"min_p must lie in (0, 1], got {min_p}")
    if fixed_tau is not None and not 0 < fixed_tau <= 1:
        raise ValueError(f"fixed_tau must be None or lie in (0, 1], got {fixed_tau}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be None or lie in (0, 1], got {top_p}")
    if sum(value is not None for value in (fixed_tau, top_k, top_p)) > 1:
        raise ValueError(f"only one of fixed_tau={fixed_tau}, top_k={top_k} and top_p={top_p} can be the filter")
    if entropy not in ("metric", "grad", "none"):
        raise ValueError(f"entropy must be 'metric', 'grad' or 'none', got {entropy!r}")


def check_logits(logits: Tensor, inplace_backward: bool) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [tokens, vocabulary slice], got shape {list(logits.shape)}")
    _check_dtype("logits", logits)
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite a leaf tensor: pass logits computed by a model, or turn it off"
        )


def check_head(hidden: Tensor, weight: Tensor, chunk_tokens: int | None, weight_grad: Tensor | None) -> None:
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [tokens, width], got shape {list(hidden.shape)}")
    _check_dtype("hidden", hidden)
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [vocabulary slice, {hidden.shape[1]}] to fit hidden, got shape {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight must be {hidden.dtype} on {hidden.device} to fit hidden, got {weight.dtype} on {weight.device}"
        )
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if weight_grad is not None and (
        weight_grad.shape != weight.shape or weight_grad.dtype != exact or weight_grad.device != weight.device
    ):
        raise ValueError(
            f"weight_grad must be {exact} of shape {list(weight.shape)} on {weight.device} to fit weight, "
            f"got {weight_grad.dtype} of shape {list(weight_grad.shape)} on {weight_grad.device}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be None or at least 1, got {chunk_tokens}")


def check_row_tensor(name: str, tensor: Tensor, dtype: torch.dtype, tokens: int, source: Tensor, what: str) -> None:
    """Checks a tensor with one value per row of `source`, which has `tokens` rows and the name `what`."""
    if tensor.shape != (tokens,) or tensor.dtype != dtype or tensor.device != source.device:
        raise ValueError(
            f"{name} must be {dtype} of shape [{tokens}] on {source.device} to fit the {what}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
        )


def check_row_flags(tokens: int, source: Tensor, what: str, flags: Mapping[str, Tensor | None]) -> None:
    """Checks the optional arguments that mark rows, by their names."""
    for name, tensor in flags.items():
        if tensor is not None:
            check_row_tensor(name, tensor, torch.bool, tokens, source, what)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    wrong = (targets < 0) | (targets >= vocab_size)

    def message() -> str:
        row = int(wrong.nonzero()[0])
        return (
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary of {vocab_size}; "
            "leave out tokens that carry no loss before the call"
        )

    refuse(wrong.any(), message)


@dataclass(frozen=True, slots=True, eq=False)
class PostponedCheck:
    """A check of values on the device whose result the host has not read."""

    failed: Tensor
    """bool scalar on the device."""
    message: Callable[[], str]


_postponed: ContextVar[list[PostponedCheck] | None] = ContextVar("postponed checks", default=None)


@contextmanager
def postponed_checks() -> Iterator[list[PostponedCheck]]:
    """Within the block no check of values raises: the list gets them, and the caller reads `failed` when it suits.

    A GPU need then not be waited for. Results of a call whose check failed are meaningless.
    """
    checks: list[PostponedCheck] = []
    token = _postponed.set(checks)
    try:
        yield checks
    finally:
        _postponed.reset(token)


def refuse(failed: Tensor, message: Callable[[], str]) -> None:
    """Raises ValueError with the message if `failed` holds, unless checks are postponed."""
    checks = _postponed.get()
    if checks is not None:
        checks.append(PostponedCheck(failed, message))
    elif failed:
        raise ValueError(message())


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
