"""Evaluation: accuracy on held-out problems, and probes of the policy's behaviour."""
