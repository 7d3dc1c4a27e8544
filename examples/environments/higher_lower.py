"""An environment of verifiers, written here: the policy guesses a number, and hears whether it is higher or lower.

It is an ordinary module for verifiers, which knows nothing of this project.
"""

import re
from collections.abc import Iterable
from typing import Literal

import verifiers.v1 as vf

__all__ = ["HigherLowerEnv", "HigherLowerTaskset"]


class Config(vf.TasksetConfig):
    highest: int = 100
    ranges: int = 1
    """Number of ranges: from 1 to `highest`, from 2 to `highest + 1`, and so on."""
    split: Literal["train", "test"] = "train"
    """test: every fifth number of each range, which train does not have there."""


class Data(vf.TaskData):
    secret: int


class HigherLower(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def found(self, trace: vf.Trace) -> float:
        """1 for a hit at the first guess, a little less for every further one, 0 without a hit."""
        guesses = [guess_of(message.content or "") for message in trace.assistant_messages]
        return 0.9 ** guesses.index(self.data.secret) if self.data.secret in guesses else 0.0


class HigherLowerTaskset(vf.Taskset[HigherLower, Config]):
    def load(self) -> Iterable[HigherLower]:
        for below in range(self.config.ranges):
            lowest, highest = 1 + below, self.config.highest + below
            prompt = f"I think of a number from {lowest} to {highest}. Guess it: answer with a number alone."
            for secret in range(lowest, highest + 1):
                if ((secret + below) % 5 == 0) == (self.config.split == "test"):
                    data = Data(name=f"{secret} of {lowest} to {highest}", prompt=prompt, secret=secret)
                    yield HigherLower(data, self.config.task)


class EnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class HigherLowerEnv(vf.Env[EnvConfig]):
    async def run(self, task: HigherLower, agents: vf.Agents) -> None:
        async with agents.player.interaction(task) as talk:
            heard = await talk.turn()
            while not heard.terminated and (guess := guess_of(heard.last_reply)) != task.data.secret:
                if guess is None:
                    heard = await talk.turn("That is no number.")
                else:
                    heard = await talk.turn("Higher." if guess < task.data.secret else "Lower.")


def guess_of(text: str) -> int | None:
    """The last number in a text."""
    numbers = re.findall(r"\d{1,9}", text)
    return int(numbers[-1]) if numbers else None
