"""The `rollout.agent` section: a program of the user's own that samples responses in several turns."""

from __future__ import annotations

from typing import Annotated

from .fields import NameOrPath, Positive, PositiveInt, Section, Text


class AgentSettings(Section):
    """An agent and its limits. `rollout.max_response_tokens` limits the sampled tokens of a rollout."""

    function: Annotated[str, NameOrPath((), "package.module:function")]
    """The agent: an async function `(model, prompt)` that returns a reward, or None if `reward.name` grades the
    rollout. docs/agents.md has examples."""
    max_turns: PositiveInt = 32
    """Most calls of the model in a rollout. A rollout that needs more ends as a truncated response."""
    timeout_seconds: Positive = 1800.0
    """Longest duration of a rollout. A rollout that needs more is cancelled and has no reward."""
    host: Text = "127.0.0.1"
    """Address that the model's server listens on: set the node's own address if containers or other machines call
    it."""
