"""The Megatron model and the LM head."""
