r"""The maths reward: compares the content of the last \boxed{} with the label as mathematics."""

from .verifier import verify_maths

__all__ = ["verify_maths"]
