"""The models of a run: the policy, and a reference model in a folder of its own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.published import known_config


def model_folders(config: Config) -> list[Path]:
    """Returns the policy's folder, and that of the reference model if the configuration names one that is used."""
    reference = config.algorithm.reference_kl
    return [config.model.path, *([reference.model] if reference.active and reference.model else [])]


def check_reference(config: Config) -> None:
    """Raises UserError if the reference model has another architecture than the policy, whose ranks compute it."""
    policy, *others = (Architecture.from_hf(known_config(folder)) for folder in model_folders(config))
    for other in others:
        differing = [
            f"{field.name} {getattr(other, field.name)} instead of {getattr(policy, field.name)}"
            for field in fields(Architecture)
            if field.name != "max_positions" and getattr(other, field.name) != getattr(policy, field.name)
        ]
        if differing:
            raise UserError(
                f"algorithm.reference_kl.model: {config.algorithm.reference_kl.model} has another architecture than "
                f"model.path: {', '.join(differing)}. Give a model of the policy's own architecture"
            )
