"""Attention over prefix trees with Transformer Engine's layers: the compiled FlexAttention, and whole steps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.actor.model.flex_tree import FlexTreeAttention, flex_packing
from megatron_rl.batching.packing import FLEX_BLOCK
from megatron_rl.batching.prefix_tree import PrefixTree
from tests import flex_reference
from tests.gpu.actor_runs import BF16, Found, assert_alike, needs_engine, run
from tests.gpu.test_fast_defaults_on_cuda import LARGE
from tests.hf_models import config_json

pytestmark = [pytest.mark.gpu, needs_engine, pytest.mark.timeout(900)]

LONG_PROMPTS = {"count": 16, "prompt": 1536, "response": 512, "vocabulary": 151936}
SHORT_PROMPTS = {"count": 16, "prompt": 128, "response": 1920, "vocabulary": 151936}
Record = Callable[[str, object], None]


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 8), (64, 8), (8, 8)])
def test_the_compiled_kernel_gives_the_values_and_gradients_of_plain_arithmetic(heads: int, kv_heads: int) -> None:
    """Heads are those of 14B, of 32B, and without groups. Trees of different lengths use one compilation."""
    config = TransformerConfig(num_layers=1, hidden_size=heads * 128, num_attention_heads=heads, attention_dropout=0.0)
    attention = FlexTreeAttention(config, 1)
    random = np.random.default_rng(0)
    prompt = random.integers(0, 9, 300)
    for responses in ((200, 150, 70), (500, 20), (1000, 900, 800)):
        tree = PrefixTree.of([np.concatenate([prompt, random.integers(0, 9, length)]) for length in responses])
        size = -(-tree.size // FLEX_BLOCK) * FLEX_BLOCK
        ends = torch.from_numpy(tree.ends_with_padding(size).astype(np.int32)).cuda()
        packing = flex_packing(torch.tensor([0, size], dtype=torch.int32, device="cuda"), ends, 1300)
        torch.manual_seed(0)
        shapes = [(size, count, 128) for count in (heads, kv_heads, kv_heads)]
        given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        exact = [tensor.detach().float().requires_grad_() for tensor in given]
        out = attention(*given, None, packing)
        assert packing.mask is not None
        plain = flex_reference.attend(
            *(tensor[None].transpose(1, 2) for tensor in exact), block_mask=packing.mask, scale=None, enable_gqa=True
        )
        plain = plain.transpose(1, 2)[0]
        weight = torch.randn_like(plain)
        found = [out, *torch.autograd.grad((out.float() * weight).sum(), given)]
        expected = [plain, *torch.autograd.grad((plain * weight).sum(), exact)]
        for got, wanted in zip(found, expected, strict=True):
            assert (got.float() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_prefix_trees_take_the_steps_of_packed_rows(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    tree, packed = (run(tmp_path / rows, model, BF16 | {"rows": rows}) for rows in ("prefix_tree", "packed"))
    assert "FlexAttention over prefix trees" in tree.description and "FlexAttention" not in packed.description
    assert_alike(tree, packed, 3e-2, logits=6e-2)


@pytest.mark.measured
def test_time_and_memory_beside_packed_rows(tmp_path: Path, record_property: Record) -> None:
    """Records the ratio of step times, packed rows over prefix trees, with long and with short prompts, four responses
    each. The host may wait for the GPU no more often."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config_json("qwen3", **LARGE)))

    def steps(name: str, shape: dict[str, int], **rows: str) -> Found:
        case: dict[str, Any] = dict(rows=shape, steps=4, load=False, logits=False, watch=True)
        return run(tmp_path / name, tmp_path / "model", BF16 | {"micro_batch_tokens": 8192} | rows, **case)

    for prompts, shape in (("long", LONG_PROMPTS), ("short", SHORT_PROMPTS)):
        found = {
            "packed": steps(f"{prompts}, packed", shape, rows="packed"),
            "tree": steps(f"{prompts}, tree", shape, rows="prefix_tree"),
        }
        seconds = {name: statistics.median(each.seconds[1:]) for name, each in found.items()}
        record_property(f"packed_over_tree_seconds_{prompts}", round(seconds["packed"] / seconds["tree"], 3))
        record_property(f"first_tree_step_seconds_{prompts}", round(found["tree"].seconds[0], 1))
        peaks = {name: round((each.peak_bytes or 0) / 2**30, 2) for name, each in found.items()}
        record_property(f"peak_gib_{prompts}", peaks)
        waits = {name: sum(each.synchronisations.values()) for name, each in found.items()}
        assert waits["tree"] <= waits["packed"], found["tree"].synchronisations
