"""The embedded engine: plain transformers in a Ray process of the run."""
