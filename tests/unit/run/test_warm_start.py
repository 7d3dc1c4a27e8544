from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.actor.optimizer.learning_rate import learning_rate
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.models.hf_shards import HfShard
from megatron_rl.run.warm_start import _check_rows, _key, _read_traces, warm_start
from tests.hf_models import config_json

TEXT = """\
model: {path: model}
data: {train: train.jsonl}
warm_start:
  batch_size: 2
  warmup_steps: 1
  min_lr_ratio: 0.1
  phases:
    - {data: a.parquet, steps: 3, lr: 1e-2}
    - {data: b.parquet, steps: 2, lr: 1e-3}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10}
"""


def write_traces(path: str, *rows: tuple[str | None, str | None]) -> Path:
    prompts, responses = zip(*rows, strict=True) if rows else ((), ())
    columns = {"response": list(responses), "prompt": list(prompts), "other": [0] * len(rows)}
    types = [("response", pa.string()), ("prompt", pa.string()), ("other", pa.int64())]
    pq.write_table(pa.table(columns, schema=pa.schema(types)), path)
    return Path(path)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a model folder, which no test loads, and the traces of two phases."""
    monkeypatch.chdir(tmp_path)
    Path("example.yaml").write_text(TEXT)
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        Path("model", name).write_text(name)
    Path("model/config.json").write_text(json.dumps(config_json("qwen3", vocab_size=10, max_position_embeddings=12)))
    write_traces("a.parquet", ("1 2", "3"), ("4", "5 6"), ("7", "8"))
    write_traces("b.parquet", ("2", "1 1"))


def config(*overrides: str) -> Config:
    return load_config(Path("example.yaml"), ["run.name=mine", *overrides])


def key(*overrides: str, phases: int = 2) -> str:
    settings = config(*overrides)
    assert settings.warm_start is not None
    return _key(settings, settings.warm_start, phases)


class Tokenizer:
    """A tokenizer in which each number is its own token, and other words give none."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split() if word.isdigit()] for text in texts]}


TOKENIZER: Any = Tokenizer()


def change_a_byte() -> None:
    Path("model/model.safetensors").write_text("model.safetensorz")


def add_a_file() -> None:
    Path("model/chat_template.jinja").write_text("")


def change_a_trace() -> None:
    write_traces("b.parquet", ("2", "1 2"))


@pytest.mark.parametrize("change", [change_a_byte, add_a_file, change_a_trace])
def test_the_key_changes_with_every_input_file(change: Callable[[], None]) -> None:
    before = key()
    assert key() == before
    change()
    assert key() != before


@pytest.mark.parametrize(
    "override",
    [
        "actor.dtype=bfloat16",
        "warm_start.batch_size=3",
        "warm_start.betas=[0.9, 0.98]",
        "warm_start.weight_decay=0.1",
        "warm_start.warmup_steps=2",
        "warm_start.min_lr_ratio=0.2",
        "warm_start.phases.0.steps=4",
        "warm_start.phases.1.lr=2e-3",
        "warm_start.phases.0.data=b.parquet",
    ],
)
def test_the_key_changes_with_every_setting_that_affects_the_result(override: str) -> None:
    assert key(override) != key()


@pytest.mark.parametrize(
    "override",
    [
        "warm_start.cache_folder=elsewhere",
        "actor.tensor_parallel=2",
        "actor.pipeline_parallel=2",
        "actor.data_parallel=2",
        "actor.micro_batch_tokens=77",
        "actor.optimizer.lr=1",
        "train.steps=11",
        "seed=1",  # a warm start draws no random numbers
        "run.name=other",
    ],
)
def test_the_key_does_not_change_with_the_layout_or_with_later_settings(override: str) -> None:
    assert key(override) == key()


def test_a_later_phase_does_not_change_the_key_of_an_earlier_one() -> None:
    before = key(phases=1)
    assert before != key(phases=2)
    change_a_trace()
    assert key("warm_start.phases.1.lr=2e-3", phases=1) == before


def test_the_key_does_not_depend_on_the_location_of_the_files() -> None:
    before = key()
    Path("moved").mkdir()
    shutil.move("model", "moved/model")
    shutil.move("a.parquet", "moved/a.parquet")
    assert key("model.path=moved/model", "warm_start.phases.0.data=moved/a.parquet") == before


