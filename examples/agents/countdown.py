"""A Countdown agent with a calculator: whenever the policy writes `=`, the calculator writes the result.

The policy samples the operands, the operators and the verdicts. The results are observations: they are part of the
sequence, and no loss trains them. The verifier of the task grades the whole text.
"""

from __future__ import annotations

from megatron_rl.agent.model import Model
from megatron_rl.agent.tools import calculator
from megatron_rl.types import Prompt


async def solve(model: Model, prompt: Prompt) -> None:
    """Goes on until the policy ends its response, or makes a calculation whose result is no word of the task."""
    ids = list(prompt.token_ids)
    while True:
        answer = await model.generate(ids, stop=["="])
        ids += answer.response.token_ids.tolist()
        *_, left, operator, right, end = ["", "", "", *model.tokenizer.decode(ids).split()]
        if end != "=":
            return
        try:
            result = calculator(f"{left} {operator} {right}")
        except (ValueError, SyntaxError):
            return
        if result not in model.tokenizer.get_vocab():
            return
        ids.append(model.tokenizer.convert_tokens_to_ids(result))
