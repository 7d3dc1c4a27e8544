"""The Megatron model, its attention and its LM head."""
