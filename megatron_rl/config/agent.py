"""The `rollout.agent` section: a program of the user's own that samples responses in several turns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator

from megatron_rl.utils.import_path import is_import_path

from .fields import Positive, PositiveInt, Section, Text

ENVIRONMENTS = {
    "verifiers": "megatron_rl.environments.verifiers:VerifiersAgent",
    "harbor": "megatron_rl.environments.harbor:HarborAgent",
    "openenv": "megatron_rl.environments.openenv:OpenEnvAgent",
    "nemo-gym": "megatron_rl.environments.nemo_gym:NemoGymAgent",
}
"""Name -> import path of the agent of each library of environments: a class that is constructed from a URL."""
COLUMNS = {
    "verifiers": ("task", "environment"),
    "harbor": ("task", "environment"),
    "nemo-gym": ("responses_create_params",),
}
"""Name -> columns that a row must have beside its prompt."""
SERVED = ("openenv", "nemo-gym")
"""The libraries whose environments are servers: the setting names their URL after the name."""
FORMS = "package.module:function, verifiers, harbor, openenv:URL or nemo-gym:URL"


def _agent(value: str) -> str:
    name, _, url = value.partition(":")
    if name in ENVIRONMENTS and name not in SERVED and (url or value.endswith(":")):
        raise ValueError(f"{name} alone: data.train names the environment, as {name}:{url or '...'}")
    if name in SERVED and not url.startswith(("http://", "https://")):
        raise ValueError(f"{name}:URL, with the URL of the server, such as {name}:http://127.0.0.1:8000")
    if name not in ENVIRONMENTS and not is_import_path(value):
        raise ValueError(FORMS)
    return value


class AgentSettings(Section):
    """An agent and its limits. `rollout.max_response_tokens` limits the sampled tokens of a rollout."""

    function: Annotated[Text, AfterValidator(_agent)]
    """The agent: an async function `(model, prompt)` that returns a reward, or None if `reward.name` grades the
    rollout (docs/agents.md has examples); or the library that runs the environment: verifiers, harbor, openenv:URL or
    nemo-gym:URL (docs/environments.md)."""
    max_turns: PositiveInt = 32
    """Most calls of the model in a rollout. A rollout that needs more ends as a truncated response."""
    timeout_seconds: Positive = 1800.0
    """Longest duration of a rollout. A rollout that needs more is cancelled and has no reward."""
    graded: Literal["answer", "transcript"] = "answer"
    """Text that a verifier (`reward.name` other than agent) and `reward.format` see. answer: what the policy sampled in
    its last turn, so that the output of a tool is never graded as the policy's. transcript: its whole newest sequence,
    with what it was given in between; for verifiers that know the difference."""
    host: Text = "127.0.0.1"
    """Address that the model's server listens on: set the node's own address if containers or other machines call
    it."""

    @property
    def library(self) -> str:
        """Name of the library of environments that `function` names; of no meaning for a function."""
        return self.function.partition(":")[0]

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises ValueError if the columns of a row, beside its prompt, lack one that the agent of a library needs."""
        if missing := [name for name in COLUMNS.get(self.library, ()) if name not in columns]:
            raise ValueError(
                f"the row has no column {missing[0]}, which the agent {self.library} needs: see docs/environments.md"
            )
