"""Python programs, run against tests in a sandbox."""

from .verifier import CodeReward

__all__ = ["CodeReward"]
