"""Commands that need more than a line in `cli.py`, a module each: `add` declares the command's options."""
