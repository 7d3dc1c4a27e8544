r"""Maths answers: what the last \boxed{} holds, compared with the label as mathematics."""

from .boxed import last_boxed
from .verifier import verify_maths

__all__ = ["last_boxed", "verify_maths"]
