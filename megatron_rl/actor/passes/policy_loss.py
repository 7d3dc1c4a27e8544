"""From the `algorithm` section to a policy loss of `lpreg`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_rl.config.algorithm import AlgorithmSettings, CorrectionSettings, ReferenceKlSettings
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from lpreg import PolicyLoss
    from megatron_rl.actor.passes.micro_batch import MicroBatch


def loss_fields(batch: MicroBatch, denominator: float) -> dict[str, Any]:
    """The fields of LossInputs that do not come from the model, as far as the batch has them."""
    values = batch.values
    fields = {
        "old_log_probs": values.get("old_log_probs"),  # None: one update a rollout, so the old policy is this one
        "advantages": values["advantages"],
        "old_log_z": values.get("old_log_z"),
        "old_kept": values.get("old_kept"),
        "selection": values.get("selected"),
        "proxy_log_probs": values.get("proxy_log_probs"),
        "reference_log_probs": values.get("reference_log_probs"),
        "rollout_log_probs": values.get("rollout_log_probs"),
        "sequence_ids": batch.sequence_ids,
        "denominator": denominator,
    }
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LossChoice:
    """What a rank needs to make its loss: plain values, so that it travels."""

    name: str
    preset: str | None
    settings: dict[str, Any]
    reference_kl: ReferenceKlSettings
    correction: CorrectionSettings

    @classmethod
    def of(cls, algorithm: AlgorithmSettings) -> LossChoice:
        """The method's section of the configuration, less what it leaves unset."""
        section = getattr(algorithm, algorithm.name).model_dump(exclude_none=True)
        settings = {name: None if value == "none" else value for name, value in section.items()}
        if algorithm.name == "lp_reg":
            settings["proxy_source"] = algorithm.proxy_source
        return cls(algorithm.name, algorithm.preset, settings, algorithm.reference_kl, algorithm.correction)

    def make(self) -> PolicyLoss:
        """Raises UserError on settings that the method refuses."""
        from lpreg import make_loss, with_correction, with_reference_kl

        try:
            if self.preset is None:
                loss = make_loss(self.name, **self.settings)
            else:
                loss = make_loss.preset(self.name, self.preset, **self.settings)
        except ValueError as error:
            raise UserError(f"algorithm.{self.name}: {error}") from error
        reference, correction = self.reference_kl, self.correction
        if reference.coefficient:
            loss = with_reference_kl(loss, coefficient=reference.coefficient, estimator=reference.estimator)
        if correction.weights != "none" or correction.reject_sequences:
            loss = with_correction(loss, **correction.model_dump())
        return loss
