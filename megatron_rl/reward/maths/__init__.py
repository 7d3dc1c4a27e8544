r"""Maths answers: what the last \boxed{} holds, compared with the label as mathematics."""

from .verifier import verify_maths

__all__ = ["verify_maths"]
