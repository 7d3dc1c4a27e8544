"""Rollout engines and what is asked of them."""
