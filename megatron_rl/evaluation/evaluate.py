"""`megatron-rl eval`: evaluates the suites of a protocol batch by batch, and keeps each batch once it is graded."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.evaluation import ProtocolSettings, SuiteSettings
from megatron_rl.config.schema import DataSettings
from megatron_rl.data.limits import Limits
from megatron_rl.data.prompts import load_prompts
from megatron_rl.errors import UserError
from megatron_rl.evaluation.measures import Estimate, Measures, macro
from megatron_rl.evaluation.problems import Problem, problems_of, read_problems, write_problems
from megatron_rl.evaluation.sources import Source
from megatron_rl.reward.grader import open_grader
from megatron_rl.reward.grading import Grading
from megatron_rl.reward.labels import label_check
from megatron_rl.reward.trial import try_reward
from megatron_rl.types import Prompt, SamplingParams
from megatron_rl.utils.bounded import read_json_object
from megatron_rl.utils.files import atomically

IDENTITY, SUMMARY = "evaluation.json", "summary.json"


@dataclass(frozen=True)
class Progress:
    """Progress of an evaluation."""

    suite: str
    done: int
    total: int
    right: float
    """Mean over the problems so far of the mean score of the graded responses."""


class _ServersOwn:
    """Stands in for a tokenizer if only the server has one. Lengths are then not checked."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] if text else []

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        raise NotImplementedError


