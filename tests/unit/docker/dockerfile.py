"""Reads the Dockerfile: tests take arguments and files from it instead of repeating them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "docker/Dockerfile"


def stage(name: str) -> str:
    """Returns the text of a build stage, with continued lines joined."""
    stages = re.split(r"^FROM \S+ AS (\w+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", stages[stages.index(name) + 1])


def arguments(text: str) -> dict[str, str]:
    """Returns the build arguments and their defaults."""
    return dict(re.findall(r"^ARG (\w+)=(\S*)$", text, re.MULTILINE))


def environment(text: str) -> dict[str, str]:
    """Returns the variables that ENV instructions set."""
    lines = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return {name: value for line in lines for name, value in re.findall(r"(\w+)=(\S*)", line)}


def copied(text: str) -> list[str]:
    """Returns the files and folders that COPY instructions take into the working folder of the sources."""
    sources = text.split("WORKDIR /opt/megatron-rl")[1]
    return [word for line in re.findall(r"^COPY (.*) \S+$", sources, re.MULTILINE) for word in line.split()]
