"""Writes a built-in task before training, if the configuration names one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.data.countdown import write_calculator_task, write_task
from megatron_rl.observability.view import View

TASKS: dict[str, Callable[[Path], None]] = {"countdown": write_task, "countdown_calculator": write_calculator_task}


def prepare(config: Config, view: View) -> None:
    """Writes the task's problems, tokenizer and model into its folder unless they are there already."""
    if config.prepare:
        view.phase(f"preparing the {config.prepare.task} task")
        TASKS[config.prepare.task](config.prepare.folder)
        view.message(f"{config.prepare.task} task: {config.prepare.folder}")
