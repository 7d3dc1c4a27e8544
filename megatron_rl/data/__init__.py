"""Prompts: reading files in the schemas users have, templates, and the order rows come in."""

from .cursor import Cursor
from .prompts import PromptSet, load_prompts
from .tokenizer import load_tokenizer

__all__ = ["Cursor", "PromptSet", "load_prompts", "load_tokenizer"]
