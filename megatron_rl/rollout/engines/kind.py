"""What the program knows about a rollout engine before it starts one.

Each engine has a folder beside this file, whose `kind.py` declares the engine's `KIND`. Declarations load no torch, as
configuration checks, the plan and the doctor read them on login nodes: heavy code is named by its import path.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import import_object

SETTING = "rollout.engine"
BUILT_IN = ("transformers", "sglang", "vllm")
FOLDERS = ("shared_memory", "disk")
"""Transports that write weights to a folder, which every engine can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """A rollout engine: how it is started, and what the rest of the program must know about it."""

    name: str
    """Name in messages."""
    engine: str
    """Import path `package.module:name` of a class or function that makes a `RolloutEngine` from an `EngineLaunch`. It
    is imported and called in the engine's own process."""
    embedded: bool = True
    """Whether the engine computes in that process and takes a step's prompts in one call. Any other engine has
    coroutines for methods, and gets each prompt as a request of its own."""
    transports: tuple[str, ...] = FOLDERS
    """Values of `weight_sync.transport` that the engine supports. With `collective`, `delta` and `cuda_ipc` the engine
    gets a `CollectiveUpdate`, else a `FolderUpdate`."""
    memory_share: float = 0.9
    """Share of a GPU's memory that the engine takes for weights and KV cache by default, approximately."""
    remedy: str = "read the engine's log"
    """What a user should look at if the engine does not start or answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind(EngineKind):
    """An engine that is an HTTP server: `HttpEngine` starts it, or attaches to one that runs already."""

    engine: str = "megatron_rl.rollout.servers.http_engine:HttpEngine"
    embedded: bool = False
    command: str
    """Import path of the function that gives the command line, such as `sglang.server:command`."""
    server: str
    """Import path of the class that speaks to the server: a `Server`, made from an `Address`."""
    package: str
    """Name of the server's distribution package. A `-cpu` variant counts too."""
    releases: str
    """Releases of the package whose command line and HTTP interface are known to work."""
    keeps_requests: bool = False
    """Whether the server may be able to keep requests across a weight update: `Server.freeze`."""
    router: bool = False
    """Whether sglang-router can pass requests on to the server."""
    memory_option: str | None = None
    """Command-line option for the server's share of all GPU memory, if an engine that shares GPUs with the actor needs
    one."""
    processed_log_probs: str
    """What makes the server answer with log-probabilities at the sampling temperature."""


def engine_kind(name: str) -> EngineKind:
    """The engine that `rollout.engine` names: a built-in one, or the `EngineKind` at `package.module:KIND`.

    Raises UserError if there is no such engine.
    """
    if ":" not in name and name not in BUILT_IN:
        near = get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{SETTING}: {name!r} is neither one of {', '.join(BUILT_IN)} nor package.module:KIND{hint}")
    kind = import_object(f"{__package__}.{name}.kind:KIND" if name in BUILT_IN else name, SETTING)
    if not isinstance(kind, EngineKind):
        raise UserError(f"{SETTING}: {name!r} is a {type(kind).__name__}, not a {EngineKind.__module__}.EngineKind")
    return kind


def server_kinds() -> list[ServerKind]:
    """The built-in engines that are servers."""
    return [kind for kind in map(engine_kind, BUILT_IN) if isinstance(kind, ServerKind)]


def supporting(transport: str) -> list[str]:
    """Names of the built-in engines that support a weight transport."""
    return [name for name in BUILT_IN if transport in engine_kind(name).transports]
