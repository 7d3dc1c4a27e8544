"""State of every random number generator in a process, as values that JSON can hold."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.checkpoint.manifest import RandomState


def capture(tracker: dict[str, Tensor] | None = None) -> RandomState:
    """Returns the states of Python, numpy, torch and, if it is initialised, CUDA.

    tracker: the named states of Megatron's RNG tracker, to include.
    """
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    key = legacy["state"]
    return {
        "python": [version, _packed(np.array(words, dtype=np.uint32)), gauss],
        "numpy": {**legacy, "state": {"key": _packed(key["key"]), "pos": int(key["pos"])}},
        "torch": _packed(torch.get_rng_state().numpy()),
        "cuda": _packed(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_initialized() else None,
        "tracker": {name: _packed(state.cpu().numpy()) for name, state in (tracker or {}).items()},
    }


def restore(state: RandomState) -> dict[str, Tensor]:
    """Restores what `capture` returned. Returns the tracker's states, which the caller must set."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_unpacked(words, np.uint32).tolist()), gauss))
    legacy = state["numpy"]
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": _unpacked(legacy["state"]["key"], np.uint32)}})
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    return {name: _tensor(packed) for name, packed in state["tracker"].items()}


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def _tensor(text: str) -> Tensor:
    return torch.from_numpy(_unpacked(text, np.uint8).copy())
