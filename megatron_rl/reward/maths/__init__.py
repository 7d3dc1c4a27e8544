r"""The maths reward: compares the content of the last \boxed{} with the label as mathematics."""

from .reward import MathsReward
from .verifier import verify_maths

__all__ = ["MathsReward", "verify_maths"]
