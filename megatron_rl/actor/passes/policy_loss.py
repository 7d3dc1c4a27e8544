"""The policy loss that the `algorithm` section of a configuration states."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_rl.config.algorithm import AlgorithmSettings, CorrectionSettings, ReferenceKlSettings
from megatron_rl.config.methods import method_class, method_settings

if TYPE_CHECKING:
    from lpreg import PolicyLoss
    from megatron_rl.actor.passes.micro_batch import MicroBatch


def loss_fields(batch: MicroBatch, denominator: float) -> dict[str, Any]:
    """Returns the fields of LossInputs that the batch has; those of the policy in training come from the model."""
    values = batch.values
    known = {
        "old_log_probs": values.get("old_log_probs"),  # None with one update per rollout: the old policy is this one
        "advantages": values["advantages"],
        "old_log_z": values.get("old_log_z"),
        "old_in_filter": values.get("old_in_filter"),
        "selection": values.get("selected"),
        "proxy_log_probs": values.get("proxy_log_probs"),
        "reference_log_probs": values.get("reference_log_probs"),
        "rollout_log_probs": values.get("rollout_log_probs"),
        "sequence_ids": batch.sequence_ids,
        "denominator": denominator,
    }
    return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LossChoice:
    """What a rank needs to make its loss, as plain values that can be sent to it."""

    name: str
    """A method of lpreg, or the import path of a user's own."""
    settings: dict[str, Any]
    """Every setting of the method."""
    reference_kl: ReferenceKlSettings
    correction: CorrectionSettings

    @classmethod
    def of(cls, algorithm: AlgorithmSettings) -> LossChoice:
        """Returns the choice that a configuration states. Raises UserError for settings that the method refuses."""
        settings = method_settings(algorithm)
        values = {field.name: getattr(settings, field.name) for field in fields(settings)}
        return cls(algorithm.name, values, algorithm.reference_kl, algorithm.correction)

    def make(self) -> PolicyLoss:
        """Returns the loss. Raises UserError if a user's own method cannot be imported on this rank."""
        from lpreg import with_correction, with_reference_kl

        method = method_class(self.name)
        loss = method(method.Settings(**self.settings))
        if self.reference_kl.active:
            reference = self.reference_kl
            loss = with_reference_kl(loss, coefficient=reference.coefficient, estimator=reference.estimator)
        if self.correction.active:
            loss = with_correction(loss, **self.correction.model_dump())
        return loss
