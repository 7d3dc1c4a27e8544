"""Lp-Reg's term on any method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpreg.losses.base import LossOutput, PolicyLoss, WrappedLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.lp_reg_term import LpRegTerm, LpRegTermSettings

if TYPE_CHECKING:
    from torch import Tensor


class WithLpReg(WrappedLoss):
    """A method's loss + beta * KL on rare tokens, averaged over tokens as the method averages its own.

    `with_lp_reg(make_loss("dppo"), rho=0.005)`. The term is that of the method `lp_reg`, which has the paper's
    surrogate. The driver provides the one selection and the one proxy that the term needs, and no further pass. A
    metric of the term whose name the method has already, such as `selected_fraction` of kl_cov, begins with "lp_reg_".
    """

    name = "with_lp_reg"
    Settings = LpRegTermSettings
    settings: LpRegTermSettings

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        return LpRegTerm(self.settings).acts_on(advantages)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        term, metrics = LpRegTerm(self.settings)(inputs)
        output = self.loss(inputs)
        own = {f"lp_reg_{name}" if name in output.metrics else name: mean for name, mean in metrics.items()}
        return LossOutput(output.loss + self.aggregate(term, inputs), output.metrics | own)


def with_lp_reg(loss: PolicyLoss, **settings: Any) -> PolicyLoss:
    """Returns the method `loss` with Lp-Reg's term; `settings` are those of `LpRegTermSettings`.

    Raises:
        ValueError: a setting out of range, a method that has the term already, selects tokens by a rule of its own or
            has another filter. TypeError: an unknown setting.
    """
    term = LpRegTermSettings(**settings)
    term.around(loss.needs)
    return WithLpReg(loss, term)
