"""An engine whose log-probs differ from the actor's is found, and the cause is named.

The engine is real and gets artificial faults; the actor is a forward pass of plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.rollout import ContractSettings, RolloutSettings, ServerSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.contract import QUANTISED, Bounds, Contract
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import Prompt, Response, SamplingParams

TEMPERATURE = 0.7
PROMPTS = [Prompt(id=f"p:{i}", token_ids=(1, 3 + i, 20 + i), text="", label=None) for i in range(8)]
SAMPLING = SamplingParams(n=16, max_tokens=12, temperature=TEMPERATURE, stop_token_ids=(2,), seed=3)

Fault = Callable[["Policy", Sequence[int], Response], Response]


class Policy:
    """Stands in for the actor: log-probs by plain transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def log_p(self, tokens: Sequence[int], start: int, temperature: float) -> torch.Tensor:
        """Returns the log-probs [tokens from `start`, V]."""
        logits = self.model(torch.tensor([list(tokens)])).logits[0, start - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def score(self, rows: SequenceBatch, temperature: float) -> Array:
        parts = []
        for i, row in enumerate(rows.sequences):
            sampled = np.flatnonzero(rows.mask_of(i))
            log_p = self.log_p(row.tolist(), 1, temperature)[sampled - 1]
            parts.append(log_p.gather(1, torch.tensor(row[sampled], dtype=torch.int64)[:, None])[:, 0].numpy())
        return np.concatenate(parts)


class Process:
    def __init__(self, number: int) -> None:
        self.number, self.agrees = number, False


class Engines:
    """One or more engines, of which the last has a fault."""

    def __init__(self, engine: TransformersEngine, policy: Policy, count: int = 1) -> None:
        self.engine, self.policy = engine, policy
        self.running: list[Any] = [Process(i) for i in range(count)]
        self.fault: Fault = lambda _policy, _prompt, response: response
        self.temperature = TEMPERATURE
        self.probes = 0

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[Any, list[list[Response]]]:
        self.probes += 1
        ids = [prompt.token_ids for prompt in prompts]
        answers = dict.fromkeys(self.running, self.engine.generate(ids, sampling))
        faulty = self.engine.generate(ids, replace(sampling, temperature=self.temperature))
        answers[self.running[-1]] = [
            [self.fault(self.policy, prompt, response) for response in group]
            for prompt, group in zip(ids, faulty, strict=True)
        ]
        return answers


def reporting(log_probs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], temperature: float) -> Fault:
    """Returns a fault that reports other log-probs of the same tokens: log p [T, V], tokens [T, 1] -> [T, 1]."""

    def fault(policy: Policy, prompt: Sequence[int], response: Response) -> Response:
        log_p = policy.log_p([*prompt, *response.token_ids], len(prompt), temperature)
        chosen = log_probs(log_p, torch.tensor(response.token_ids, dtype=torch.int64)[:, None])
        return replace(response, log_probs=chosen[:, 0].numpy())

    return fault


def renormalised(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs under top-k with a fifth of the vocabulary, or with more if the sampled token is not in it."""
    chosen = log_p.gather(1, tokens)
    least = torch.minimum(log_p.topk(log_p.shape[1] // 5).values[:, -1:], chosen)
    return chosen - torch.logsumexp(log_p.masked_fill(log_p < least, -torch.inf), 1, keepdim=True)


def rounded(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, tokens).bfloat16().float()


def noisy(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs with errors to both sides, 0.04 in the mean, as kernels in half precision give on flat text."""
    places = torch.arange(len(tokens))[:, None]
    return log_p.gather(1, tokens) + 0.04 * (1 - 2 * (places % 2))


def no_number(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, tokens) * torch.nan


def plain(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, tokens)


@pytest.fixture
def engines(engine: TransformersEngine, model_folder: Path) -> Engines:
    return Engines(engine, Policy(model_folder))


def contract(dtype: str = "float32", said: list[str] | None = None, **settings: Any) -> Contract:
    notify = said.append if said is not None else print
    return Contract(rollout(**settings), dtype, PROMPTS, SAMPLING, notify)


def rollout(arguments: Sequence[str] = (), **settings: Any) -> RolloutSettings:
    return RolloutSettings(
        prompts_per_step=1,
        samples_per_prompt=1,
        max_response_tokens=1,
        server=ServerSettings(arguments=list(arguments)),
        contract=ContractSettings(**settings),
    )


def test_an_engine_that_agrees_passes(engines: Engines) -> None:
    said: list[str] = []
    metrics = contract(said=said).check(engines, engines.policy.score)
    assert 0 <= metrics["logprob/contract_abs_diff"] <= metrics["logprob/contract_max_diff"] < 1e-4
    assert [engine.agrees for engine in engines.running] == [True]
    assert len(said) == 1 and said[0].startswith("log-probs of 1 engine and of the actor agree")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (reporting(plain, 1.0), r"raw instead of processed log-probs: .* at temperature 1, not at 0\.7"),
        (reporting(plain, 0.5), r"wrong temperature: they are those at 0\.5, not at 0\.7"),
        (reporting(plain, TEMPERATURE**2), r"wrong temperature: they are those at 0\.49,"),
        (reporting(renormalised, TEMPERATURE), r"truncated sampling .* had been cut off"),
        (reporting(rounded, TEMPERATURE), "another precision"),
        (reporting(no_number, TEMPERATURE), "some of .* are NaN or infinite"),
    ],
    ids=["raw", "temperature", "twice", "top-k", "bf16", "nan"],
)
def test_the_cause_is_named(engines: Engines, fault: Fault, cause: str) -> None:
    engines.fault = fault
    with pytest.raises(UserError, match=rf"(?s)engine 0 and the actor disagree.*Likely cause: {cause}"):
        contract().check(engines, engines.policy.score)
    assert not engines.running[0].agrees


