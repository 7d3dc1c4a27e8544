"""What a Hugging Face model is: its architecture, the names and shapes of its tensors, its files."""
