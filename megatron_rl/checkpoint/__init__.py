"""Checkpoints of a run: their files and manifest, saving, retention, and the export of the trained model."""
