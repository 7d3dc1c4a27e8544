"""The kinds of engines: what each declares exists, and an engine from a package outside the repository can be used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.runtime import ray_runtime
from megatron_rl.config import Config, load_config
from megatron_rl.config.transport import transport_of
from megatron_rl.doctor.engines import check_engines
from megatron_rl.errors import UserError
from megatron_rl.parallel.placement import placement_of
from megatron_rl.rollout.engines.interface import EngineLaunch, RequestRouter, RolloutEngine
from megatron_rl.rollout.engines.kind import BUILT_IN, SETTING, EngineKind, ServerKind, engine_kind, supporting
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.router import Router
from megatron_rl.run.launch import launch_of
from megatron_rl.types import Prompt, SamplingParams
from megatron_rl.utils.import_path import import_object
from tests.hf_models import write_hf_model
from tests.tiers import slow
from tests.unit.config.conftest import MINIMAL

CONFIG = MINIMAL + "actor: {device: cpu}\n"
TOY = '''\
"""An engine that answers every prompt with its last token, as often as the limit allows."""

from megatron_rl.rollout.engines.interface import RolloutEngine, response_of
from megatron_rl.rollout.engines.kind import EngineKind
from megatron_rl.types import Response

KIND = EngineKind(name="echo", engine="toy_engine:EchoEngine", memory_share=0.5, remedy="ask its author")
NO_KIND = 3


class EchoEngine(RolloutEngine):
    def __init__(self, launch):
        self.limit, self.version = launch.max_tokens, 0

    def generate(self, prompts, sampling, partial=(), min_groups=None):
        if prompts[0][-1] == 0:  # breaks the interface in the way that the prompt's first token says
            return {1: [[]] * len(prompts), 2: [], 3: [[response_of([1], [0.0], "stop", 0)] * 3] * len(prompts)}.get(
                prompts[0][0], [[Response([5, 6], [], "stop", 0)] * sampling.n] * len(prompts)
            )
        lengths = [min(sampling.max_tokens, self.limit - len(prompt)) for prompt in prompts]
        return [
            [response_of([prompt[-1]] * length, [0.0] * length, "length", self.version)] * sampling.n
            for prompt, length in zip(prompts, lengths)
        ]

    def update_weights(self, update):
        self.version = update.version

    def verify_weights(self, version, sent):
        return 0

    def release_memory(self):
        pass

    def health(self):
        return self.version
'''
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads the configuration above in a folder of its own, with the toy engine on the import path."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "toy_engine.py").write_text(TOY)
    (package / "broken_engine.py").write_text("raise OSError('no device')")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", f"{package}:{Path(__file__).parents[3]}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    monkeypatch.delitem(sys.modules, "toy_engine", raising=False)

    def load_it(*overrides: str) -> Config:
        return load_config(tmp_path / "mine.yaml", ["data.max_prompt_tokens=8", *overrides])

    return load_it


@pytest.mark.parametrize("name", BUILT_IN)
def test_everything_that_a_kind_names_exists(name: str) -> None:
    kind = engine_kind(name)
    assert kind.name == name and kind.remedy and 0 < kind.memory_share <= 1
    paths = [kind.engine, *([kind.command, kind.server] if isinstance(kind, ServerKind) else [])]
    assert all(callable(import_object(path, SETTING)) for path in paths)


def test_kinds_load_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from megatron_rl.rollout.engines.kind import BUILT_IN, engine_kind\n"
        "assert [engine_kind(name).name for name in BUILT_IN] == list(BUILT_IN)\n"
        "print(*sorted({'torch', 'numpy', 'ray', 'aiohttp', 'transformers', 'vllm', 'sglang'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def signatures(interface: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(method)
        for name, method in inspect.getmembers(interface, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("engine", "interface"), [(HttpEngine, RolloutEngine), (Router, RequestRouter)], ids=["HttpEngine", "Router"]
)
def test_servers_have_the_methods_of_the_interface_as_coroutines(engine: type, interface: type) -> None:
    """Type checkers verify the embedded engine, but have no notation for the same interface with coroutines."""
    for name, expected in signatures(interface).items():
        method = getattr(engine, name)
        assert inspect.iscoroutinefunction(method), name
        found = inspect.signature(method)
        assert [*found.parameters.values()] == [*expected.parameters.values()], name


def test_the_embedded_engine_implements_the_interface() -> None:
    assert RolloutEngine in TransformersEngine.__mro__ and not TransformersEngine.__abstractmethods__


def test_an_engine_that_lacks_a_method_cannot_be_made() -> None:
    lacking: Any = type("Lacking", (RolloutEngine,), {})
    with pytest.raises(TypeError, match=r"abstract methods.*update_weights"):
        lacking()


def test_transports_belong_to_kinds(load: Load) -> None:
    assert supporting("collective") == supporting("cuda_ipc") == ["sglang", "vllm"]
    assert supporting("disk") == list(BUILT_IN)
    assert transport_of(load("rollout.engine='toy_engine:KIND'")) == "shared_memory"
    with pytest.raises(UserError, match=r"collective is for rollout\.engine: sglang or vllm; echo supports shared_mem"):
        load("rollout.engine='toy_engine:KIND'", "weight_sync.transport=collective")


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vlm", ["'vlm' is neither one of transformers, sglang, vllm nor package.module:KIND", "did you mean vllm?"]),
        ("no_such_package.engine:KIND", ["'no_such_package.engine:KIND'", "cannot be imported"]),
        ("broken_engine:KIND", ["'broken_engine:KIND'", "cannot be imported: OSError: no device"]),
        ("toy_engine:OTHER", ["'toy_engine:OTHER'", "has no 'OTHER'"]),
        ("toy_engine:NO_KIND", ["'toy_engine:NO_KIND' is a int, not a", "EngineKind"]),
        ("toy engine:KIND", ["'toy engine:KIND'", "package.module"]),
    ],
)
def test_an_engine_that_cannot_be_imported_is_an_error(load: Load, engine: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(f"rollout.engine='{engine}'")
    message = str(caught.value)
    assert [word for word in ["rollout.engine", *words] if word not in message] == [] and "\n" not in message


BREACHES = {
    1: "0 responses to a prompt, but sampling.n is 2",
    2: "0 groups for 1 prompts",
    3: "3 responses to a prompt, but sampling.n is 2",
    4: "0 log-probs for a response of 2 tokens",
}
"""First token of a prompt that ends in 0 -> what is wrong with the toy engine's answer to it."""