def test_traces_are_sequences_whose_response_is_trained_on() -> None:
    batch = _read_traces(Path("a.parquet"), TOKENIZER)
    assert [ids.tolist() for ids in batch.sequences] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert [batch.mask_of(i).tolist() for i in range(3)] == [[False, False, True], [False, True, True], [False, True]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], r"x\.parquet contains no traces"),
        ([("1", "2"), ("", "2")], r"x\.parquet: prompt of row 1 is ''; text is expected"),
        ([("1", "2"), ("1", None)], r"x\.parquet: response of row 1 is None; text is expected"),
        ([("one", "2")], r"x\.parquet: prompt of row 0 gives no tokens"),
    ],
)
def test_traces_that_cannot_be_trained_on_are_refused(rows: list[tuple[str | None, str | None]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _read_traces(write_traces("x.parquet", *rows), TOKENIZER)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2, 3], [1, 9, 10]], "row 1 has the token id 10, but the model has 10 token ids"),
        ([[1, 2, 3], [1] * 13], "row 1 has 13 tokens, prompt and response together, but the model is made for 12"),
    ],
)
def test_traces_that_the_model_cannot_take_are_refused(rows: list[list[int]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _check_rows(SequenceBatch.of(rows, [1, 1]), Path("a.parquet"), config())
    _check_rows(SequenceBatch.of([[1, 9], [1] * 12], [1, 1]), Path("a.parquet"), config())
    if "positions" in words:
        _check_rows(SequenceBatch.of(rows, [1, 1]), Path("a.parquet"), config("model.max_positions=13"))


def test_a_file_without_the_columns_is_refused() -> None:
    pq.write_table(pa.table({"prompt": ["1"]}), "x.parquet")
    for path in ("x.parquet", "example.yaml"):
        with pytest.raises(UserError, match=rf"{path}: a parquet file with the columns prompt and response"):
            _read_traces(Path(path), TOKENIZER)


class Step:
    def __init__(self, loss: float) -> None:
        self.loss = loss


class FakeActors:
    """Records the calls."""

    def __init__(self, loss: float = 1.0) -> None:
        self.loss = loss
        self.calls: list[str] = []
        self.steps: list[tuple[list[list[int]], float, float]] = []

    def load_hf(self, folder: Path) -> None:
        self.calls.append(f"load {folder}")

    def prepare(self, loss: None, optimizer: Any) -> None:
        self.calls.append(f"optimizer {optimizer.lr} {optimizer.betas} {optimizer.weight_decay}")

    def submit_train(self, batch: SequenceBatch, *, lr: float, denominator: float) -> int:
        self.steps.append(([ids.tolist() for ids in batch.sequences], lr, denominator))
        return len(self.steps) - 1

    def train_result(self, submitted: int, batch: SequenceBatch) -> Step:
        assert self.steps[submitted][0] == [ids.tolist() for ids in batch.sequences]
        return Step(self.loss)

    def export_hf(self, folder: Path) -> list[HfShard]:
        (folder / "part").write_text("trained")
        return [HfShard("part", (), 0, frozenset())]


class FakeView:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def phase(self, text: str) -> None:
        self.told.append(text)

    message = phase

    def warm_start(self, done: int, total: int, loss: float, left: float) -> None:
        self.told.append((done, total, loss))


def start(actors: Any, view: Any, *overrides: str) -> Path:
    return warm_start(config(*overrides), actors, TOKENIZER, view)


def test_a_run_without_a_warm_start_uses_the_model_unchanged() -> None:
    assert start(None, None, "warm_start=null").resolve() == Path("model").resolve()


def test_the_steps_of_each_phase() -> None:
    actors, view = FakeActors(), FakeView()
    folder = start(actors, view)
    first = f"runs/cache/warm_start-1-{key(phases=1)}"
    assert actors.calls == [
        *(f"load {config().model.path}", "optimizer 0.01 (0.9, 0.999) 0.0"),
        *(f"load {first}", "optimizer 0.001 (0.9, 0.999) 0.0"),
    ]
    one, two, three, other = [1, 2, 3], [4, 5, 6], [7, 8], [2, 1, 1]
    wanted = [
        [one, two],
        [three, one],
        [two, three],
        [other, other],
        [other, other],
    ]  # each phase repeats its traces
    assert [rows for rows, _, _ in actors.steps] == wanted
    assert [denominator for _, _, denominator in actors.steps] == [3, 2, 3, 4, 4]
    rates = [
        learning_rate(step, peak=peak, total_steps=total, warmup_steps=1, schedule="cosine", min_ratio=0.1)
        for peak, total in ((1e-2, 3), (1e-3, 2))
        for step in range(1, total + 1)
    ]
    np.testing.assert_allclose([lr for _, lr, _ in actors.steps], rates)
    assert [told for told in view.told if isinstance(told, tuple)] == [
        (1, 3, 1.0),
        (2, 3, 1.0),
        (3, 3, 1.0),
        (1, 2, 1.0),
        (2, 2, 1.0),
    ]
    assert folder.parent.resolve() == Path("runs/cache").resolve()
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_text() == "trained"


def test_a_second_run_takes_the_warm_start_from_the_cache() -> None:
    first = start(FakeActors(), FakeView())
    actors = FakeActors()
    assert start(actors, FakeView(), "actor.tensor_parallel=2") == first
    assert not actors.steps and not actors.calls


def test_a_warm_start_with_a_loss_of_nan_is_not_cached() -> None:
    with pytest.raises(UserError, match=r"warm start: the loss is nan at step 1.*lr"):
        start(FakeActors(loss=float("nan")), FakeView())
    assert not list(Path("runs/cache").glob("warm_start-*"))


def test_an_interrupted_warm_start_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeActors, "export_hf", die)
    with pytest.raises(KeyboardInterrupt):
        start(FakeActors(), FakeView())
    assert not list(Path("runs/cache").glob("warm_start-*"))


def test_another_second_phase_starts_from_the_cached_first_phase() -> None:
    start(FakeActors(), FakeView())
    actors = FakeActors()
    start(actors, FakeView(), "warm_start.phases.1.lr=2e-3")
    assert len(actors.steps) == 2
    assert actors.calls[0] == f"load runs/cache/warm_start-1-{key(phases=1)}"


def test_two_runs_that_start_together_train_each_phase_once() -> None:
    """The second run begins while the first trains, and waits for its result."""
    view, second, folders = FakeView(), FakeActors(), []
    other = threading.Thread(target=lambda: folders.append(start(second, view)), daemon=True)

    class Slow(FakeActors):
        def load_hf(self, folder: Path) -> None:
            super().load_hf(folder)
            if not self.steps:
                other.start()
                while not any("another run is training" in str(told) for told in view.told):
                    time.sleep(0.01)

    first = Slow()
    folders.append(start(first, FakeView()))
    other.join()
    assert folders[0] == folders[1]
    assert len(first.steps) + len(second.steps) == 3 + 2
    assert any("from the cache" in str(told) for told in view.told)
