"""Criteria that read what flows through a layer."""

from __future__ import annotations

from torch import Tensor

from ...model.targets import Target
from ...model.units import UnitGroup, View
from ..statistics import weight
from .base import Criterion
from .registry import register_criterion


@register_criterion("apoz")
class APoZ(Criterion):
    """1 − the average share of zeros in an output: how often it is positive, so a ReLU would let it pass (Hu et al. 2016,
    https://arxiv.org/abs/1607.03250, eq. 1)."""

    scores_rows = True
    activations = ("positive_outputs",)

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return tuple(view for view in group.weights if view.owns_rows)

    def scores(self, group: UnitGroup) -> Tensor:
        (name,) = self.activations
        return group.reduce(lambda target: self.seen.mean(name, target)[:, None], self.reduction, self.watched(group))


@register_criterion("mean_activation")
class MeanActivation(APoZ):
    """The mean absolute activation of an output (after Molchanov et al. 2017, https://arxiv.org/abs/1611.06440)."""

    activations = ("absolute_outputs",)


@register_criterion("wanda")
class Wanda(Criterion):
    """|w|·‖x‖₂, with ‖x‖₂ over the tokens of an input (Sun et al. 2024, https://arxiv.org/abs/2306.11695, eq. 1)."""

    activations = ("squared_inputs",)

    def scores(self, group: UnitGroup) -> Tensor:
        def elements(target: Target) -> Tensor:
            matrix, norms = weight(target).abs(), self.seen.mean("squared_inputs", target).sqrt()
            repeats = matrix.shape[1] // norms.numel()
            # A convolution's columns are inputs times kernel positions.
            return matrix * (norms.repeat(repeats) if target.kernel_first else norms.repeat_interleave(repeats))

        return self.reduce(group, elements)
