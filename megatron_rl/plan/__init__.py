"""Memory, operations and time of a run before it starts, from its configuration and the model's config.json alone."""
