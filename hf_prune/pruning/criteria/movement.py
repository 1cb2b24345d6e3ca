"""Movement pruning: scores that are trained along with the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.targets import Target
from ...model.units import UnitGroup, whole_scores
from ...settings.config import PruningConfig
from ..statistics import Activations, gradient, weight
from .gradients import _Gradient
from .registry import register_criterion


@register_criterion("movement")
class Movement(_Gradient):
    """S, trained by Adam on ∂L/∂S = Σ ∂L/∂W'·W over the unit, straight through the mask (Sanh et al. 2020,
    https://arxiv.org/abs/2005.07683, eq. 5; blocks as in Lagunas et al. 2021, https://arxiv.org/abs/2109.04838).

    W' = W⊙M is the parameter, so its gradient is ∂L/∂W' at every element; W holds the values that masked weights had before.
    Scores start at 0, and a masked unit comes back when its score rises again.
    """

    regrows = True
    betas, epsilon = (0.9, 0.999), 1e-8

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "sum"
        #: Parameter name → values of masked weights; kept up to date by the pruner.
        self.values: dict[str, Tensor] = {}

    def observe(self, group: UnitGroup) -> None:
        step = self.reduce(group, lambda target: self._weight(target) * gradient(target))
        names = (group.name, f"{group.name}.exp_avg", f"{group.name}.exp_avg_sq")
        score, first, second = (self.state[name] if name in self.state else torch.zeros_like(step) for name in names)
        count = self.state.get(f"{group.name}.step", torch.zeros(())) + 1
        self.add_penalty_gradient(score, step)
        first.lerp_(step, 1 - self.betas[0])
        second.lerp_(step.square_(), 1 - self.betas[1])
        spread = torch.div(second, 1 - self.betas[1] ** int(count), out=step).sqrt_().add_(self.epsilon)
        score.sub_((first / (1 - self.betas[0] ** int(count))).div_(spread).mul_(self.settings.score_learning_rate))
        self.state |= {**dict(zip(names, (score, first, second))), f"{group.name}.step": count}

    def add_penalty_gradient(self, score: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a penalty on S to the gradient of the loss, both `[units]`."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}  # the next step changes them in place

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}

    def _weight(self, target: Target) -> Tensor:
        """W: the values that masked weights had before, and the parameter elsewhere."""
        kept = self.values.get(target.name)
        return weight(target) if kept is None else weight(target) + target.matrix(kept)


@register_criterion("soft_movement")
class SoftMovement(Movement):
    """Movement scored by σ(S), with λ·r·mean σ(S) added to the loss, where r is the progress of the schedule (Sanh et al. 2020,
    section 4.2).

    With `scope="threshold"` a unit is removed when σ(S) ≤ τ·r, so λ decides how many are. Under `regularization="auto"` a
    proportional-integral controller sets λ: it lowers the boundary, the score halfway between the last head (neuron, unit) to
    remove and the first to keep, to logit(τ), which it reaches at r = 0.9. Adam moves a score by at most about its learning rate,
    whatever the gradient, so the controller works in units of that rate: with e = gap/(10·rate), the requested drift is e plus 0.03
    of the sum of e over the steps, and λ makes the penalty's gradient that many times the root mean square of the score gradients.
    λ is negative while scores have to be kept from falling.
    """

    regularizes = True
    proportional, integral, largest, settle = 0.1, 0.03, 3.0, 0.9

    def attach(self, groups: Sequence[UnitGroup], seen: Activations) -> None:
        super().attach(groups, seen)
        self._groups = groups
        self._units = sum(group.num_units for group in self._groups)
        self._progress = 0.0

    def begin_step(self, progress: float) -> None:
        self._progress = progress
        if self.settings.regularization == "auto":
            self._steer()

    @property
    def regularization(self) -> float:
        """λ at this step."""
        given = self.settings.regularization
        return float(self.state.get("regularization", 0.0)) if given == "auto" else float(given)

    def add_penalty_gradient(self, score: Tensor, gradient: Tensor) -> None:
        probability = score.sigmoid()
        gradient += self.regularization * self._progress * probability * (1 - probability) / self._units

    def scores(self, group: UnitGroup) -> Tensor:
        return super().scores(group).sigmoid()

    def metrics(self) -> dict[str, float]:
        if not self.state:
            return {}
        mean = sum(float(self.scores(group).sum()) for group in self._groups) / self._units
        return {"regularization": self.regularization, "penalty": self.regularization * self._progress * mean}

    def _steer(self) -> None:
        """Set λ for the current step."""
        names = [group.name for group in self._groups]
        if self._progress == 0 or names[0] not in self.state:
            return
        threshold, rate = float(self.settings.threshold or 0), self.settings.score_learning_rate
        boundary = _boundary(*whole_scores(self._groups, [self.state[name] for name in names]), self.settings.sparsity)
        reference = math.log(threshold / (1 - threshold)) * min(self._progress / self.settle, 1.0)
        gap = (boundary - reference) / rate * self.proportional
        summed = _clipped(float(self.state.get("gaps", 0.0)) + self.integral * gap, self.largest)
        drift = _clipped(gap + summed, self.largest)
        squares = sum(float(self.state[f"{name}.exp_avg_sq"].sum()) for name in names) / self._units
        scale = math.sqrt(squares / (1 - self.betas[1] ** int(self.state[f"{names[0]}.step"])))
        slope = 1 / (2 + 2 * math.cosh(boundary))
        self.state["gaps"] = torch.tensor(summed, dtype=torch.float64)
        self.state["regularization"] = torch.tensor(drift * scale * self._units / slope / self._progress, dtype=torch.float64)


def _clipped(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))


def _boundary(scores: Tensor, sizes: Tensor, share: float) -> float:
    """The score halfway between the lowest scores, whose sizes add up to about `share` of the total, and the others."""
    ordered, order = scores.double().sort()
    spent = torch.cat([sizes.new_zeros(1), sizes[order]]).double().cumsum(0)
    count = int((spent - share * spent[-1]).abs().argmin())
    margin = ordered.new_tensor(0.1)
    padded = torch.cat([ordered[:1] - margin, ordered, ordered[-1:] + margin])
    return float(padded[count : count + 2].mean())
