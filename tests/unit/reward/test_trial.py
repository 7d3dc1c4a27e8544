"""The signature of a reward of the user's own, and its one call before a run."""

import re
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.reward import RemoteSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardPool, load_reward, try_reward
from megatron_rl.types import Prompt
from tests.unit.reward.conftest import MakeSample

PAGE = Path(__file__).parents[3] / "docs/rewards.md"
PROMPT = Prompt("train:0", (1, 2), "1 + 1 =", "2", {"level": 3})
NUMBERS = count()

WriteReward = Callable[[str], RewardSettings]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteReward:
    """Writes a module with a function `score`, and returns the settings that name it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> RewardSettings:
        module = f"own_reward_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return RewardSettings(name=f"{module}:score", timeout_seconds=600.0)

    return write


@pytest.mark.parametrize(
    "source",
    [
        "def score(sample): return float(sample.prompt.label) / sample.prompt.metadata['level']",
        "def score(sample, weight=0.5): return weight if sample.text else 1 / 0",
        "def score(*args, **kwargs): return len(args[0].response.token_ids)",
        "class Judge:\n    def __call__(self, sample): return {'score': True}\nscore = Judge()",
        "from functools import partial\nscore = partial(lambda weight, sample: weight, 0.5)",
    ],
)
def test_a_reward_that_scores_a_sample_passes(write: WriteReward, source: str) -> None:
    try_reward(write(source), PROMPT)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "def score(sample):\n    return sample.label",
            "AttributeError: 'Sample' object has no attribute 'label' (own_",
        ),
        ("def score(sample):\n    return smaple.text", "NameError: name 'smaple' is not defined"),
        ("def score(sample):\n    import no_such_module", "No module named 'no_such_module'"),
        ("def score(sample):\n    float(sample.prompt.label)", "the score is NoneType None, not a number"),
        ("def score(sample): return 'right'", "the score is str 'right', not a number"),
        ("def score(*args): return [1.0]", "the score is list [1.0], not a number"),
        ("def score(sample): return float('nan')", "ValueError: the score is nan"),
        ("import os\ndef score(sample): os._exit(5)", "the verifier's process died with exit code 5"),
    ],
)
def test_a_reward_that_fails_is_refused_with_its_cause(write: WriteReward, source: str, words: str) -> None:
    settings = write(source)
    with pytest.raises(UserError) as caught:
        try_reward(settings, PROMPT)
    message = str(caught.value)
    assert words in message
    assert all(part in message for part in (settings.name, "nothing has started", "train:0", "label '2'"))


def test_a_reward_that_hangs_is_refused(write: WriteReward) -> None:
    settings = write("import time\ndef score(sample): time.sleep(3600)").model_copy(update={"timeout_seconds": 1.0})
    with pytest.raises(UserError, match=re.escape("took too long (reward.timeout_seconds: 1)")):
        try_reward(settings, PROMPT)


@pytest.mark.parametrize("name", ["math", "countdown", "code"])
def test_built_in_rewards_and_servers_are_not_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.reward.trial.RewardPool", None)
    try_reward(RewardSettings(name=name), PROMPT)
    try_reward(RewardSettings(name="remote", remote=RemoteSettings(url="http://127.0.0.1:9")), PROMPT)


TRL = "def score(completions, {more}**kwargs):\n    return [float(len(c)) for c in completions]"
VERL = "def score(data_source, solution_str, ground_truth, extra_info=None): return float(solution_str == ground_truth)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TRL.format(more=""), "TRL's rewards, (completions, **kwargs)"),
        (TRL.format(more="answer, "), "TRL's rewards, (completions, answer, **kwargs)"),
        ("def score(prompts, completions, completion_ids, **kwargs): return [1.0]", "TRL's rewards"),
        ("def score(*, completions: list, **kwargs) -> list: return [1.0]", "TRL's rewards"),
        ("async def score(completions, **kwargs): return [1.0]", "an async function"),
        (
            "class R:\n    def __call__(self, prompts, completions, **kwargs): return [1.0]\nscore = R()",
            "TRL's rewards",
        ),
        (VERL, "verl's rewards, (data_source, solution_str"),
        ("def score(text, label): return 1.0", "the signature (text, label), and cannot be called with one argument"),
        ("def score(): return 1.0", "the signature ()"),
        ("def score(*, sample): return 1.0", "the signature (*, sample)"),
        ("async def score(sample): return 1.0", "an async function"),
        ("class score:\n    def __call__(self, sample): return 1.0", "is a class"),
    ],
)
def test_another_signature_is_refused_with_the_right_one(write: WriteReward, source: str, words: str) -> None:
    settings = write(source)
    with pytest.raises(UserError) as caught:
        load_reward(settings)
    message = str(caught.value)
    assert words in message and settings.name in message and "def score(sample):" in message


@pytest.mark.parametrize("source", [TRL.format(more=""), TRL.format(more="answer, "), VERL])
def test_the_reward_in_the_message_works(write: WriteReward, make_sample: MakeSample, source: str) -> None:
    theirs = source.replace("def score", "def theirs")
    with pytest.raises(UserError) as caught:
        load_reward(write(f"{theirs}\nscore = theirs"))
    shown = "\n".join(line for line in str(caught.value).splitlines() if line.startswith("    "))
    ours = textwrap.dedent(shown).replace("return score(", "return theirs(")
    settings = write(f"{theirs}\n\n{ours}\n")
    try_reward(settings, PROMPT)
    assert load_reward(settings)(make_sample("2", "2")) == 1.0


def test_the_page_has_a_complete_reward_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_sample: MakeSample
) -> None:
    ((name, source),) = re.findall(r'```python title="(\w+)\.py"\n(.*?)```', PAGE.read_text(), flags=re.S)
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    named: Any = re.search(rf"name: {name}:(\w+)", PAGE.read_text())
    settings = RewardSettings(name=f"{name}:{named[1]}", workers=1, timeout_seconds=600.0)
    try_reward(settings, PROMPT)
    texts = [
        "<answer>34</answer>",
        "<answer>33</answer><answer> 34.0 </answer>",
        "<answer>3</answer>",
        "34",
        "<answer>x",
    ]
    with RewardPool(settings) as pool:
        results = pool.score([*(make_sample(text, "34") for text in texts), make_sample(texts[0], None)])
    assert [result.score for result in results] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [result.outcome for result in results] == ["score"] * 5 + ["error"]
    assert results[2].answer == "3" and "the label" in results[5].detail
