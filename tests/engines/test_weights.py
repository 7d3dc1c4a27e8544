"""Weight updates of real servers by every transport, and requests during an update."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.engines.interface import LOOPBACK, UpdateFailed, response_of
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerUnavailable
from megatron_rl.types import Response
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs
from megatron_rl.weight_sync.checksums import ChecksumTaker, WeightsDamaged
from megatron_rl.weight_sync.collective import CollectiveTransport
from megatron_rl.weight_sync.delta import DeltaTransport
from megatron_rl.weight_sync.mapped import MappedTransport
from megatron_rl.weight_sync.transport import (
    CollectiveUpdate,
    FolderUpdate,
    GroupMember,
    GroupTransport,
    Pushed,
    StageBuckets,
    WeightTransport,
)
from tests.engines.conftest import Run
from tests.engines.test_generate import PROMPTS, SAMPLING, largest_gap
from tests.engines.updates import BUCKET, in_folder, tensors


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model, folder)
    torch.manual_seed(1)
    weights = {name: torch.randn_like(w) * 0.2 for name, w in load_file(model / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def serving(engine: HttpEngine, run: Run[Any], model: Path, tmp_path: Path) -> Iterator[None]:
    """Gives the engine the weights of the model on disk again after each test."""
    yield
    run(engine.pause())
    run(engine.update_weights(in_folder(tmp_path / "restored", model, 100)[0]))
    run(engine.resume())


class Sender:
    """An actor's rank, which runs in a thread."""

    def __init__(self, model: Path, group: str, transport: GroupTransport = "collective") -> None:
        """With `cuda_ipc` the memory is the host's, which on a GPU is the GPU's."""
        self.model = model
        self.member = GroupMember(group, LOOPBACK, open_port(LOOPBACK), "gloo", 2, 0, 600.0, transport)
        self.transport: WeightTransport = CollectiveTransport(self.member, 0, BUCKET)
        if transport == "cuda_ipc":
            self.transport = MappedTransport(self.member, 0, BUCKET, torch.device("cpu"))
        if transport == "delta":
            self.transport = DeltaTransport(self.member, 0, BUCKET)

    def meet(self, engine: HttpEngine, run: Run[Any]) -> None:
        """Makes both sides join the group."""
        connecting = threading.Thread(target=self.transport.connect)
        connecting.start()
        run(engine.pause())
        run(engine.join_groups([replace(self.member, rank=1)]))
        connecting.join()

    def update(self, version: int) -> CollectiveUpdate:
        specs = [TensorSpec.of(name, tensor) for name, tensor in tensors(self.model)]
        stage = StageBuckets(self.member.name, bucket_specs(specs, BUCKET))
        return CollectiveUpdate(version, (stage,), take_checksums=True)

    def push(self, version: int, into: list[Pushed], upto: int | None = None) -> None:
        into.append(self.transport.push(iter(tensors(self.model)[:upto]), version, ChecksumTaker(1)))

    def send(self, engine: HttpEngine, run: Run[Any], version: int) -> Pushed:
        """Brings the model's weights to the engine, which compares them and serves again."""
        run(engine.pause())
        pushed: list[Pushed] = []
        pushing = threading.Thread(target=self.push, args=(version, pushed))
        pushing.start()
        run(engine.update_weights(self.update(version)))
        pushing.join()
        checksums = pushed[0].checksums
        assert checksums and run(engine.verify_weights(version, checksums)) > 10
        run(engine.resume())
        return pushed[0]


def assert_serves(engine: HttpEngine, run: Run[Any], model: Path, version: int) -> None:
    groups: list[list[Response]] = run(engine.generate(PROMPTS, SAMPLING))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            assert largest_gap(model, prompt, response, 1.0) < 1e-4
            assert set(response.weight_versions.tolist()) == {version}


def test_weights_from_a_folder(engine: HttpEngine, run: Run[Any], other: Path, tmp_path: Path) -> None:
    update, checksums = in_folder(tmp_path, other, 3)
    run(engine.pause())
    run(engine.update_weights(update))
    assert run(engine.verify_weights(3, checksums)) > 10
    run(engine.resume())
    assert run(engine.health()) == 3
    assert_serves(engine, run, other, 3)


def test_memory_is_released_and_restored(engine: HttpEngine, run: Run[Any], other: Path, tmp_path: Path) -> None:
    """Colocated runs do this right after an abort. On a CPU no memory moves, but every call and the order of calls are
    real."""

    async def release() -> None:
        asking = asyncio.create_task(engine.generate(PROMPTS, replace(SAMPLING, n=16, max_tokens=50)))
        await asyncio.sleep(0.3)
        await engine.abort()
        await asking
        await engine.release_memory()

    run(release())
    with pytest.raises(UpdateFailed, match="part of a weight update"):
        run(engine.resume())
    update, checksums = in_folder(tmp_path, other, 3)
    run(engine.pause())
    run(engine.update_weights(update))
    assert run(engine.verify_weights(3, checksums)) > 10
    run(engine.resume())
    assert_serves(engine, run, other, 3)


