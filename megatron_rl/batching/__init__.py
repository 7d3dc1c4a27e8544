"""From samples to rows, from rows to micro-batches, and these to ranks."""