class Evaluation:
    """One protocol, one model, one folder. A killed evaluation continues after its last batch with the same command."""

    def __init__(self, protocol: ProtocolSettings, source: Source, folder: Path, *, seed: int, batch: int) -> None:
        """`batch`: number of problems that are sampled and kept at once.

        Raises UserError if the folder holds another evaluation, or the reward fails on a made-up response.
        """
        self.protocol, self.source, self.folder = protocol, source, folder
        self.seed, self.batch = seed, batch
        self.prompts = {name: self._load(suite) for name, suite in protocol.suites.items()}
        try_reward(protocol.reward, next(iter(self.prompts.values()))[0])
        self._claim_folder()

    def run(self, report: Callable[[Progress], None]) -> dict[str, Measures]:
        """Returns suite -> measures; writes `<suite>.parquet` and summary.json."""
        measures: dict[str, Measures] = {}
        with open_grader(self.protocol.reward, self.folder / "reward.log", self.source.decode) as grader:
            grading = Grading(grader, self.protocol.reward)
            for name in self.protocol.suites:
                measures[name] = Measures(self._suite(name, grading, report))
        summary = summary_of(measures)
        with atomically(self.folder / SUMMARY) as partial:
            partial.write_text(json.dumps(summary, indent=1) + "\n")
        return measures

    def _suite(self, name: str, grading: Grading, report: Callable[[Progress], None]) -> list[Problem]:
        prompts, complete, parts = self.prompts[name], self.folder / f"{name}.parquet", self.folder / f"{name}.parts"
        problems = read_problems(complete) if complete.is_file() else []
        report(_progress(name, problems, len(prompts)))
        while len(problems) < len(prompts):
            first = len(problems)
            part = parts / f"{first:06d}.parquet"
            if not part.is_file():
                chosen = prompts[first : first + self.batch]
                write_problems(part, self._graded(chosen, self._sampling(self.protocol.suites[name], first), grading))
            problems += read_problems(part)
            report(_progress(name, problems, len(prompts)))
        if not complete.is_file():
            write_problems(complete, problems)
        shutil.rmtree(parts, ignore_errors=True)
        return problems

    def _graded(self, prompts: Sequence[Prompt], sampling: SamplingParams, grading: Grading) -> list[Problem]:
        samples = self.source.sample(prompts, sampling)
        results = grading.grade_samples(samples)
        grading.check([(sample.prompt, result) for sample, result in zip(samples, results, strict=True)])
        return problems_of(samples, results)

    def _sampling(self, suite: SuiteSettings, first: int) -> SamplingParams:
        """The random numbers depend only on the seed and the place in the suite, so that a restart changes nothing."""
        protocol = self.protocol
        return SamplingParams(
            n=suite.samples_per_prompt or protocol.samples_per_prompt,
            max_tokens=suite.max_response_tokens or protocol.max_response_tokens,
            temperature=protocol.temperature if suite.temperature is None else suite.temperature,
            stop_token_ids=self.source.stop,
            seed=self.seed,
        ).reseeded(first)

    def _load(self, suite: SuiteSettings) -> list[Prompt]:
        settings = DataSettings(
            train=suite.data,
            template=self.protocol.template,
            max_prompt_tokens=self.protocol.max_prompt_tokens,
            long_prompts="truncate_left",
        )
        tokenizer = self.source.tokenizer or _ServersOwn()
        return load_prompts(suite.data, tokenizer=tokenizer, settings=settings, check=self._check_of(suite)).prompts

    def _check_of(self, suite: SuiteSettings) -> Callable[[Prompt], None]:
        """A function that raises ValueError for a row that the model, the agent or the verifier cannot take."""
        limits = Limits(
            self.source.vocabulary or sys.maxsize,
            self.source.positions or sys.maxsize,
            suite.max_response_tokens or self.protocol.max_response_tokens,
            "max_response_tokens",
            "max_prompt_tokens",
            "--max-positions",
        )
        check_label = label_check(self.protocol.reward)

        def check(prompt: Prompt) -> None:
            limits.check(prompt)
            if self.protocol.agent:
                self.protocol.agent.check_columns(prompt.metadata)
            if check_label:
                check_label(prompt)

        return check

    def _claim_folder(self) -> None:
        # As evaluations of versions without agents and environments. The data file is named after the tasks.
        unset: dict[str, Any] = {} if self.protocol.agent else {"agent": True}
        unset["suites"] = {"__all__": {"tasks"}}
        identity = {
            "source": self.source.identity,
            "protocol": self.protocol.model_dump(mode="json", exclude=unset),
            "seed": self.seed,
            "batch": self.batch,
        }
        path = self.folder / IDENTITY
        if path.is_file():
            before = read_json_object(path)
            if before != json.loads(json.dumps(identity)):
                changed = [name for name in identity if before.get(name) != json.loads(json.dumps(identity[name]))]
                raise UserError(
                    f"{self.folder} holds an evaluation with another {' and '.join(changed)}: choose another folder "
                    "with --out, or remove this one"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no evaluation: choose another folder with --out")
        with atomically(path) as partial:
            partial.write_text(json.dumps(identity, indent=1) + "\n")


def summary_of(measures: dict[str, Measures]) -> dict[str, Any]:
    """Returns everything the table shows, and pass@k for every power of two. A measure without any graded response is
    None."""
    suites = {}
    for name, suite in measures.items():
        powers = [2**i for i in range(suite.k.bit_length()) if 2**i < suite.k] + [suite.k]
        suites[name] = {
            "problems": len(suite.problems),
            "k": suite.k,
            f"avg@{suite.k}": _as_json(suite.avg),
            **{f"pass@{k}": _as_json(suite.pass_at(k)) for k in powers},
            f"maj@{suite.k}": _as_json(suite.majority),
            "response_length": suite.response_length,
            "truncated_fraction": suite.truncated_fraction,
            "failed_fraction": suite.failed_fraction,
        }
    return {"suites": suites, "macro_mean": _as_json(macro(list(measures.values())))}


def _as_json(estimate: Estimate) -> dict[str, float] | None:
    return None if math.isnan(estimate.value) else asdict(estimate)


def _progress(suite: str, problems: list[Problem], total: int) -> Progress:
    scores = [problem.mean_score for problem in problems if problem.mean_score is not None]
    return Progress(suite, len(problems), total, sum(scores) / max(1, len(scores)))
