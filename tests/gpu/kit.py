"""Collects what the GPU session needs on a machine without a network, in the folder `.gpu-kit` of the repository.

    python -m tests.gpu.kit [--transformer-engine ARCHIVE]

The machine is expected to have Python 3.12 and, in its own packages, CUDA builds of torch and Triton, transformers,
pytest and the packages in `ON_THE_MACHINE`. The kit brings the rest as wheels. Transformer Engine is optional, because
its wheels are larger than a kit may be: ARCHIVE is a tar file with an installed `transformer_engine` in it that fits
the machine's torch. Without it the session leaves out the steps that need it and says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
KIT = REPOSITORY / ".gpu-kit"
PYTHON = "3.12"
WHEELS = (
    "megatron-core==0.18.2", "pydantic==2.14.3", "pydantic_core==2.50.4", "annotated-types==0.8.0",
    "typing-inspection==0.4.2",
)  # fmt: skip
"""Packages that the machine lacks, without their dependencies."""
ON_THE_MACHINE = (
    "torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "safetensors", "PyYAML",
    "packaging", "psutil", "pyarrow", "rich", "aiohttp", "Jinja2",
)  # fmt: skip
"""Dependencies of the project that the session may import there beside the kit's wheels."""
LIMIT = 40 * 2**20
"""Bytes that a kit may have, so that it travels with the working tree."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--transformer-engine", type=Path, help="tar file with an installed transformer_engine")
    engine: Path | None = parser.parse_args().transformer_engine
    if engine is not None and not engine.is_file():
        sys.exit(f"--transformer-engine {engine}: no such file")
    shutil.rmtree(KIT, ignore_errors=True)
    (KIT / "wheels").mkdir(parents=True)
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    download = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    where = ["--python-version", PYTHON, *platforms, "--dest", str(KIT / "wheels")]
    subprocess.run([sys.executable, "-m", *download, *where, *WHEELS], check=True)
    if engine is not None:
        shutil.copy(engine, KIT / f"transformer_engine{''.join(engine.suffixes[-2:])}")
    files = [path for path in KIT.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(REPOSITORY)}")
    if size > LIMIT:
        sys.exit(f"The kit has {size / 2**20:.1f} MiB; at most {LIMIT / 2**20:.0f} MiB can be carried")
    print(f"ready: {size / 2**20:.1f} MiB in {KIT.name}; run python -m tests.gpu.session on the GPU machine")


if __name__ == "__main__":
    main()
