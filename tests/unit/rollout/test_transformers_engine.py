from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.rollout.engines.transformers import engine as transformers_engine
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import Generation, SamplingParams

PROMPTS: list[tuple[int, ...]] = [(1, 2, 3), (4,), (5, 6, 7, 8, 9), (9, 8, 7), (3,)]
STOPS = (40, 43, 46, 49)
SAMPLING = SamplingParams(n=4, max_tokens=12, temperature=1.0, stop_token_ids=STOPS, seed=3)


def full_forward(engine: TransformersEngine, prompt: tuple[int, ...], response: list[int]) -> torch.Tensor:
    """Logits [response, vocabulary] of one pass over the whole sequence, without a cache."""
    with torch.inference_mode():
        return engine.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


def assert_log_probs(
    engine: TransformersEngine, groups: list[list[Generation]], prompts: list[tuple[int, ...]], temperature: float
) -> None:
    for prompt, group in zip(prompts, groups, strict=True):
        for generation in group:
            log_p = torch.log_softmax(full_forward(engine, prompt, generation.token_ids) / temperature, -1)
            expected = log_p.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(generation.log_probs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward(engine: TransformersEngine, temperature: float) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature))
    lengths = {len(g.token_ids) for group in groups for g in group}
    assert len(lengths) > 3, "rows must end at different times for this test to see what retiring them does"
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
    for generation in (g for group in groups for g in group):
        *before, last = generation.token_ids
        assert len(generation.log_probs) == len(generation.token_ids) <= SAMPLING.max_tokens
        assert not set(before) & set(STOPS)
        if generation.finish_reason == "stop":
            assert last in STOPS
        else:
            assert last not in STOPS and len(generation.token_ids) == SAMPLING.max_tokens
        assert generation.weight_version == 0
        reasons.add(generation.finish_reason)
    assert reasons == {"stop", "length"}


def test_without_stop_tokens_every_response_has_full_length(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS[:2], replace(SAMPLING, stop_token_ids=()))
    assert {(g.finish_reason, len(g.token_ids)) for group in groups for g in group} == {("length", 12)}


def test_a_stop_token_at_the_last_position_is_a_stop(engine: TransformersEngine) -> None:
    groups = engine.generate([(1,)], replace(SAMPLING, max_tokens=1, stop_token_ids=tuple(range(50))))
    assert {(g.finish_reason, len(g.token_ids)) for g in groups[0]} == {("stop", 1)}


def test_n_samples_a_prompt_that_differ(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [len(group) for group in groups] == [4] * len(PROMPTS)
    assert all(len({tuple(g.token_ids) for g in group}) > 1 for group in groups)


def test_the_seed_decides_the_tokens(engine: TransformersEngine) -> None:
    first, again = engine.generate(PROMPTS, SAMPLING), engine.generate(PROMPTS, SAMPLING)
    other = engine.generate(PROMPTS, replace(SAMPLING, seed=4))
    assert first == again
    assert first != other


def test_temperature_zero_is_greedy(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, temperature=0.0))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len({tuple(g.token_ids) for g in group}) == 1
        greedy = full_forward(engine, prompt, group[0].token_ids).argmax(-1)
        assert group[0].token_ids == greedy.tolist()
    assert_log_probs(engine, groups, PROMPTS, 1.0)


def test_no_prompts_no_responses(engine: TransformersEngine) -> None:
    assert engine.generate([], SAMPLING) == []


@pytest.mark.parametrize("seed", [0, 20261231, 2**62])
def test_a_reseeded_seed_is_one_a_generator_takes(engine: TransformersEngine, seed: int) -> None:
    """Twice, as a run (a stream a step) and its engines (a stream an engine) do it."""
    sampling = replace(SAMPLING, seed=seed, max_tokens=2)
    streams = [sampling.reseeded(2**31 - 1).reseeded(engine_index) for engine_index in (0, 1)]
    answers = [engine.generate(PROMPTS, stream) for stream in streams]
    assert answers[0] != answers[1]


def test_a_paused_engine_refuses(model_folder: Path) -> None:
    engine = TransformersEngine(model_folder, "cpu", "float32")
    engine.pause()
    with pytest.raises(RuntimeError, match=r"paused: resume\(\)"):
        engine.generate(PROMPTS, SAMPLING)
    engine.resume()
    assert len(engine.generate(PROMPTS[:1], SAMPLING)) == 1


def test_weights_are_aligned_whatever_the_file_they_came_from(engine: TransformersEngine) -> None:
    """The last bits of a product depend on it; a resumed run starts its engines from another file."""
    assert all(parameter.data_ptr() % 64 == 0 for parameter in engine.model.parameters())


LONG = replace(SAMPLING, max_tokens=24)


def whole(group: list[Generation]) -> bool:
    return all(generation.finish_reason != "abort" for generation in group)


def test_it_stops_when_enough_groups_are_whole(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, LONG, (), 2)
    assert sum(map(whole, groups)) in (2, 3)  # two may end with the same token
    cut = [g for group in groups for g in group if g.finish_reason == "abort"]
    assert cut and len({len(g.token_ids) for g in cut}) == 1, "all rows stop at one place"
    assert_log_probs(engine, groups, PROMPTS, 1.0)


@pytest.mark.parametrize("rows", [512, 5])
def test_begun_responses_are_gone_on_with(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Whatever is there stays, ended responses included; log-probs of the rest are those of a full forward."""
    monkeypatch.setattr(transformers_engine, "MAX_ROWS", rows)
    first = engine.generate(PROMPTS, LONG, (), 1)
    first[-1] = []  # not begun at all
    groups = engine.generate(PROMPTS, replace(LONG, seed=9), first)
    assert all(map(whole, groups)) and [len(group) for group in groups] == [4] * len(PROMPTS)
    for begun, group in zip(first[:-1], groups[:-1], strict=True):
        for before, after in zip(begun, group, strict=True):
            length = len(before.token_ids)
            assert after.token_ids[:length] == before.token_ids and after.log_probs[:length] == before.log_probs
            assert len(after.token_ids) <= LONG.max_tokens
            assert before.finish_reason == "abort" or after == before
    assert_log_probs(engine, groups, PROMPTS, 1.0)


def test_a_response_cut_at_its_last_token_is_whole(engine: TransformersEngine) -> None:
    cut = [Generation([1, 2], [-1.0, -2.0], "abort", 0)] * 4
    groups = engine.generate([(1,)], replace(SAMPLING, max_tokens=2), [cut])
    assert groups == [[replace(generation, finish_reason="length") for generation in cut]]


def test_tokens_of_newer_weights_say_so(model_folder: Path) -> None:
    engine = TransformersEngine(model_folder, "cpu", "float32")
    first = engine.generate(PROMPTS, LONG, (), 1)
    engine.version = 7
    for begun, group in zip(first, engine.generate(PROMPTS, LONG, first), strict=True):
        for before, after in zip(begun, group, strict=True):
            old = len(before.token_ids)
            assert after.weight_versions == [0] * old + [7] * (len(after.token_ids) - old)
