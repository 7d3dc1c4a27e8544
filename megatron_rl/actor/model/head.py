"""How hidden states become the loss: the LM head on response positions alone, and what the loss reads off its logits.

Fused, logits are never whole: `lpreg` projects a chunk of tokens at a time, in fp32, and adds the weight's gradient to
Megatron's fp32 `main_grad`. Materialised, they are, in the model's dtype, for the response tokens of a micro-batch.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import linear

import lpreg
from lpreg import LossInputs, LossOutput, PolicyLoss, TokenStats
from megatron_rl.actor.model.policy import PolicyModel
from megatron_rl.actor.passes.micro_batch import MicroBatch
from megatron_rl.actor.passes.policy_loss import loss_fields
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.context_statistics import gather_over_context_ranks


class Head:
    """The LM head of the last pipeline stage. Hidden states come as `PolicyModel` gives them with `project` off."""

    def __init__(self, model: PolicyModel, vocabulary: int, *, fused: bool) -> None:
        self.model, self.vocabulary, self.fused = model, vocabulary, fused

    def loss(
        self, hidden: Tensor, batch: MicroBatch, loss: PolicyLoss, *, temperature: float, denominator: float
    ) -> tuple[LossOutput, TokenStats]:
        """A policy loss of the micro-batch, and the statistics without or with gradient."""
        fields = loss_fields(batch, denominator)
        if self.fused and loss.token_separable and batch.places is None:
            return lpreg.fused_loss(
                self.predicting(hidden, batch),
                self.model.head_weight,
                batch.targets,
                loss,
                fields,
                proxy=batch.proxy,
                weight_grad=self._main_grad,
                **self._common(temperature),
            )
        stats = self.statistics(
            hidden, batch, batch.targets, temperature, proxy=batch.proxy, **loss.token_stats_kwargs()
        )
        from_the_model = {name: getattr(stats, name) for name in ("log_probs", "entropy", "log_z", "kept", "proxy_kl")}
        return loss(LossInputs(**from_the_model, **fields)), stats

    def statistics(
        self, hidden: Tensor, batch: MicroBatch, targets: Tensor, temperature: float, **settings: Any
    ) -> TokenStats:
        """Of all T response tokens; targets: [T], `settings` as of `lpreg.token_stats`."""
        rows, settings = self.predicting(hidden, batch), settings | self._common(temperature)
        if batch.places is not None:
            targets = targets[batch.places]
            if (wanted := settings.get("proxy_rows")) is not None:
                settings["proxy_rows"] = wanted[batch.places]
        if self.fused:
            weight = self.model.head_weight
            stats = lpreg.fused_token_stats(rows, weight, targets, weight_grad=self._main_grad, **settings)
        else:
            logits = self.logits(rows)
            stats = lpreg.token_stats(logits, targets, inplace_backward=logits.requires_grad, **settings)
        return stats if batch.places is None else gather_over_context_ranks(stats, batch.places, len(batch.targets))

    def predicting(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """[s, b, d] -> [T, d], the states that predict the response tokens, whole on every tensor-parallel rank."""
        if self.model.config.sequence_parallel:
            # Every rank's gradient is that of all columns, so each takes its part of it and there is nothing to sum.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.flatten(0, 1).index_select(0, batch.predictors)

    def logits(self, rows: Tensor) -> Tensor:
        """[T, d] -> [T, V / TP]."""
        return linear(copy_to_tensor_model_parallel_region(rows), self.model.head_weight)

    @property
    def _main_grad(self) -> Tensor | None:
        grad: Tensor | None = getattr(self.model.head_weight, "main_grad", None)
        return grad

    def _common(self, temperature: float) -> dict[str, Any]:
        return {"temperature": temperature, "vocab_size": self.vocabulary, "tp_group": process_groups.tp_group()}
