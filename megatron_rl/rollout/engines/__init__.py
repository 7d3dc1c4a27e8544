"""The engine interface, and one folder for each rollout engine."""
