"""A run from its opening to its end: folder, inputs, processes, warm start, interruption, what is left behind."""