def test_late_requests_do_no_harm(engine: HttpEngine, run: Run[Any], other: Path, tmp_path: Path) -> None:
    """A request that was given up may arrive late."""
    update, checksums = in_folder(tmp_path, other, 3)

    async def late(seconds: float) -> None:
        await asyncio.sleep(seconds)
        with suppress(ServerUnavailable):
            await engine._server.generate(PROMPTS[0], replace(SAMPLING, n=2), 30)

    async def scenario() -> None:
        await engine.pause()
        requests = [asyncio.create_task(late(i * 0.01)) for i in range(60)]
        await engine.update_weights(update)
        await engine.resume()
        await asyncio.gather(*requests)

    run(scenario())
    assert run(engine.verify_weights(3, checksums)) > 10
    assert_serves(engine, run, other, 3)


@pytest.mark.parametrize("transport", ["collective", "cuda_ipc"])
def test_weights_over_a_group_twice(
    engine: HttpEngine, run: Run[Any], model: Path, other: Path, transport: GroupTransport
) -> None:
    sender = Sender(other, f"weights-twice-{transport}", transport)
    sender.meet(engine, run)
    for version, source in ((4, other), (5, model)):
        sender.model = source
        sender.send(engine, run, version)
        assert_serves(engine, run, source, version)
    sender.transport.close()


def test_changed_weights_over_a_group(
    engine: HttpEngine, run: Run[Any], model: Path, other: Path, tmp_path: Path
) -> None:
    """The whole weights come first, then every fiftieth weight of each tensor, then none."""
    sender = Sender(model, "weights-delta", "delta")
    sender.meet(engine, run)
    sizes = []
    for version in (4, 5, 6):
        if version == 5:
            sender.model = shutil.copytree(model, tmp_path / "changed")
            weights = load_file(model / "model.safetensors")
            for name, tensor in load_file(other / "model.safetensors").items():
                weights[name].view(-1)[::50] = tensor.view(-1)[::50]
            save_file(weights, sender.model / "model.safetensors", metadata={"format": "pt"})
        sizes.append(sender.send(engine, run, version).bytes)
        if version != 6:
            assert_serves(engine, run, sender.model, version)
    assert sizes[2] < sizes[1] < sizes[0] / 10
    sender.transport.close()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_tensor_that_differs_from_the_sent_one_is_detected(
    engine: HttpEngine, run: Run[Any], other: Path, tmp_path: Path, name: str
) -> None:
    _, checksums = in_folder(tmp_path / "sent", other, 6)
    update, _ = in_folder(tmp_path / "held", other, 6, spoilt=name)
    run(engine.pause())
    run(engine.update_weights(update))
    with pytest.raises(WeightsDamaged, match=r"version 6 arrived damaged: 1 of \d+ tensors"):
        run(engine.verify_weights(6, checksums))


@pytest.mark.parametrize("transport", ["collective", "cuda_ipc"])
def test_a_server_with_a_partial_update_serves_nothing_until_it_has_a_complete_one(
    engine: HttpEngine, run: Run[Any], other: Path, tmp_path: Path, transport: GroupTransport
) -> None:
    sender = Sender(other, f"weights-broken-{transport}", transport)
    sender.meet(engine, run)

    def half() -> None:
        sender.push(7, [], upto=12)
        sender.transport.close()

    pushing = threading.Thread(target=half)
    pushing.start()
    with pytest.raises(UpdateFailed):
        run(engine.update_weights(sender.update(7)))
    pushing.join()
    with pytest.raises(UpdateFailed, match="part of a weight update"):
        run(engine.resume())
    update, checksums = in_folder(tmp_path, other, 7)
    run(engine.update_weights(update))
    assert run(engine.verify_weights(7, checksums)) > 10
    run(engine.resume())
    assert_serves(engine, run, other, 7)


