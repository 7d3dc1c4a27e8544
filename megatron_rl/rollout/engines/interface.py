"""What every rollout engine can do, and what one is started with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.kind import SETTING, EngineKind
from megatron_rl.types import FinishReason, Response, SamplingParams
from megatron_rl.utils.import_path import import_object
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import GroupMember, WeightUpdate

LOOPBACK = "127.0.0.1"


class EngineLost(Exception):
    """The engine has ended, hangs or keeps failing, and is not used again. The message gives the reason."""


class UpdateFailed(Exception):
    """The engine works, but has only a part of a weight update. It serves again once it has a complete one."""


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """What an engine is started with."""

    kind: EngineKind
    model_folder: Path
    device: str
    """cpu or cuda."""
    dtype: str
    max_tokens: int
    """Largest number of tokens of a prompt and its response together."""
    server: ServerSettings = field(default_factory=ServerSettings)
    """Settings of servers; an embedded engine may ignore them."""
    url: str | None = None
    """Address of a running server to attach to; the fields above, except `kind` and `server`, are then not used."""
    colocated: bool = False
    """Whether the engine must release its GPU memory while the actor trains."""
    keeps_requests: bool = False
    """Whether a server whose kind allows it keeps requests across weight updates with their KV cache, unless it says
    that it cannot; else it aborts them, and they continue after a new prefill."""
    host: str = LOOPBACK
    """Address that a server listens on."""


@dataclass(frozen=True, slots=True)
class Address:
    """URL of a server, and its admin key if it has one."""

    url: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Drafts:
    """Tokens of speculative decoding."""

    proposed: int = 0
    accepted: int = 0
    """Those of the proposed ones that the policy accepted."""

    def __add__(self, other: Drafts) -> Drafts:
        return Drafts(self.proposed + other.proposed, self.accepted + other.accepted)

    def __sub__(self, other: Drafts) -> Drafts:
        return Drafts(self.proposed - other.proposed, self.accepted - other.accepted)


def response_of(
    token_ids: npt.ArrayLike,
    log_probs: npt.ArrayLike,
    finish_reason: FinishReason,
    weight_version: int,
    version_changes: tuple[tuple[int, int], ...] = (),
) -> Response:
    """A response whose tokens are all sampled, from arrays or lists of equal length."""
    ids, values = np.asarray(token_ids, dtype=np.int32), np.asarray(log_probs, dtype=np.float32)
    return Response(ids, values, finish_reason, weight_version, version_changes)


class Responder(Protocol):
    """A process of a run that samples responses: an engine, or the router in front of several."""

    def start(self) -> Address | None:
        """Returns once it can serve: a server's address, else None. Raises EngineLost."""
        return None

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        partial: Sequence[Sequence[Response]] = (),
        min_groups: int | None = None,
    ) -> list[list[Response]]:
        """`sampling.n` responses for each prompt, in the prompts' order. Raises EngineLost.

        partial: for each prompt, `sampling.n` partial responses to continue, or none. min_groups: the number of
        complete groups after which an embedded engine stops; unfinished responses then have the finish reason abort.
        Servers ignore it, and are stopped by `abort`.
        """
        ...

    def abort(self) -> None:
        """Ends every `generate` under way with the tokens sampled so far; not for embedded engines."""
        return None

    def pause(self) -> None:
        """Stops sampling until `resume`; requests under way are kept, or aborted and continued then."""
        return None

    def close(self) -> None:
        """Ends everything that was started; returns once it has ended."""
        return None


class RolloutEngine(Responder, Protocol):
    """Token ids in, token ids out. Log-probabilities are the untruncated policy's at the sampling temperature.

    An embedded engine is a subclass, and defines the abstract methods; the others do nothing by default. Any other
    engine has the same methods as coroutines.
    """

    def resume(self) -> None:
        """Samples again, with the newest weights. Raises UpdateFailed."""
        return None

    @abstractmethod
    def update_weights(self, update: WeightUpdate) -> None:
        """Takes new weights while paused; the next token is sampled from them. Raises UpdateFailed."""
        ...

    @abstractmethod
    def verify_weights(self, version: int, sent: Checksums) -> int:
        """Compares the engine's weights with those sent. Returns the number of tensors; 0: they cannot be compared, and
        the log says why. Raises WeightsDamaged."""
        ...

    def join_groups(self, members: Sequence[GroupMember]) -> None:
        """Joins these groups for broadcast updates, and leaves all others; for transports without a folder."""
        return None

    @abstractmethod
    def release_memory(self) -> None:
        """Pauses and frees the GPU memory; `update_weights` and `resume` allocate it again."""
        ...

    @abstractmethod
    def health(self) -> int:
        """The weight version being served. Raises an exception if the engine cannot serve."""
        ...

    def take_drafts(self) -> Drafts:
        """What speculative decoding did since the last call."""
        return Drafts()

    def until_lost(self) -> None:
        """Raises EngineLost once the engine is lost, and never returns; for engines behind a router."""
        return None


def make_engine(launch: EngineLaunch) -> RolloutEngine:
    """Makes an engine in this process, without starting it. Raises UserError if the engine cannot be imported."""
    engine: RolloutEngine = import_object(launch.kind.engine, SETTING)(launch)
    return engine


class RequestRouter(Responder, Protocol):
    """A router in front of the servers of a run."""

    def serve(self, servers: Sequence[Address], version: int) -> set[str]:
        """Passes requests on to these servers, which all have this weight version. Returns the URLs that the router
        reached. Raises EngineLost."""
        ...
