"""The optimizer, its state, the learning-rate schedule, and snapshots of the weights."""
