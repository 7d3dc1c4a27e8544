"""The policy loss that the `algorithm` section of a configuration states."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_rl.config.algorithm import AlgorithmSettings, CorrectionSettings, ReferenceKlSettings
from megatron_rl.config.methods import lp_reg_term, method_class, method_settings

if TYPE_CHECKING:
    from lpreg import MethodSettings, PolicyLoss
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
        "entropy_coefficient": values.get("entropy_coefficient"),
        "sequence_ids": batch.sequence_ids,
        "denominator": denominator,
    }
    return {name: value for name, value in known.items() if value is not None}


def _values(settings: MethodSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


@dataclass(frozen=True, slots=True)
class LossChoice:
    """What a rank needs to make its loss, as plain values that can be sent to it."""

    name: str
    """A method of lpreg, or the import path of a user's own."""
    settings: dict[str, Any]
    """Every setting of the method."""
    reference_kl: ReferenceKlSettings
    correction: CorrectionSettings
    lp_reg_term: dict[str, Any] | None = None
    """Every setting of Lp-Reg's term on the method; None: no such term."""
    rarity_metrics: bool = False

    @classmethod
    def of(cls, algorithm: AlgorithmSettings) -> LossChoice:
        """Returns the choice that a configuration states. Raises UserError for settings that the method refuses."""
        settings = method_settings(algorithm)
        term = lp_reg_term(algorithm)
        return cls(
            algorithm.name,
            _values(settings),
            algorithm.reference_kl,
            algorithm.correction,
            None if term is None else _values(term),
            algorithm.rarity_metrics,
        )

    def make(self) -> PolicyLoss:
        """Returns the loss. Raises UserError if a user's own method cannot be imported on this rank."""
        from lpreg import with_correction, with_lp_reg, with_rarity_metrics, with_reference_kl

        method = method_class(self.name)
        loss = method(method.Settings(**self.settings))
        if self.lp_reg_term is not None:
            loss = with_lp_reg(loss, **self.lp_reg_term)
        if self.reference_kl.active:
            reference = self.reference_kl
            loss = with_reference_kl(loss, coefficient=reference.coefficient, estimator=reference.estimator)
        if self.correction.active:
            loss = with_correction(loss, **self.correction.model_dump())
        return with_rarity_metrics(loss) if self.rarity_metrics else loss
