"""What a run will need and how long it will take, from its configuration and the model's config.json alone."""
