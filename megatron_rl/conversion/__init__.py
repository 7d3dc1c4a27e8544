"""Model conversion between Hugging Face folders, a run's checkpoints and Megatron's distributed checkpoints."""
