"""Criteria that read gradients, once an optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.units import UnitGroup, View
from ..statistics import gradient, weight
from .base import Criterion
from .registry import register_criterion


class _Gradient(Criterion):
    """Keeps one accumulated number per unit."""

    reads_gradients = True

    def scores(self, group: UnitGroup) -> Tensor:
        if group.name not in self.state:
            raise RuntimeError(f"{group.name!r} has no score yet: call observe() after backward, before each optimizer step.")
        return self.state[group.name]


@register_criterion("gradient")
class Gradient(_Gradient):
    """|g| of the last step."""

    def observe(self, group: UnitGroup) -> None:
        self.state[group.name] = self.reduce(group, lambda target: gradient(target).abs())


@register_criterion("snip")
class Snip(_Gradient):
    """|w·g| of the last step (Lee et al. 2019, https://arxiv.org/abs/1810.02340, eq. 4)."""

    def observe(self, group: UnitGroup) -> None:
        self.state[group.name] = self.reduce(group, lambda target: (weight(target) * gradient(target)).abs_())


@register_criterion("snip_momentum")
class SnipMomentum(_Gradient):
    """S ← 0.9·S + |w·g|: SNIP smoothed over optimizer steps, as in Intel Neural Compressor."""

    momentum = 0.9

    def observe(self, group: UnitGroup) -> None:
        seen = self.reduce(group, lambda target: (weight(target) * gradient(target)).abs_())
        if (score := self.state.get(group.name)) is not None:
            seen.add_(score, alpha=self.momentum)
        self.state[group.name] = seen


class _MeanOverSteps(_Gradient):
    """Sums over the steps since the last update. All groups see the same steps, so the sum ranks as the mean does."""

    def quantity(self, group: UnitGroup) -> Tensor:
        """What one step adds, `[units]`."""
        raise NotImplementedError

    def observe(self, group: UnitGroup) -> None:
        seen = self.quantity(group)
        self.state[group.name] = seen + self.state[group.name] if group.name in self.state else seen

    def updated(self) -> None:
        self.state.clear()


@register_criterion("taylor")
class Taylor(_MeanOverSteps):
    """(w·g)², over the steps since the last update (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, eq. 8)."""

    def quantity(self, group: UnitGroup) -> Tensor:
        return self.reduce(group, lambda target: (weight(target) * gradient(target)).square_())


@register_criterion("fisher")
class Fisher(_MeanOverSteps):
    """(∂L/∂m)² for a factor m on the unit's output, over the steps since the last update: the diagonal of the Fisher information.

    ∂L/∂m = Σ w·g over the weights by which the unit leaves its block (Kwon et al. 2022, https://arxiv.org/abs/2204.09656, eq. 9,
    with gradients of optimizer steps in the place of single examples).
    """

    def quantity(self, group: UnitGroup) -> Tensor:
        return group.reduce(lambda target: weight(target) * gradient(target), "sum", group.weights[-1:]).square_()


@register_criterion("kprune")
class KPrune(Fisher):
    """½·(∂L/∂m)² + λ·Σⱼ xⱼ²·meanᵢ Wᵢⱼ²: predictive and representational knowledge, means over the steps and tokens since the last
    update (K-prune, Park et al. 2024, https://arxiv.org/abs/2308.03449, eq. 4 to 6).

    m is a factor on the unit, j runs over its columns in the weight through which it leaves its block. The paper takes the
    divergence from the dense model's predictions as L, sub-layer by sub-layer, since its gradient at the dense model is zero; here
    L is what the driver gives, in `prune()` the log-likelihood whose squared gradient is the curvature of that divergence. Meant
    for `update="least_squares"`.
    """

    scores_inputs = True
    scores_columns = True
    activations = ("squared_inputs",)
    #: λ, as the authors have it for MRPC at 50 %.
    representational = 2.5e-4

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return group.compensated

    def observe(self, group: UnitGroup) -> None:
        super().observe(group)
        steps = f"{group.name}/steps"
        self.state[steps] = self.state.get(steps, torch.zeros(())) + 1

    def scores(self, group: UnitGroup) -> Tensor:
        (view,) = group.compensated
        energy = self.seen.mean("squared_inputs", view.target) * weight(view.target).float().square().mean(dim=0)
        predictive = super().scores(group) / self.state[f"{group.name}/steps"]
        return predictive / 2 + self.representational * energy[view.columns].sum(dim=1)
