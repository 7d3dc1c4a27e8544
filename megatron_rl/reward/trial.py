"""The trial call of a reward of the user's own, before a run starts."""

from __future__ import annotations

import numpy as np

from megatron_rl.config.reward import REMOTE, VERIFIERS, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, Response, Sample

from .pool import RewardPool
from .results import plain_text

TRIAL_RESPONSE = "The answer is 0."
"""The response of the trial call. A reward must score any text."""
EXCERPT = 200
"""Number of characters of a label that a message shows."""


def try_reward(settings: RewardSettings, prompt: Prompt) -> None:
    """Calls a reward of the user's own once, in a worker process, with a made-up response to `prompt`.

    Built-in rewards are not called, and neither is a server. Raises UserError if the call has no score.
    """
    if settings.name == REMOTE or settings.name in VERIFIERS:
        return
    token_ids = np.array(prompt.token_ids, np.int32)
    response = Response(token_ids, np.zeros(len(token_ids), np.float32), "stop", 0)
    with RewardPool(settings.model_copy(update={"workers": 1})) as pool:
        (result,) = pool.score([Sample(prompt, response, TRIAL_RESPONSE)])
    if result.has_score:
        return
    late = f" (reward.timeout_seconds: {settings.timeout_seconds:g})" if result.outcome == "timeout" else ""
    raise UserError(
        f"reward.name={settings.name!r}: nothing has started, because a trial call of the reward failed: "
        f"{result.detail}{late}\n"
        f"  prompt {prompt.id}, label {plain_text(repr(prompt.label))[:EXCERPT]}, response {TRIAL_RESPONSE!r}\n"
        f"A reward must score any response, with 0 if it cannot be read, within reward.timeout_seconds and "
        f"reward.memory_mb. docs/rewards.md has a complete example."
    )
