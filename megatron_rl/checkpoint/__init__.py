"""Weights on disk: Hugging Face folders, and the map between their names and Megatron's."""
