"""Hugging Face models: their architecture, the names and shapes of their tensors, and their files."""
