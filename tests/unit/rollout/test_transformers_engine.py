from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.rollout.engines.interface import response_of
from megatron_rl.rollout.engines.transformers import engine as transformers_engine
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import Response, SamplingParams

PROMPTS: list[tuple[int, ...]] = [(1, 2, 3), (4,), (5, 6, 7, 8, 9), (9, 8, 7), (3,)]
STOPS = (40, 43, 46, 49)
SAMPLING = SamplingParams(n=4, max_tokens=12, temperature=1.0, stop_token_ids=STOPS, seed=3)


def full_forward(engine: TransformersEngine, prompt: tuple[int, ...], response: list[int]) -> torch.Tensor:
    """Logits [response, vocabulary] of one pass over the whole sequence, without a cache."""
    with torch.inference_mode():
        return engine.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


def assert_log_probs(
    engine: TransformersEngine, groups: list[list[Response]], prompts: list[tuple[int, ...]], temperature: float
) -> None:
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            log_p = torch.log_softmax(full_forward(engine, prompt, response.token_ids.tolist()) / temperature, -1)
            expected = log_p.gather(1, torch.tensor(response.token_ids).long()[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward(engine: TransformersEngine, temperature: float) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature))
    lengths = {len(g) for group in groups for g in group}
    assert len(lengths) > 3, "rows must end at different times, or the test does not see retired rows"
    assert_log_probs(engine, groups, PROMPTS, temperature)


def test_retiring_rows_later_changes_no_log_prob(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "RETIRE_BELOW", 0.0)
    assert_log_probs(engine, engine.generate(PROMPTS, SAMPLING), PROMPTS, 1.0)


def test_a_batch_of_few_rows_at_a_time(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "MAX_ROWS", 5)
    prompts: list[tuple[int, ...]] = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1)]
    groups = engine.generate(prompts, SAMPLING)
    assert [len(group) for group in groups] == [4] * 5
    assert_log_probs(engine, groups, prompts, 1.0)


def test_responses_end_with_their_first_stop_token_or_at_the_limit(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, n=16))
    reasons = set()
    for response in (g for group in groups for g in group):
        *before, last = response.token_ids.tolist()
        assert len(response.log_probs) == len(response) <= SAMPLING.max_tokens
        assert not set(before) & set(STOPS)
        if response.finish_reason == "stop":
            assert last in STOPS
        else:
            assert last not in STOPS and len(response) == SAMPLING.max_tokens
        assert response.weight_version == 0
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


def test_without_stop_tokens_every_response_has_full_length(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS[:2], replace(SAMPLING, stop_token_ids=()))
    assert {(g.finish_reason, len(g)) for group in groups for g in group} == {("length", 12)}


def test_a_stop_token_at_the_last_position_is_a_stop(engine: TransformersEngine) -> None:
    groups = engine.generate([(1,)], replace(SAMPLING, max_tokens=1, stop_token_ids=tuple(range(50))))
    assert {(g.finish_reason, len(g)) for g in groups[0]} == {("stop", 1)}


def test_the_samples_of_a_prompt_differ(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [len(group) for group in groups] == [4] * len(PROMPTS)
    assert all(len({tuple(g.token_ids.tolist()) for g in group}) > 1 for group in groups)


def test_the_seed_decides_the_tokens(engine: TransformersEngine) -> None:
    first, again = engine.generate(PROMPTS, SAMPLING), engine.generate(PROMPTS, SAMPLING)
    other = engine.generate(PROMPTS, replace(SAMPLING, seed=4))
    assert first == again
    assert first != other


def test_temperature_zero_is_greedy(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, temperature=0.0))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len({tuple(g.token_ids.tolist()) for g in group}) == 1
        tokens = group[0].token_ids.tolist()
        assert tokens == full_forward(engine, prompt, tokens).argmax(-1).tolist()
    assert_log_probs(engine, groups, PROMPTS, 1.0)


def test_no_prompts_no_responses(engine: TransformersEngine) -> None:
    assert engine.generate([], SAMPLING) == []


@pytest.mark.parametrize("seed", [0, 20261231, 2**62])
def test_a_generator_accepts_reseeded_seeds(engine: TransformersEngine, seed: int) -> None:
    """A run reseeds once per step, and then once per engine."""
    sampling = replace(SAMPLING, seed=seed, max_tokens=2)
    streams = [sampling.reseeded(2**31 - 1).reseeded(engine_index) for engine_index in (0, 1)]
    answers = [engine.generate(PROMPTS, stream) for stream in streams]
    assert answers[0] != answers[1]


def test_a_paused_engine_refuses_requests(model_folder: Path) -> None:
    engine = TransformersEngine(model_folder, "cpu", "float32")
    engine.pause()
    with pytest.raises(RuntimeError, match=r"paused: resume\(\)"):
        engine.generate(PROMPTS, SAMPLING)
    engine.resume()
    assert len(engine.generate(PROMPTS[:1], SAMPLING)) == 1


def test_weights_are_aligned_whatever_file_they_come_from(engine: TransformersEngine) -> None:
    """The last bits of a product depend on the alignment; a resumed run starts its engines from another file."""
    assert all(parameter.data_ptr() % 64 == 0 for parameter in engine.model.parameters())


LONG = replace(SAMPLING, max_tokens=24)


def complete(group: list[Response]) -> bool:
    return all(response.finish_reason != "abort" for response in group)


def test_the_engine_stops_when_min_groups_are_complete(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, LONG, (), 2)
    assert sum(map(complete, groups)) in (2, 3)  # two may end with the same token
    aborted = [g for group in groups for g in group if g.finish_reason == "abort"]
    assert aborted and len(set(map(len, aborted))) == 1, "rows stopped at different lengths"
    assert_log_probs(engine, groups, PROMPTS, 1.0)


@pytest.mark.parametrize("rows", [512, 5])
def test_partial_responses_are_continued(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Existing tokens stay, also those of complete responses; log-probs of the rest are those of a full forward."""
    monkeypatch.setattr(transformers_engine, "MAX_ROWS", rows)
    first = engine.generate(PROMPTS, LONG, (), 1)
    first[-1] = []  # no responses yet
    groups = engine.generate(PROMPTS, replace(LONG, seed=9), first)
    assert all(map(complete, groups)) and [len(group) for group in groups] == [4] * len(PROMPTS)
    for partial, group in zip(first[:-1], groups[:-1], strict=True):
        for before, after in zip(partial, group, strict=True):
            length = len(before)
            assert after.token_ids[:length].tolist() == before.token_ids.tolist()
            assert after.log_probs[:length].tolist() == before.log_probs.tolist()
            assert len(after) <= LONG.max_tokens
            assert before.finish_reason == "abort" or after == before
    assert_log_probs(engine, groups, PROMPTS, 1.0)


def test_a_response_that_is_aborted_at_its_last_token_is_complete(engine: TransformersEngine) -> None:
    aborted = [response_of([1, 2], [-1.0, -2.0], "abort", 0)] * 4
    groups = engine.generate([(1,)], replace(SAMPLING, max_tokens=2), [aborted])
    assert groups == [[replace(response, finish_reason="length") for response in aborted]]


def test_tokens_have_the_version_of_the_weights_that_sampled_them(model_folder: Path) -> None:
    engine = TransformersEngine(model_folder, "cpu", "float32")
    first = engine.generate(PROMPTS, LONG, (), 1)
    engine.version = 7
    for partial, group in zip(first, engine.generate(PROMPTS, LONG, first), strict=True):
        for before, after in zip(partial, group, strict=True):
            old = len(before)
            assert after.weight_versions.tolist() == [0] * old + [7] * (len(after) - old)
