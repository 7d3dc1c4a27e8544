"""Computes the loss from hidden states: applies the LM head to response positions only and evaluates the loss there.

The fused head never holds all logits: `lpreg` projects one chunk of tokens at a time, in fp32, and adds the weight's
gradient to Megatron's fp32 `main_grad`. The materialised head holds the logits of all sampled tokens of a micro-batch,
in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import linear

import lpreg
from lpreg import LossInputs, LossOutput, PolicyLoss, TokenStats
from lpreg.statistics.fused_loss import FROM_THE_MODEL
from megatron_rl.actor.model.policy import PolicyModel
from megatron_rl.actor.passes.micro_batch import MicroBatch
from megatron_rl.actor.passes.policy_loss import loss_fields
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.context_statistics import gather_over_context_ranks


class Head:
    """The LM head of the last pipeline stage. Takes hidden states that `PolicyModel` returns with `project=False`."""

    def __init__(self, model: PolicyModel, vocabulary: int, *, fused: bool) -> None:
        self.model, self.vocabulary, self.fused = model, vocabulary, fused
        self.announce: Callable[[], None] | None = None
        """Called in the backward pass once the fused head has added the weight's gradient to `main_grad`."""

    @property
    def owns_weight(self) -> bool:
        """Whether the last stage's weight belongs to the head alone, so that the head's gradient completes it.

        A weight that is also this stage's embedding is complete only after the embedding's backward pass.
        """
        model = self.model
        return bool(self.fused and model.post_process) and not (
            model.share_embeddings_and_output_weights and model.pre_process
        )

    def loss(
        self, hidden: Tensor, batch: MicroBatch, loss: PolicyLoss, *, temperature: float, denominator: float
    ) -> tuple[LossOutput, TokenStats]:
        """Returns the policy loss of a micro-batch and the token statistics.

        The statistics carry gradients only if the loss is computed from them, that is, outside `lpreg.fused_loss`.
        """
        fields, rows = loss_fields(batch, denominator), self.predicting(hidden, batch)
        if self.fused and loss.token_separable and batch.places is None:
            return lpreg.fused_loss(
                self._announced(rows),
                self._weight,
                batch.targets,
                loss,
                fields,
                proxy=batch.proxy,
                weight_grad=self._main_grad,
                **self._common(temperature),
            )
        stats = self.statistics(rows, batch, batch.targets, temperature, proxy=batch.proxy, **loss.token_stats_kwargs())
        from_model = {name: getattr(stats, name) for name in FROM_THE_MODEL}
        return loss(LossInputs(**from_model, **fields)), stats

    def statistics(
        self, rows: Tensor, batch: MicroBatch, targets: Tensor, temperature: float, **settings: Any
    ) -> TokenStats:
        """Returns the token statistics of all T sampled tokens. rows: the result of `predicting`; targets: [T];
        `settings` go to `lpreg.token_stats`."""
        if batch.places is not None:
            targets = targets[batch.places]
        stats = self.statistics_of(rows, targets, temperature, **settings)
        return stats if batch.places is None else gather_over_context_ranks(stats, batch.places, len(batch.targets))

    def statistics_of(self, rows: Tensor, targets: Tensor, temperature: float, **settings: Any) -> TokenStats:
        """Returns the token statistics of hidden states [R, d], which predict the targets [R]. Collective over the
        tensor-parallel ranks."""
        settings = settings | self._common(temperature)
        if self.fused:
            rows, weight = self._announced(rows), self._weight
            return lpreg.fused_token_stats(rows, weight, targets, weight_grad=self._main_grad, **settings)
        logits = self.logits(rows)
        return lpreg.token_stats(logits, targets, inplace_backward=logits.requires_grad, **settings)

    def predicting(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Selects from [s, b, d] the hidden states [T, d] that predict sampled tokens, in full on every TP rank."""
        if self.model.config.sequence_parallel:
            # Each rank's gradient already covers all columns, so each rank takes its slice and nothing is summed.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.flatten(0, 1).index_select(0, batch.predictors)

    def logits(self, rows: Tensor) -> Tensor:
        """Projects hidden states [T, d] to logits [T, padded vocabulary / TP]."""
        return linear(copy_to_tensor_model_parallel_region(rows), self.model.head_weight)

    def _announced(self, rows: Tensor) -> Tensor:
        if self.announce is None:
            return rows
        announced: Tensor = _Announced.apply(rows, self.announce)
        return announced

    @property
    def _weight(self) -> Tensor:
        """The head's weight. If its gradient goes to `main_grad`, autograd gets a leaf of its own: DDP would take the
        missing gradient of the parameter for an error."""
        weight = self.model.head_weight
        return weight if self._main_grad is None else weight.detach().requires_grad_(torch.is_grad_enabled())

    @property
    def _main_grad(self) -> Tensor | None:
        grad: Tensor | None = getattr(self.model.head_weight, "main_grad", None)
        return grad

    def _common(self, temperature: float) -> dict[str, Any]:
        return {"temperature": temperature, "vocab_size": self.vocabulary, "tp_group": process_groups.tp_group()}


class _Announced(torch.autograd.Function):
    """The identity, whose backward runs after everything that uses the result has been differentiated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, announce: Callable[[], None]) -> Tensor:
        ctx.announce = announce
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.announce()
        return grad, None
