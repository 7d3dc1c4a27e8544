"""`megatron-rl init`: writes a configuration to start from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config.files import Layer

QUICKSTART, OWN_DATA = "quickstart", "own_data"
_FILES = {QUICKSTART: "quickstart/countdown.yaml", OWN_DATA: "own_data.yaml"}
"""Short names, and the files below `examples/` that they stand for."""
READY = (QUICKSTART, "agents/calculator")
"""Configurations that train as they are."""


def add(commands: Any) -> None:
    """Declares `init`."""
    parser = commands.add_parser("init", help="write a configuration to start from; without a name, list them")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"{QUICKSTART}, {OWN_DATA}, an agent or a recipe")
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="FOLDER", help="folder of the files; default: the working folder"
    )
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> None:
    known = starting_points()
    if options.name is None:
        print("megatron-rl init NAME, with NAME one of", *known, sep="\n  ")
        return
    if options.name not in known:
        from difflib import get_close_matches

        near = get_close_matches(options.name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"there is nothing to start from named {options.name}{hint} `megatron-rl init` lists all names")
    written = write_start(known[options.name], options.output)
    print(*written, sep="\n")
    command = f"megatron-rl train {written[0]}"
    # Modules are imported from the working folder.
    if options.output != Path() and any(path.suffix == ".py" for path in written):
        command = f"cd {options.output} && megatron-rl train {written[0].relative_to(options.output)}"
    print(f"next: {command}" + ("" if options.name in READY else " --dry-run"))


def examples() -> Path:
    """Returns the folder of the examples: inside the package if it was installed from a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "examples"
    return inside if inside.is_dir() else package.parent / "examples"


def starting_points() -> dict[str, Path]:
    """Returns the files that a run can start from, by name. Files that only others build on are left out."""
    folder = examples()
    agents = sorted((folder / "agents").glob("*.yaml"))
    files = sorted(path for path in (folder / "recipes").glob("*/*.yaml") if path.name != "base.yaml")
    variants = sorted(path for path in (folder / "quickstart").glob("*.yaml") if path != folder / _FILES[QUICKSTART])
    return (
        {name: folder / file for name, file in _FILES.items()}
        | {f"{QUICKSTART}/{path.stem}": path for path in variants}
        | {f"{path.parent.name}/{path.stem}": path for path in (*agents, *files)}
    )


def write_start(source: Path, folder: Path) -> list[Path]:
    """Copies a configuration, the files that it builds on and the module of its agent, comments included. Returns the
    copies, the configuration first.

    The files keep their places relative to one another, which their `base` names; with a module, their places below
    the folder, from which the module is imported. Raises UserError if a file exists
    already with another content, or cannot be written; then nothing is written.
    """
    from megatron_rl.config.files import read_layers

    layers = list(reversed(read_layers(source)))
    files, modules = [layer.path.resolve() for layer in layers], _modules(layers)
    root = examples().resolve().parent if modules else Path(os.path.commonpath([path.parent for path in files]))
    copies = {path: folder / path.relative_to(root) for path in (*files, *modules)}
    for path, copy in copies.items():
        if copy.exists() and (not copy.is_file() or copy.read_bytes() != path.read_bytes()):
            raise UserError(f"{copy} exists already; choose another folder with --output FOLDER")
    try:
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error
    return list(copies.values())


def _modules(layers: list[Layer]) -> list[Path]:
    """Returns the files of the examples whose functions a configuration names as `examples.module:function`."""
    sections = [layer.tree.get("rollout", {}).get("agent") or {} for layer in layers]
    names = [str(section.get("function", "")).partition(":")[0] for section in sections]
    root = examples().resolve().parent
    return [root / f"{name.replace('.', '/')}.py" for name in names if name.startswith("examples.")]
