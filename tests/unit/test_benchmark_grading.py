"""`benchmarks/grading.py` on a handful of rows of its own: what it respells, perturbs and leaves out."""

import json
from pathlib import Path

import pytest

from benchmarks.grading import cases, exclusion, grade, perturbations
from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool


@pytest.mark.parametrize(
    ("label", "rule"),
    [
        (None, "the row names no answer"),
        ("$3", "an odd number of dollar signs"),
        ("(3", "a bracket without its partner"),
    ],
)
def test_a_label_that_is_no_answer_is_left_out_by_rule(label: str | None, rule: str) -> None:
    assert exclusion(label) == rule


def test_ordinary_labels_are_kept() -> None:
    assert [exclusion(label) for label in ("3", "$3$", r"\$3", "[0,1)", r"\{1,2\}")] == [None] * 5


def test_a_change_that_changes_nothing_is_left_out_with_its_reason() -> None:
    assert ("sign", "-0", "the sign of zero") in list(perturbations("0"))
    assert [reason for _, _, reason in perturbations("7")] == ["", ""]


def test_every_label_is_graded_against_itself_and_changed() -> None:
    found = list(cases(r"\frac{1}{2}"))
    assert ("itself", "itself", r"\frac{1}{2}", "") in found
    assert ("respelled", "dfrac", r"\dfrac{1}{2}", "") in found
    assert ("perturbed", "digit", r"\frac{2}{2}", "") in found


def test_counts_of_a_set(tmp_path: Path) -> None:
    rows = [{"answer": answer} for answer in ("12", "$x", r"\sqrt{3}", "(1,2)")]
    (tmp_path / "aime24.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with RewardPool(RewardSettings(name="math", workers=1, timeout_seconds=60.0)) as pool:
        found = grade("AIME", tmp_path, pool)
    assert (found["rows"], found["labels"]) == (4, 3)
    assert found["labels left out"] == {"an odd number of dollar signs": 1}
    assert found["itself"] == {"graded": 3, "as they should be": 3}
    assert found["not as they should be"] == []
