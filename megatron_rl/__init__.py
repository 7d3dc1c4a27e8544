"""RLVR on Megatron: the system around `lpreg`."""

__version__ = "0.1.0"
