"""Prompts: data files in common schemas, prompt templates, and the resumable order of the rows."""

from .cursor import Cursor
from .prompts import PromptSet, load_prompts
from .tokenizer import load_tokenizer

__all__ = ["Cursor", "PromptSet", "load_prompts", "load_tokenizer"]
