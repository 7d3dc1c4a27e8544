"""What is fast by default on GPUs changes no result beyond rounding, saves time and keeps the host from waiting.

Time is compared in pairs on the same machine, as a ratio.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.actor import FusionSettings
from tests.gpu.actor_runs import BF16, ROOT, Found, assert_alike, needs_engine, run
from tests.hf_models import config_json

pytestmark = [pytest.mark.gpu, needs_engine, pytest.mark.timeout(900)]

OFF: dict[str, Any] = {
    "fusions": dict.fromkeys(FusionSettings.model_fields, False),
    "overlap_grad_reduce": False,
}
LARGE: dict[str, Any] = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=14, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
"""A billion parameters."""
LONG = {"count": 16, "prompt": 512, "response": 1536, "vocabulary": 151936}
EXPERT_LOGITS = 6e-2
"""Mean difference between logits in bf16 and fp32 after three steps with experts: 3.5 % in the rehearsal, since tokens
whose two best experts are nearly equal change their expert. Norms stay within 1 %."""
Record = Callable[[str, object], None]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_fusions_change_no_result_beyond_rounding(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """Both ways are compared with fp32: their roundings differ from each other by up to the sum of both."""
    model = request.getfixturevalue(kind)
    exact = run(tmp_path / "exact", model, BF16 | {"dtype": "float32"})
    for name, settings in (("fast", {}), ("plain", OFF)):
        found = run(tmp_path / name, model, BF16 | settings)
        assert_alike(found, exact, 3e-2, logits=EXPERT_LOGITS if kind == "sparse" else None)


@pytest.mark.parametrize("backend", ["flash", "fused", "unfused"])
def test_each_attention_backend_gives_the_same_steps(
    tmp_path: Path, dense: Path, backend: str, record_property: Record
) -> None:
    """FlashAttention and cuDNN may be missing on a machine; then the test is skipped and says so."""
    expected = run(tmp_path / "auto", dense, BF16)
    try:
        found = run(tmp_path / backend, dense, BF16 | {"attention_backend": backend})
    except AssertionError as error:
        if "No dot product attention backend" not in str(error) and "is not installed" not in str(error):
            raise
        pytest.skip(f"{backend}: not available on this machine")
    record_property(f"attention_{backend}", found.attention)
    assert_alike(found, expected, 3e-2)


@pytest.mark.measured
def test_the_fast_defaults_save_time_at_a_billion_parameters(tmp_path: Path, record_property: Record) -> None:
    """Records the ratio of step times without and with the fast defaults."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config_json("qwen3", **LARGE)))
    actor = BF16 | {"micro_batch_tokens": 8192}

    def steps(name: str, settings: dict[str, Any]) -> Found:
        case = dict(rows=LONG, steps=4, load=False, logits=False, watch=True)
        return run(tmp_path / name, tmp_path / "model", settings, **case)

    found = {"fast": steps("fast", actor), "plain": steps("plain", actor | OFF)}
    seconds = {name: statistics.median(each.seconds[1:]) for name, each in found.items()}
    record_property("plain_over_fast_seconds", round(seconds["plain"] / seconds["fast"], 3))
    record_property("fast_step_seconds", round(seconds["fast"], 3))
    record_property("attention", found["fast"].attention)
    record_property("peak_gib", {name: round((each.peak_bytes or 0) / 2**30, 2) for name, each in found.items()})
    record_property("synchronisations", {name: sum(each.synchronisations.values()) for name, each in found.items()})
    ours = {
        place: count
        for place, count in found["fast"].synchronisations.items()
        if Path(place).is_relative_to(ROOT / "lpreg") or Path(place).is_relative_to(ROOT / "megatron_rl")
    }
    record_property("our_synchronisations", ours)
    # One copy of the results per step and the optimizer's two scalars, whatever the number of micro-batches.
    assert sum(ours.values()) <= 4, ours
