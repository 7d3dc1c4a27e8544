"""Statistics of each token's logits (log-prob, entropy, filter mass), from logits or straight from hidden states."""
