"""A stand-in for FlashAttention 2, which Transformer Engine's attention chooses: the same functions on a CPU."""

__version__ = "2.7.4.post1"
