"""The `rollout` section: what samples the responses, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, FilePath, Positive, PositiveInt, Section, Text

UPDATE_BYTES_PER_SECOND = 100 * 10**6
"""Slower than any network or disk that a run would put up with."""


class ServerSettings(Section):
    """SGLang or vLLM servers: how one is started, and when it is given up. Nothing here is read by `transformers`."""

    urls: list[Text] = Field(default_factory=list)
    """Servers that run already, one an engine, to attach to; empty: each engine starts its own on its node. Their
    admin key, if they have one, is read from MEGATRON_RL_ENGINE_KEY."""
    router: Literal["round_robin", "power_of_two", "cache_aware", "random"] | None = None
    """For sglang: have sglang-router share requests out to the engines, by this policy of its own; unset: they go to
    the engine with the fewest. It is started by the run, from the same environment as the servers."""
    python: FilePath | None = None
    """Interpreter of the environment the server is installed in; unset: this one."""
    tensor_parallel: PositiveInt = 1
    """Ranks that share each layer inside one engine."""
    arguments: list[Text] = Field(default_factory=list)
    """Further arguments of the server's command line, as they are; they win over ours."""
    environment: dict[Text, str] = Field(default_factory=dict)
    """Further environment variables of the server."""
    start_timeout_seconds: Positive = 900.0
    """Longest time a server may take until it answers."""
    request_timeout_seconds: Positive = 3600.0
    """Longest time one request may take; beyond it, it is aborted and asked again."""
    update_timeout_seconds: Positive | None = None
    """Longest time an engine may take to load new weights, and to hear of those that are broadcast, or it is replaced;
    unset: `hang_seconds`, and a second for each 100 MB of the model."""
    request_attempts: PositiveInt = 4
    """How often a request is asked before its engine is given up and replaced."""
    hang_seconds: Positive = 60.0
    """A server that gives no sign of life for so long is replaced."""
    outage_seconds: Positive = 1800.0
    """Longest time without any engine; beyond it the run stops with a checkpoint."""

    def update_seconds(self, nbytes: int) -> float:
        """Longest time that weights of so many bytes may take."""
        return self.update_timeout_seconds or self.hang_seconds + nbytes // UPDATE_BYTES_PER_SECOND


class ContractSettings(Section):
    """The log-prob contract: what an engine says of the tokens it sampled must be what the actor says of them. Every
    engine is asked at the start, after the first update and when it has been replaced; training does not go on without.
    """

    every: Count = 50
    """And every so many weight syncs, of which a step has one; 0: not again."""
    max_difference: Positive | None = None
    """Largest difference of a token, in nats; unset: 1e-4 in float32, 1 in bfloat16."""
    mean_difference: Positive | None = None
    """Largest mean difference over the tokens, in nats; unset: 1e-4 in float32, 0.03 in bfloat16."""


class RolloutSettings(Section):
    """Sampling the responses of a step."""

    engine: Literal["transformers", "sglang", "vllm"] = "transformers"
    """What generates: transformers, embedded in a process of ours; or a server, sglang or vllm."""
    engines: PositiveInt = 1
    """Engines that share a step's prompts."""
    server: ServerSettings = ServerSettings()
    """Of sglang and vllm."""
    contract: ContractSettings = ContractSettings()
    """Of log-probs, with every engine."""
    replay: FilePath | None = None
    """A folder of rollout dumps to train on, one a step, in place of engines; set by `megatron-rl train --rollouts`."""
    prompts_per_step: PositiveInt
    """Prompts a step; one group each."""
    samples_per_prompt: PositiveInt
    """Responses in a group."""
    dynamic_sampling: bool = False
    """Leave out groups whose responses all have the same score, and draw other prompts until the step is full."""
    group_filter: Text | None = None
    """A function of your own, `package.module:function`, that decides whether a graded group is trained on; groups that
    it leaves out are replaced as with dynamic sampling. Unset: dynamic_sampling decides."""
    max_draws: PositiveInt = 10
    """Most prompts drawn for a step with dynamic sampling, in multiples of those asked for at first; then the step goes
    on with the groups it has. None at all is an error."""
    over_sampling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Prompts under way for each one needed. The step goes on with the first groups that are whole; what is unfinished
    then is dropped, or goes on at the next step where max_staleness lets it."""
    max_staleness: Count = 0
    """Most steps for which a token may lie between being sampled and being trained on. 0: every step samples by its own
    weights alone. More: what a step has not finished or not needed goes on at the next one, with the tokens it has."""
    asynchronous: bool = False
    """Engines go on sampling while the actor trains; needs a max_staleness of 1 or more."""
    max_response_tokens: PositiveInt
    """Longest response, in tokens, its stop token included."""
    temperature: Positive = 1.0
    """Of sampling, and of the log-probabilities in the loss. There is no top-p or top-k: both would falsify them."""
    stop_token_ids: Annotated[list[Count], Field(min_length=1)] | None = None
    """Token ids that end a response; unset: the end tokens of the generation config, or else of the tokenizer."""
