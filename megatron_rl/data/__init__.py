"""Prompts: data files in common schemas, prompt templates, and the resumable order of the rows."""
