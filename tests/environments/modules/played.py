"""Environments of verifiers for the tests: one turn, several turns, tools; and the ways in which one may fail."""

import asyncio
from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["PlayedEnv", "PlayedTaskset"]


class TaskConfig(vf.TaskConfig):
    tools: bool = False


class Config(vf.TasksetConfig):
    fails: str = ""
    """What fails: load, reward, run, hang, listener; or nothing."""
    turns: int = 1
    task: TaskConfig = TaskConfig()


class Data(vf.TaskData):
    letter: str


class Counter(vf.Toolset[vf.ToolsetConfig, vf.State]):
    """Tools of the task, in a process of their own."""

    @vf.tool
    async def count(self, word: str, letter: str) -> int:
        """Counts a letter in a word."""
        return word.count(letter)


class Played(vf.Task[Data, vf.State, TaskConfig]):
    @classmethod
    def toolsets(cls, config: TaskConfig) -> list[vf.Toolset]:
        return [Counter(vf.ToolsetConfig())] if config.tools else []

    @vf.reward(weight=0.5)
    async def letters(self, trace: vf.Trace) -> float:
        """The share of the letter in the last answer."""
        if self.data.name == "broken":
            raise RuntimeError("the scorer is broken")
        return trace.last_reply.count(self.data.letter) / max(len(trace.last_reply), 1)

    @vf.reward
    async def answered(self, trace: vf.Trace) -> float:
        return 0.25


class PlayedTaskset(vf.Taskset[Played, Config]):
    def load(self) -> Iterable[Played]:
        if self.config.fails == "load":
            raise OSError("the disk is full")
        for letter in "abcdefgh":
            name = "broken" if self.config.fails == "reward" else letter
            data = Data(name=name, prompt=f"Write the letter {letter}.", system_prompt="Be short.", letter=letter)
            yield Played(data, self.config.task)


class EnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    listener: vf.AgentConfig = vf.AgentConfig()


class PlayedEnv(vf.Env[EnvConfig]):
    async def setup(self, agents: vf.Agents) -> None:
        agents.listener.trainable = False

    async def run(self, task: Played, agents: vf.Agents) -> None:
        config = self.config.taskset
        if config.fails == "run":
            raise RuntimeError("the environment is gone")
        if config.fails == "hang":
            await asyncio.sleep(3600)
        if config.fails == "listener":
            await agents.listener.run(task)
        if config.turns == 1:
            await agents.player.run(task)
            return
        async with agents.player.interaction(task) as talk:
            heard = await talk.turn()
            for turn in range(1, config.turns):
                if heard.terminated:
                    break
                heard = await talk.turn(f"turn {turn}")


if __name__ == "__main__":
    Counter.run()
