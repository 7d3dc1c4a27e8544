"""`megatron-rl push`: uploads the export of a run to the Hugging Face Hub, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declares `push`."""
    parser = commands.add_parser("push", help="upload the export of a run to the Hugging Face Hub, with a model card")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("repository", metavar="OWNER/NAME", nargs="?", help="created on the Hub if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--output", type=Path, metavar="FILE", help="only write the model card, to this file")
    parser.set_defaults(command=_push)


def _push(options: argparse.Namespace) -> None:
    from megatron_rl.errors import UserError
    from megatron_rl.run.model_card import push_to_hub, write_card

    if options.output:
        print(write_card(options.folder, options.output))
    elif options.repository:
        print(push_to_hub(options.folder, options.repository, private=options.private))
    else:
        raise UserError("push: give OWNER/NAME, the repository on the Hub, or --output FILE for the model card alone")
