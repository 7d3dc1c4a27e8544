"""The optimizer, its state, its schedule, and snapshots of the weights."""
