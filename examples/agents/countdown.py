"""Countdown agents with a calculator, which writes the results that the policy asks for.

The policy samples the operands, the operators and the verdicts. The calculator's results are observations: they are
part of the sequence, and no loss trains them. The verifier of the task grades the whole text.
"""

from __future__ import annotations

from megatron_rl.agent.model import Model
from megatron_rl.agent.tools import calculator
from megatron_rl.types import Prompt


async def solve(model: Model, prompt: Prompt) -> None:
    """The calculator computes every result: `3 + 5 =` is a call."""
    await respond(model, prompt, call="=")


async def choose(model: Model, prompt: Prompt) -> None:
    """The policy chooses: `3 + 5 calc` is a call, and after `3 + 5 =` the policy writes the result itself."""
    await respond(model, prompt, call="calc")


async def respond(model: Model, prompt: Prompt, call: str) -> None:
    """Goes on until the policy ends its response, or makes a calculation whose result is no word of the task."""
    ids = list(prompt.token_ids)
    while True:
        answer = await model.generate(ids, stop=[call])
        ids += answer.response.token_ids.tolist()
        *_, left, operator, right, end = ["", "", "", *model.tokenizer.decode(ids).split()]
        if end != call:
            return
        result = await model.use_tool(calculator, expression=f"{left} {operator} {right}")
        if result not in model.tokenizer.get_vocab():
            return
        ids.append(model.tokenizer.convert_tokens_to_ids(result))
