"""The embedded Countdown task: problems, warm-start traces, tokenizer and model, written as ordinary files."""

from megatron_rl.data.countdown.task import write_calculator_task, write_task

__all__ = ["write_calculator_task", "write_task"]
