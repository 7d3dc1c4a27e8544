"""Puts the examples into the wheel, as `megatron_rl/examples`; all other settings are in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    """Copies the examples, which `megatron-rl init` writes, beside the modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a clone has them beside the package
        for source in sorted([*Path("examples").rglob("*.yaml"), *Path("examples").rglob("*.py")]):
            target = Path(self.build_lib, "megatron_rl", source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithExamples})
