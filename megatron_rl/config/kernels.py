"""What the kernels of a GPU need, and the sentence for a setting that asks for one that is not there."""

from __future__ import annotations

from collections.abc import Iterator

from .actor import ActorSettings, AttentionBackend

_ENGINE = "Transformer Engine layers, which CUDA and bfloat16 have if transformer-engine is installed"
_NEEDS = {
    "rope": _ENGINE,
    "swiglu": "CUDA and Triton, which compiles the kernel",
    "gradient_accumulation": _ENGINE,
    "expert_permutation": f"a model with experts, and {_ENGINE}",
}
"""Key of `actor.fusions` -> what its kernel needs."""


def missing_fusion(name: str) -> str:
    """Returns the sentence for a fused kernel that is asked for and not there."""
    return f"actor.fusions.{name}: true needs {_NEEDS[name]}. Set it to auto or false"


def missing_attention(backend: AttentionBackend) -> str | None:
    """Returns the sentence for an attention backend without Transformer Engine's layers; None if it needs none."""
    if backend in ("auto", "local"):
        return None
    return (
        f"actor.attention_backend: {backend} chooses among the attentions of Transformer Engine, which this actor does "
        "not use: they need CUDA, bfloat16 and transformer-engine. Set it to auto or local"
    )


def impossible_kernels(actor: ActorSettings) -> Iterator[str]:
    """One sentence per kernel that is asked for and that the configured device or dtype rules out."""
    cpu = actor.device == "cpu"
    without_engine = cpu or actor.dtype == "float32"
    for name, needs in _NEEDS.items():
        if getattr(actor.fusions, name) is True and (cpu or (without_engine and _ENGINE in needs)):
            yield missing_fusion(name)
    if without_engine and (missing := missing_attention(actor.attention_backend)):
        yield missing