@slow
def test_an_engine_from_another_package_starts_answers_and_is_stopped_if_it_breaks_the_interface(
    load: Load, tmp_path: Path
) -> None:
    config = load("rollout.engine='toy_engine:KIND'", "rollout.engines=2")
    write_hf_model(tmp_path / "model")
    kind = engine_kind("toy_engine:KIND")
    assert isinstance(kind, EngineKind) and kind.embedded and kind.remedy == "ask its author"
    launch = launch_of(config, config.model.path)
    assert isinstance(launch, EngineLaunch) and launch.kind == kind and launch.max_tokens == 16
    prompts = [Prompt(str(i), (1, 10 + i), "", None) for i in range(5)]
    sampling = SamplingParams(n=2, max_tokens=4, temperature=1.0, stop_token_ids=(), seed=0)
    with ray_runtime(placement_of(config)) as nodes:
        engines = Engines(config.rollout, launch, tmp_path / "logs", nodes)
        groups = engines.generate(prompts, sampling)
        for first, words in BREACHES.items():
            for ask in (engines.generate, engines.probe):
                with pytest.raises(UserError, match=rf"engine \d returned {words}.*rollout\.engine"):
                    ask([Prompt("0", (first, 0), "", None)], sampling)
        engines.close()
        finding = check_engines(config, nodes, tmp_path / "logs")
    assert [[response.token_ids.tolist() for response in group] for group in groups] == [
        [[10 + i] * 4] * 2 for i in range(5)
    ]
    assert (finding.state, "2 x echo started" in finding.found) == ("ok", True), finding
