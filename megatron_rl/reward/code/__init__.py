"""The code reward: runs Python programs against tests in a sandbox."""

from .verifier import CodeReward

__all__ = ["CodeReward"]
