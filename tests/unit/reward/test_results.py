"""What a reward may return, and what becomes of anything else."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool
from megatron_rl.reward.results import result_of
from megatron_rl.types import RewardResult
from tests.unit.reward.conftest import MakeSample

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (0.5, 0.5),
        (-2, -2.0),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(1), 1.0),
        (torch.tensor(True), 1.0),
        ({"score": 0.5}, 0.5),
        ({"score": torch.tensor(0.5), "acc": True}, 0.5),
        (RewardResult(np.float32(0.5)), 0.5),  # type: ignore[arg-type]
        (RewardResult(True), 1.0),
    ],
)
def test_numbers_and_scalars_are_scores(value: Any, score: float) -> None:
    result = result_of(value)
    assert result == RewardResult(score) and type(result.score) is float


def test_a_dict_may_have_an_answer_and_a_detail() -> None:
    assert result_of({"score": 1, "answer": 34, "detail": "correct"}) == RewardResult(1.0, "34", "correct")
    assert result_of({"score": 0, "answer": None}) == RewardResult(0.0, None, "")


def test_a_failure_that_a_reward_states_has_no_score() -> None:
    assert result_of(RewardResult(NAN, detail="judge is down", outcome="error")) == RewardResult(
        0.0, None, "judge is down", "error"
    )


def test_texts_can_be_written_to_a_file() -> None:
    result = result_of(RewardResult(1.0, ["a", 1], "\ud800x"))  # type: ignore[arg-type]
    assert (result.answer, result.detail) == ("['a', 1]", "?x")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "NoneType None"),
        ("1.0", "str '1.0'"),
        ([1.0], r"list \[1.0\]"),
        ((1.0, "right"), "tuple"),
        (1j, "complex"),
        (np.array([1.0]), "ndarray"),
        (np.complex64(1), "complex64"),
        (np.str_("1"), "str_"),
        (torch.tensor([1.0]), "Tensor"),
        (torch.tensor(1j), "Tensor"),
        (Decimal("1"), "Decimal"),
        (Fraction(1, 2), "Fraction"),
        (object, "type"),
        ({}, "no 'score'"),
        ({"reward": 1.0}, "no 'score'"),
        ({"score": None}, "NoneType"),
        ({"score": {"score": 1.0}}, "dict"),
        (RewardResult("1"), "str '1'"),  # type: ignore[arg-type]
    ],
)
def test_whatever_else_is_an_error_that_names_it(value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words) as caught:
        result_of(value)
    assert "a number, a dict with a number under 'score', or a RewardResult" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (NAN, "the score is nan"),
        (float("-inf"), "the score is -inf"),
        (10**400, "too large"),
        (np.float32("inf"), "the score is inf"),
        (torch.tensor(NAN), "the score is nan"),
        ({"score": NAN}, "the score is nan"),
        (RewardResult(float("inf")), "the score is inf"),
        (RewardResult(1.0, outcome="ok"), "the outcome is str 'ok'"),  # type: ignore[arg-type]
    ],
)
def test_scores_must_be_finite(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        result_of(value)


REWARD = """
import numpy as np

class Panic(BaseException):
    pass

class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")

def score(sample):
    if sample.text == "panic":
        raise Panic("in Rust")
    if sample.text == "surrogate":
        raise ValueError("\\ud800")
    return {"one": True, "half": np.float32(0.5), "dict": {"score": 2, "answer": 3}, "nan": np.nan,
            "text": "1", "object": Unprintable(), "function": score, "none": None}[sample.text]
"""


def test_each_value_costs_only_its_own_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_sample: MakeSample
) -> None:
    (tmp_path / "returning.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    good = {"one": 1.0, "half": 0.5, "dict": 2.0}
    bad = ["nan", "text", "object", "function", "none", "panic", "surrogate", "absent"]
    with RewardPool(RewardSettings(name="returning:score", workers=1, timeout_seconds=600.0)) as pool:
        results = pool.score([make_sample(text) for text in [*good, *bad]])
    assert {result.text: result.score for result in results if result.outcome == "score"} == good
    failed = {result.text: result for result in results if result.outcome == "error"}
    assert list(failed) == bad and all(result.score == 0 and result.detail for result in failed.values())
    assert failed["panic"].detail == "Panic: in Rust (returning.py, line 13)"
    assert failed["surrogate"].detail == "ValueError: ? (returning.py, line 15)"
