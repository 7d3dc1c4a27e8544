"""The interface of a rollout engine, and one folder for each engine."""
