"""Environments of other libraries: their tasks as prompts, their scorers as rewards, their programs as agents.

Each file is an adapter of one library, and imports it only when it is used.
"""
