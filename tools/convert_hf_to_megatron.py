"""Converts a Hugging Face folder to Megatron's distributed checkpoint (torch_dist).

    python tools/convert_hf_to_megatron.py HF_FOLDER OUT

The same as `megatron-rl convert HF_FOLDER OUT --format torch_dist`, with the same options.
"""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--format", "torch_dist"]))
