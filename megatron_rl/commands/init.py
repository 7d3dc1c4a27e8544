"""`megatron-rl init`: writes a configuration to start from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config.files import Layer

QUICKSTART, OWN_DATA, RECIPES = "quickstart", "own_data", "recipes"
DEMONSTRATION = f"{QUICKSTART}/demonstration"
_FILES = {QUICKSTART: "quickstart/countdown.yaml", OWN_DATA: "own_data.yaml"}
"""Short names, and the files below `examples/` that they stand for."""
READY = (QUICKSTART, DEMONSTRATION, "agents/calculator", "agents/countdown")
"""Configurations that train as they are."""


def add(commands: Any) -> None:
    """Declares `init`."""
    parser = commands.add_parser("init", help="write a configuration to start from; without a name, list them")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"{QUICKSTART}, {OWN_DATA} or another of the list")
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
    has_code = any(path.suffix == ".py" for path in written)
    # Modules are imported from the working folder.
    moved = options.output != Path() and has_code
    file = written[0].relative_to(options.output) if moved else written[0]
    command = f"python {file.with_suffix('.py')}" if options.name == DEMONSTRATION else f"megatron-rl train {file}"
    if any(f"verifiers:{path.stem}" in written[0].read_text(encoding="utf-8") for path in written[1:]):
        command = f"PYTHONPATH={file.parent} {command}"  # verifiers imports the module of an environment by its name
    command = f"cd {options.output} && {command}" if moved else command
    print(f"next: {command}" + ("" if options.name in READY else " --dry-run"))


def examples() -> Path:
    """Returns the folder of the examples: inside the package if it was installed from a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "examples"
    return inside if inside.is_dir() else package.parent / "examples"


def starting_points() -> dict[str, Path]:
    """Returns the files that a run can start from, by name. Files that only others build on are left out."""
    folder = examples()
    named = {name: folder / file for name, file in _FILES.items()}
    others = sorted(
        path
        for path in folder.rglob("*.yaml")
        if path.name != "base.yaml" and path.parent != folder / RECIPES and path not in named.values()
    )
    # The recipes stand last: they are many.
    others.sort(key=lambda path: path.is_relative_to(folder / RECIPES))
    return named | {f"{path.parent.name}/{path.stem}": path for path in others}


def write_start(source: Path, folder: Path) -> list[Path]:
    """Copies a configuration, the files that it builds on and its code, comments included. Returns the copies, the
    configuration first.

    The files keep their places relative to one another, which their `base` names; with code, their places below
    `examples/`, which imports name. Raises UserError if a file exists already with another content, or cannot be
    written; then nothing is written.
    """
    from megatron_rl.config.files import read_layers

    layers = list(reversed(read_layers(source)))
    files = [layer.path.resolve() for layer in layers]
    modules = _modules(layers) or _scripts(files[0])
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


def _scripts(source: Path) -> list[Path]:
    """Returns the Python files of a configuration's folder, if its text names one of them."""
    scripts, text = sorted(source.parent.glob("*.py")), source.read_text(encoding="utf-8")
    return scripts if any(script.name in text for script in scripts) else []
