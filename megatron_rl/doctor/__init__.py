"""Checks for problems that would keep a run from starting or finishing: `megatron-rl doctor`."""
