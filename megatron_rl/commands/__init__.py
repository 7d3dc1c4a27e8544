"""The commands of `megatron-rl`, one module each.

`add` of a module declares the command and its options. A module imports what its command needs inside its functions,
so that `megatron-rl --help` is quick and needs no torch.
"""
