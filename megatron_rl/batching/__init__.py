"""From samples to rows, and from rows to micro-batches."""
