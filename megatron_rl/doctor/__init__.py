"""What may keep a run from starting or finishing, looked for before it starts: `megatron-rl doctor`."""
