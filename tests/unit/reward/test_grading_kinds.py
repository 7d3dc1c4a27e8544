"""Verdicts by kind of notation: two tables of pairs, and their labels in other typesetting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_rl.reward.maths import verify_maths
from megatron_rl.types import Sample

FOLDER = Path(__file__).parent
KINDS = {entry["kind"]: entry for entry in yaml.safe_load((FOLDER / "grading_kinds.yaml").read_text())}
REPORTED = yaml.safe_load((FOLDER / "grading_reported.yaml").read_text())


def score(make_sample: Callable[..., Sample], label: str, answer: str) -> float:
    return verify_maths(make_sample(f"So the answer is \\boxed{{{answer}}}.", label)).score


def test_every_kind_has_at_least_ten_pairs_of_either_verdict() -> None:
    assert {kind for kind, entry in KINDS.items() if len(entry["equal"]) < 10 or len(entry["unequal"]) < 10} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_answers_score_1(make_sample: Callable[..., Sample], kind: str) -> None:
    refused = [pair for pair in KINDS[kind]["equal"] if score(make_sample, *pair) != 1.0]
    assert refused == []


@pytest.mark.parametrize("kind", KINDS)
def test_different_answers_score_0(make_sample: Callable[..., Sample], kind: str) -> None:
    rewarded = [pair for pair in KINDS[kind]["unequal"] if score(make_sample, *pair) != 0.0]
    assert rewarded == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("typesetting", ["{}", "${}$", r"\boldsymbol{{{}}}", "{}.", r"\,{}\ "])
def test_every_label_equals_itself_in_other_typesetting(
    make_sample: Callable[..., Sample], kind: str, typesetting: str
) -> None:
    labels = {label for pairs in (KINDS[kind]["equal"], KINDS[kind]["unequal"]) for label, _ in pairs}
    refused = [label for label in labels if score(make_sample, label, typesetting.format(label)) != 1.0]
    assert refused == []


@pytest.mark.parametrize("kind", REPORTED)
def test_reported_pairs_get_the_right_score(make_sample: Callable[..., Sample], kind: str) -> None:
    wrong = [pair for pair in REPORTED[kind] if score(make_sample, *pair[:2]) != pair[2]]
    assert wrong == []
