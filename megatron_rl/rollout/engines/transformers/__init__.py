"""The embedded engine: plain transformers in the engine's own process."""
