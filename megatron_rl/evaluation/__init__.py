"""Accuracy on held-out problems, and what the policy does there."""
