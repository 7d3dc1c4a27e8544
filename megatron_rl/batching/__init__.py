"""Batches of sequences: how they are stored, split into mini-batches and micro-batches, and given to ranks."""
