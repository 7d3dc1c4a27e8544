"""The grading corpus: the maths verifier gives every stated verdict, in a pool that includes hostile answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool
from megatron_rl.types import RewardResult, Sample

GROUPS = yaml.safe_load((Path(__file__).parent / "grading_corpus.yaml").read_text())
DISAGREEMENTS = "known disagreements"
VERDICTS = {"equal": 1.0, "unequal": 0.0}


def response(content: Any) -> tuple[str, str]:
    """Returns the response of a pair as text and finish reason."""
    if not isinstance(content, dict):
        return f"So the answer is \\boxed{{{content}}}.", "stop"
    text = content["response"]
    if isinstance(text, list):
        text = "".join(part if isinstance(part, str) else part[0] * part[1] for part in text)
    return text, content.get("finish", "stop")


def pairs(group: dict[str, Any]) -> list[tuple[float, Any, Any]]:
    return [(VERDICTS[name], label, content) for name in VERDICTS for label, content in group.get(name, [])]


@pytest.fixture(scope="module")
def graded(make_sample: Callable[..., Sample]) -> dict[str, list[tuple[float, str, RewardResult]]]:
    """Returns (verdict, description, result) of each pair by group.

    Hostile answers that count as wrong may run until their time limit, which is short. Nothing else needs a limit.
    """
    entries = [(group["group"], *pair) for group in GROUPS for pair in pairs(group)]
    found: dict[str, list[tuple[float, str, RewardResult]]] = {}
    for runs_away, seconds in ((False, 600.0), (True, 2.0)):
        mine = [entry for entry in entries if (entry[:2] == ("hostile", VERDICTS["unequal"])) is runs_away]
        samples = [make_sample(response(content)[0], label, response(content)[1]) for _, _, label, content in mine]
        with RewardPool(RewardSettings(name="math", workers=2, timeout_seconds=seconds)) as pool:
            results = pool.score(samples)
        for (group, verdict, label, content), result in zip(mine, results, strict=True):
            found.setdefault(group, []).append((verdict, f"{label!r} and {str(content)[:80]!r}", result))
    return found


def test_the_corpus_has_at_least_300_pairs() -> None:
    assert sum(len(pairs(group)) for group in GROUPS) >= 300
    assert len({group["group"] for group in GROUPS}) == len(GROUPS)


@pytest.mark.parametrize("group", [group["group"] for group in GROUPS if group["group"] != DISAGREEMENTS])
def test_every_pair_gets_its_stated_verdict(
    graded: dict[str, list[tuple[float, str, RewardResult]]], group: str
) -> None:
    wrong = [(what, result) for verdict, what, result in graded[group] if result.score != verdict]
    assert wrong == []


def test_known_disagreements_still_disagree(graded: dict[str, list[tuple[float, str, RewardResult]]]) -> None:
    fixed = [what for verdict, what, result in graded[DISAGREEMENTS] if result.score == verdict]
    assert fixed == []


def test_only_hostile_answers_may_lack_a_score(graded: dict[str, list[tuple[float, str, RewardResult]]]) -> None:
    without = {group for group, entries in graded.items() for _, _, result in entries if result.outcome != "score"}
    assert without <= {"hostile"}
