"""The `algorithm` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from lpreg.advantages import ESTIMATORS
from lpreg.losses.registry import METHODS

from .fields import Count, FilePath, NameOrPath, NonNegative, Positive, PositiveInt, Section, Text
from .method_sections import SECTIONS, TERM_SECTION, MethodSection, effective_values

MethodName = Annotated[str, NameOrPath(tuple(METHODS), "package.module:Class")]
AdvantageName = Annotated[str, NameOrPath(ESTIMATORS, "package.module:function")]


class OverlongSettings(Section):
    """A penalty on responses that come near the longest allowed length (DAPO)."""

    buffer_tokens: Count = 0
    """Last tokens of rollout.max_response_tokens, over which the penalty grows linearly from 0; 0: no penalty."""
    penalty: NonNegative = 1.0
    """What a response of rollout.max_response_tokens loses of its reward."""


class CorrectionSettings(Section):
    """Correction for the gap between engine and actor: w = p_actor / p_rollout of a token before the first update."""

    weights: Literal["none", "truncated", "masked"] = "none"
    """The factor of the advantages: none; truncated: min(w, high) (TIS); masked: w if it lies in [low, high], otherwise
    0 (MIS)."""
    low: NonNegative = 0.5
    """Lowest w; masked only."""
    high: Positive = 2.0
    """Highest w."""
    reject_sequences: bool = False
    """Leaves out responses whose geometric mean of w lies outside [sequence_low, sequence_high]."""
    sequence_low: NonNegative = 0.99
    """Lowest geometric mean."""
    sequence_high: Positive = 1.01
    """Highest geometric mean."""

    @property
    def active(self) -> bool:
        """Whether anything is corrected."""
        return self.weights != "none" or self.reject_sequences


class ReferenceKlSettings(Section):
    """A penalty for leaving a frozen reference model, which waits on the CPU between uses."""

    coefficient: NonNegative = 0.0
    """Weight of KL(policy || reference), averaged as the method averages its own loss; 0: no reference model."""
    estimator: Literal["k1", "k3"] = "k3"
    """The estimate on the sampled token, with d = log ref - log p: k3 is exp(d) - d - 1, k1 is -d with the gradient of
    d^2 / 2."""
    model: FilePath | None = None
    """A Hugging Face folder with the policy's own architecture; unset: the policy that RL starts from."""

    @property
    def active(self) -> bool:
        """Whether there is a reference model."""
        return self.coefficient > 0


class _AlgorithmKeys(Section):
    """The loss, and the statistics it is computed from."""

    name: MethodName = "lp_reg"
    """The policy loss: a method of lpreg, or the import path of a lpreg.PolicyLoss. With one update per rollout no
    probability ratio has moved: clips, and the whole term of kl_cov, have no effect."""
    preset: Text | None = None
    """Named settings of the method; paper: those of the paper (arXiv 2510.03222), reference: those of its published
    scripts. Unset: the defaults of the method."""
    settings: dict[str, Any] | None = None
    """Settings of a method that is named by its import path."""
    proxy_source: Literal["current", "old", "lagged"] = "old"
    """The policy that Lp-Reg's proxy comes from, for with_lp_reg too: the one in training, the one that sampled (the
    paper; the same with one update per rollout), or an older snapshot."""
    proxy_refresh_steps: PositiveInt = 25
    """Steps between refreshes of the lagged snapshot; read only with `proxy_source: lagged`."""
    advantage: AdvantageName = "grpo"
    """How rewards become advantages: within a prompt's group, for reinforce_plus_plus within the step; maxrl takes no
    negative rewards. Or the import path of a function (rewards [N], group_ids [N]) -> advantages [N], all torch
    tensors."""
    selection_log_probs: Literal["auto", "rollout", "actor"] = "auto"
    """Log-probs that rank the tokens: the engine's, or the actor's before the first update. auto: the actor's if they
    are computed anyway (several updates per rollout), otherwise the engine's, which cost no forward. Entropies are
    always the actor's."""
    overlong: OverlongSettings = OverlongSettings()
    correction: CorrectionSettings = CorrectionSettings()
    reference_kl: ReferenceKlSettings = ReferenceKlSettings()
    rarity_metrics: bool = False
    """Adds metrics of what the method does to rare tokens and to others, by the sign of the advantage and the old
    policy's probability: lpreg/rarity/<negative or positive>/<lower edge>/<weight, stopped or change>."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        """Completes the section of the configured method by its preset and its defaults."""
        if not isinstance(tree, Mapping) or not isinstance(name := tree.get("name", "lp_reg"), str):
            return tree
        section = tree.get(name) or {}
        if isinstance(section, MethodSection):
            section = section.model_dump()
        preset = tree.get("preset")
        if name not in METHODS or not isinstance(section, dict) or not isinstance(preset, str | None):
            return tree
        others = {key: value for key, value in tree.items() if key not in METHODS or value != {}}
        return {**others, name: effective_values(METHODS[name], preset, section)}

    @model_serializer(mode="wrap")
    def _without_other_methods(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the sections of methods that are neither configured nor given."""
        left_out = {*METHODS, "settings", "with_lp_reg"}
        return {name: value for name, value in handler(self).items() if value or name not in left_out}


if TYPE_CHECKING:
    AlgorithmSettings = _AlgorithmKeys
else:
    AlgorithmSettings = create_model(
        "AlgorithmSettings",
        __base__=_AlgorithmKeys,
        __module__=__name__,
        __doc__=_AlgorithmKeys.__doc__,
        with_lp_reg=(
            TERM_SECTION | None,
            Field(
                default=None,
                description="Settings of Lp-Reg's term on the method; given, even as {}, the method has the term. The "
                "method lp_reg has it without.",
            ),
        ),
        **{
            name: (section | None, Field(default=None, description=f"Settings of `algorithm.name: {name}`."))
            for name, section in SECTIONS.items()
        },
    )
