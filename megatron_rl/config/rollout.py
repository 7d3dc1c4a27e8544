"""The `rollout` section: what samples the responses, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .agent import AgentSettings
from .fields import Count, FilePath, NameOrPath, Positive, PositiveInt, Section, Text

UPDATE_BYTES_PER_SECOND = 100 * 10**6
"""A rate below that of any network or disk that a run would tolerate."""


class ServerSettings(Section):
    """SGLang or vLLM servers: how one is started, and when it is given up. Embedded engines read none of this."""

    urls: list[Text] = Field(default_factory=list)
    """URLs of running servers to attach to, one per engine; empty: each engine starts a server on its own node. The
    admin key of these servers, if they have one, is read from MEGATRON_RL_ENGINE_KEY."""
    router: Literal["round_robin", "power_of_two", "cache_aware", "random"] | None = None
    """For sglang: policy by which sglang-router distributes requests to the engines; unset: each request goes to the
    engine with the fewest. The run starts the router from the same environment as the servers."""
    python: FilePath | None = None
    """Interpreter of the environment in which the server is installed; unset: the interpreter of the run."""
    tensor_parallel: PositiveInt = 1
    """Ranks that share each layer inside one engine."""
    arguments: list[Text] = Field(default_factory=list)
    """Further command-line arguments of the server, passed unchanged; they override those of the run."""
    environment: dict[Text, str] = Field(default_factory=dict)
    """Further environment variables of the server."""
    start_timeout_seconds: Positive = 900.0
    """Longest time until a server answers after its start."""
    request_timeout_seconds: Positive = 3600.0
    """Longest time of one request; after it, the request is aborted and retried."""
    update_timeout_seconds: Positive | None = None
    """Longest time that an engine may take to load new weights, or to receive a broadcast, before it is replaced;
    unset: `hang_seconds`, and a second for each 100 MB of the model."""
    request_attempts: PositiveInt = 4
    """Attempts of a request before its engine is given up and replaced."""
    hang_seconds: Positive = 60.0
    """Time without a sign of life after which a server is replaced."""
    outage_seconds: Positive = 1800.0
    """Longest time without any engine; after it, the run stops with a checkpoint."""

    @property
    def quantised(self) -> bool:
        """Whether the arguments have a server hold its weights in fewer bits than the actor's."""
        return any(word == "-q" or word.partition("=")[0] == "--quantization" for word in self.arguments)

    @property
    def speculates(self) -> bool:
        """Whether the arguments switch speculative decoding on."""
        return any(word.startswith("--speculative") for word in self.arguments)

    def update_seconds(self, nbytes: int) -> float:
        """Longest time that weights of so many bytes may take."""
        return self.update_timeout_seconds or self.hang_seconds + nbytes // UPDATE_BYTES_PER_SECOND


class ContractSettings(Section):
    """The log-prob contract: an engine's log-probabilities of the tokens that it sampled must be the actor's. Each
    engine is checked at the start, after the first update and after a replacement; if the check fails, training
    stops."""

    every: Count = 50
    """Weight syncs between further checks; a step has one sync; 0: no further checks."""
    max_difference: Positive | None = None
    """Largest difference for a token, in nats; unset: 1e-4 in float32, 1 in bfloat16, 4 for quantised engines."""
    mean_difference: Positive | None = None
    """Largest mean difference over the tokens, in nats; unset: 1e-4 in float32, in bfloat16 the larger of 0.03 and 3 %
    of the tokens' mean surprisal, and four times that for quantised engines."""


class RolloutSettings(Section):
    """Sampling the responses of a step."""

    engine: Text = "transformers"
    """The rollout engine: transformers, embedded in a process of the run; a server, sglang or vllm; or
    package.module:KIND, the import path of an EngineKind of your own."""
    engines: PositiveInt = 1
    """Number of engines, which share a step's prompts."""
    server: ServerSettings = ServerSettings()
    """Settings of servers: sglang and vllm."""
    contract: ContractSettings = ContractSettings()
    """Check that each engine's log-probabilities are the actor's."""
    agent: AgentSettings | None = None
    """A program of your own that samples each response, in several turns and with tools; unset: one turn."""
    replay: FilePath | None = None
    """A folder of rollout dumps to train on instead of engines, one dump per step; set by `megatron-rl train
    --rollouts`."""
    prompts_per_step: PositiveInt
    """Prompts per step, with one group each."""
    samples_per_prompt: PositiveInt
    """Responses in a group."""
    dynamic_sampling: bool = False
    """Drop groups whose responses all have the same score, and draw other prompts until the step is full."""
    group_filter: Annotated[str, NameOrPath((), "package.module:function")] | None = None
    """A function of your own, `package.module:function`, that decides whether a graded group is trained on; groups that
    it leaves out are replaced as with dynamic sampling. Unset: dynamic_sampling decides."""
    max_draws: PositiveInt = 10
    """Most prompts drawn for a step with dynamic sampling, in multiples of the prompts drawn at first; the step then
    continues with the groups that it has. A step without any group is an error."""
    over_sampling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Prompts under way for each one needed. The step continues with the first groups that are complete; unfinished
    groups are dropped, or continued at the next step if max_staleness allows it."""
    max_staleness: Count = 0
    """Most steps between the sampling of a token and training on it. 0: every step samples by its own weights alone.
    More: groups that a step has not finished or not needed are continued at the next step, with the tokens they have.
    """
    asynchronous: bool = False
    """Whether engines continue to sample while the actor trains; needs a max_staleness of 1 or more."""
    recompute_kv_cache: bool = True
    """For asynchronous runs: whether a weight update aborts the requests under way, which then continue after a new
    prefill by the new weights. False: vLLM servers keep these requests and go on with the cache of the older
    weights; this was run with a server on a CPU only."""
    max_response_tokens: PositiveInt
    """Longest response, in tokens, its stop token included."""
    temperature: Positive = 1.0
    """Temperature of sampling, and of the log-probabilities in the loss. There is no top-p or top-k: both would falsify
    the log-probabilities."""
    stop_token_ids: Annotated[list[Count], Field(min_length=1)] | None = None
    """Token ids that end a response; unset: the end tokens of the generation config, or else of the tokenizer."""
