"""Forward and backward passes over the sequences of a batch."""
