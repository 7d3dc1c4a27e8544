"""A run from its start to its end: folder, warm start, resume, interruption and results."""
