"""The steps of the GPU session, the most telling first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    name: str
    question: str
    """What the GPU judges in this step."""
    tests: tuple[str, ...]
    """Arguments for pytest."""
    seconds: int
    transformer_engine: bool = False
    """Whether Transformer Engine is on the path, and the step is left out if it does not run."""


STEPS = (
    Step(
        "transformer engine",
        "Does Transformer Engine run on this machine?",
        ("tests/gpu/test_transformer_engine_on_cuda.py",),
        60,
        transformer_engine=True,
    ),
    Step(
        "token statistics",
        "Do the Triton kernels and the head's products give the CPU's values?",
        ("tests/gpu/test_token_stats_on_cuda.py", "tests/gpu/test_head_products_on_cuda.py"),
        90,
    ),
    Step(
        "actor with transformer engine",
        "Does the actor train alike with Transformer Engine and with local layers?",
        ("tests/gpu/test_actor_on_cuda.py", "-k", "transformer_engine or grouped_experts_match"),
        120,
        transformer_engine=True,
    ),
    Step(
        "first steps",
        "Does the actor take the CPU's first steps, without Transformer Engine?",
        ("tests/gpu/test_actor_on_cuda.py", "-k", "first_steps"),
        90,
    ),
    Step(
        "fp8",
        "Does the actor train in FP8 as in bfloat16?",
        ("tests/gpu/test_actor_on_cuda.py", "-k", "fp8"),
        90,
        transformer_engine=True,
    ),
    Step(
        "fast defaults",
        "What do the fusions that are on by default change, in value, time and host synchronisations?",
        ("tests/gpu/test_fast_defaults_on_cuda.py",),
        120,
        transformer_engine=True,
    ),
    Step(
        "prefix tree",
        "Does FlexAttention over prefix trees take the steps of packed rows, and in how much of their time?",
        ("tests/gpu/test_prefix_tree_on_cuda.py",),
        120,
        transformer_engine=True,
    ),
    Step(
        "memory",
        "Does a billion parameters take the memory that plan predicts?",
        ("tests/gpu/test_actor_on_cuda.py", "-k", "billion"),
        150,
        transformer_engine=True,
    ),
    Step(
        "weight transport",
        "Do weights arrive unchanged through mapped memory, and how fast?",
        ("tests/gpu/test_mapped_on_cuda.py", "tests/gpu/test_weight_transport_on_cuda.py"),
        90,
    ),
    Step(
        "benchmark of token statistics",
        "How fast are the ways of computing token statistics?",
        ("tests/gpu/test_benchmark_on_cuda.py",),
        60,
    ),
)
