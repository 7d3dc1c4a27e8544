"""Converts a run's checkpoint, or one of Megatron, to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py CHECKPOINT OUT

The same as `megatron-rl convert CHECKPOINT OUT --format hf`, with the same options.
"""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--format", "hf"]))