def test_an_engine_that_samples_nothing_is_refused(engines: Engines) -> None:
    engines.fault = lambda _policy, _prompt, _response: Response([], [], "stop", 0)
    with pytest.raises(UserError, match=r"engine 0 sampled no token in response to 8 prompts.*rollout\.contract"):
        contract().check(engines, engines.policy.score)


def test_an_engine_that_samples_at_another_temperature_is_refused(engines: Engines) -> None:
    """The engine reports log-probs at the temperature at which it samples."""
    engines.temperature = 1.3
    with pytest.raises(UserError, match=r"wrong temperature: they are those at 1\.3, not at 0\.7"):
        contract().check(engines, engines.policy.score)


def test_every_engine_is_checked(engine: TransformersEngine, model_folder: Path) -> None:
    engines = Engines(engine, Policy(model_folder), count=3)
    engines.fault = reporting(plain, 1.0)
    with pytest.raises(UserError, match="engine 2 and the actor disagree"):
        contract().check(engines, engines.policy.score)


def test_weights_that_never_arrive_are_named_as_the_cause(
    engine: TransformersEngine, model_folders: tuple[Path, Path]
) -> None:
    """The engine keeps its first weights; the actor has new ones."""
    folder, trained = model_folders
    engines = Engines(TransformersEngine(folder, "cpu", "float32"), Policy(folder))
    ours = contract()
    assert ours.check(engines, engines.policy.score)
    with pytest.raises(UserError, match="Likely cause: weights not synced"):
        ours.check(engines, Policy(trained).score)


def test_other_weights_from_the_start_fit_no_cause(engines: Engines, model_folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"none of the known ones alone.*other weights"):
        contract().check(engines, Policy(model_folders[1]).score)


def test_half_precision_has_bounds_of_its_own(engines: Engines) -> None:
    engines.fault = reporting(rounded, TEMPERATURE)
    assert contract("bfloat16").check(engines, engines.policy.score)
    engines.fault = reporting(plain, 1.0)
    with pytest.raises(UserError, match="raw instead of processed"):
        contract("bfloat16").check(engines, engines.policy.score)


def test_rounding_of_half_precision_may_grow_with_the_surprisal_of_the_tokens(engines: Engines) -> None:
    engines.fault = reporting(noisy, TEMPERATURE)
    sharp, flat = np.full(8, -0.5), np.full(8, -2.0)
    assert [Bounds.of(rollout(), "bfloat16", actors).mean for actors in (sharp, flat)] == [0.03, 0.06]
    assert Bounds.of(rollout(mean_difference=0.01), "bfloat16", flat).mean == 0.01
    assert contract("bfloat16").check(engines, engines.policy.score)
    with pytest.raises(UserError, match="another precision"):  # errors to both sides are no truncation
        contract("bfloat16", mean_difference=0.03).check(engines, engines.policy.score)


@pytest.mark.parametrize("arguments", [["--quantization", "fp8"], ["--quantization=fp8"], ["-q", "fp8"]])
def test_engines_in_fewer_bits_have_bounds_of_their_own(arguments: list[str], engines: Engines) -> None:
    flat = np.full(8, -2.0)
    for dtype in ("bfloat16", "float32"):
        bounds = Bounds.of(rollout(arguments), dtype, flat)
        assert (bounds.largest, bounds.mean) == (QUANTISED, QUANTISED * 0.06)
    given = Bounds.of(rollout(arguments, max_difference=2.0, mean_difference=0.1), "bfloat16", flat)
    assert (given.largest, given.mean) == (2.0, 0.1)
    engines.fault = reporting(noisy, TEMPERATURE)
    assert contract("float32", arguments=arguments).check(engines, engines.policy.score)


def test_bounds_are_settings(engines: Engines) -> None:
    engines.fault = reporting(rounded, TEMPERATURE)
    assert contract(max_difference=0.05, mean_difference=0.02).check(engines, engines.policy.score)


def test_when_the_contract_is_checked(engines: Engines) -> None:
    """Checks follow the first sync, the first update, every fifth sync, and the replacement of an engine."""
    ours = contract(every=5)
    looked = [bool(ours.check(engines, engines.policy.score)) for _ in range(6)]
    assert looked == [True, True, False, False, True, False]
    engines.running[0].agrees = False
    assert ours.check(engines, engines.policy.score)
    assert not ours.check(engines, engines.policy.score)
    assert engines.probes == 4


def test_without_engines_there_are_no_metrics(engines: Engines) -> None:
    engines.running = []
    engines.probe = lambda prompts, sampling: {}  # type: ignore[method-assign]
    assert contract().check(engines, engines.policy.score) == {}