@pytest.fixture
def update_under_way(
    engine: HttpEngine, run: Run[Any], model: Path, other: Path, tmp_path: Path
) -> tuple[dict[int, Path], list[list[Response]]]:
    """Model of each weight version, and groups of responses, some of which began with one version and ended with the
    other.

    The time after which some but not all tokens are sampled depends on the machine.
    """
    sampling = replace(SAMPLING, n=32, max_tokens=50, stop_token_ids=(94,))

    async def scenario(update: FolderUpdate, seconds: float) -> list[list[Response]]:
        asking = asyncio.create_task(engine.generate([PROMPTS[0]] * 8, sampling))
        await asyncio.sleep(seconds)
        await engine.pause()
        await engine.update_weights(update)
        await engine.resume()
        return await asking

    held = {run(engine.health()): model}
    for version, seconds in enumerate((0.25, 0.5, 1.0, 0.1, 2.0, 4.0), start=8):
        ((before, source),) = held.items()
        policies = {before: source, version: model if source == other else other}
        groups = run(scenario(in_folder(tmp_path, policies[version], version)[0], seconds))
        if any(response.version_changes for group in groups for response in group):
            return policies, groups
        held = {version: policies[version]}
    raise AssertionError("no update arrived between two tokens: the test sees nothing")


def test_requests_under_way_continue_with_the_new_weights(
    update_under_way: tuple[dict[int, Path], list[list[Response]]],
) -> None:
    policies, groups = update_under_way
    assert [len(group) for group in groups] == [32] * 8
    responses = [response for group in groups for response in group]
    for response in responses:
        assert set(response.weight_versions.tolist()) <= policies.keys()
        assert len(response) == 50 or response.token_ids[-1] == 94
    for response in [response for response in responses if response.version_changes][:4]:
        ((place, version),) = response.version_changes
        first = response_of(response.token_ids[:place], response.log_probs[:place], "abort", response.weight_version)
        assert largest_gap(policies[first.weight_version], PROMPTS[0], first, 1.0) < 1e-4
        rest = response_of(response.token_ids[place:], response.log_probs[place:], "length", version)
        assert largest_gap(policies[version], (*PROMPTS[0], *first.token_ids.tolist()), rest, 1.0) < 1e-4


@pytest.fixture
def keeping(engine: HttpEngine, run: Run[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine keeps requests across updates, as in asynchronous runs."""
    assert run(engine._server.cannot_freeze()) == ""
    monkeypatch.setattr(engine, "_keeps_requests", True)


def largest_gap_with_old_cache(models: tuple[Path, Path], response: Response, place: int) -> float:
    """Largest difference of log-probs from plain transformers: `models` before and after an update, which came between
    two tokens and left the first one's cache as it was. The cache of the newest token was not computed yet."""
    old, new = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in models)
    ids = torch.tensor([[*PROMPTS[0], *response.token_ids.tolist()]])
    seen = len(PROMPTS[0]) + place - 1
    with torch.inference_mode():
        before = old(ids[:, :seen], use_cache=True)
        after = new(ids[:, seen:], past_key_values=before.past_key_values)
    logits = torch.cat([before.logits[0], after.logits[0]])[len(PROMPTS[0]) - 1 : -1]
    log_p = torch.log_softmax(logits, -1).gather(1, ids[0, len(PROMPTS[0]) :, None])[:, 0]
    return float((log_p - torch.tensor(response.log_probs)).abs().max())


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.usefixtures("keeping")
def test_kept_requests_go_on_with_the_cache_of_the_older_weights(
    engine: HttpEngine, run: Run[Any], update_under_way: tuple[dict[int, Path], list[list[Response]]]
) -> None:
    """The log-probs show which weights sampled each token, and that nothing was computed again."""
    policies, groups = update_under_way
    responses = [response for group in groups for response in group]
    changed = [response for response in responses if response.version_changes]
    for response in responses:
        assert set(response.weight_versions.tolist()) <= policies.keys()
        assert len(response) == 50 or response.token_ids[-1] == 94
    for response in changed[:: max(1, len(changed) // 12)]:
        ((place, version),) = response.version_changes
        models = (policies[response.weight_version], policies[version])
        assert largest_gap_with_old_cache(models, response, place) < 1e-4
    newest = run(engine.health())
    assert_serves(engine, run, policies[newest], newest)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.usefixtures("keeping")
def test_requests_are_kept_during_a_broadcast(engine: HttpEngine, run: Run[Any], other: Path) -> None:
    sender = Sender(other, "weights-kept")
    sender.meet(engine, run)
    run(engine.resume())
    before, pushed = run(engine.health()), []

    async def scenario() -> list[list[Response]]:
        asking = asyncio.create_task(engine.generate(PROMPTS, replace(SAMPLING, n=64, max_tokens=50)))
        await asyncio.sleep(0.2)
        await engine.pause()
        pushing = threading.Thread(target=sender.push, args=(40, pushed))
        pushing.start()
        await engine.update_weights(sender.update(40))
        await asyncio.to_thread(pushing.join)
        assert await engine.verify_weights(40, pushed[0].checksums) > 10
        await engine.resume()
        return await asking

    groups: list[list[Response]] = run(scenario())
    assert {version for group in groups for r in group for version in r.weight_versions.tolist()} <= {before, 40}
    assert_serves(engine, run, other, 40)
    sender.transport.close()
