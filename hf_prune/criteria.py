"""How units are scored: the larger the score, the longer a unit is kept.

A criterion turns weight, gradient or activation into a quantity of elements or rows, the pattern reduces it to units, and the
criterion accumulates that over steps: its state is one number a unit (activation criteria: one a row or column), held as tensors.

A criterion of your own is one class and one registry line:

```python
class Sensitivity(Criterion):
    "Running mean of |g|."

    def observe(self, group):
        seen = self.reduce(group, lambda target: gradient(target).abs())
        self.state[group.name] = 0.99 * self.state.get(group.name, seen) + 0.01 * seen

    def scores(self, group):
        return self.state[group.name]

register_criterion("sensitivity", Sensitivity, reads_gradients=True)
```
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import config
from .architectures.blocks import base_layer
from .config import PruningConfig
from .distributed import rank, summed
from .targets import Target, named_layers
from .units import UnitGroup, View, whole_scores
from .wrappers import transformers_models


def weight(target: Target) -> Tensor:
    """The weight as `[out, in]`; under LoRA the merged one."""
    return target.weight()


def gradient(target: Target) -> Tensor:
    """The gradient as `[out, in]`; see [`Target.gradient`]."""
    return target.gradient()


class Criterion:
    """Base class. `state` maps names to tensors that accumulate over steps.

    Args:
        settings: the rule's complete settings; `reduction` says how elements become units.
    """

    #: Whether masked weights may come back, so that their values must be kept.
    regrows = False

    def __init__(self, settings: PruningConfig) -> None:
        self.settings = settings
        self.reduction = settings.reduction
        self.state: dict[str, Tensor] = {}

    def reduce(self, group: UnitGroup, elements: Callable[[Target], Tensor]) -> Tensor:
        """Reduce elements of a group's weights to units, `[units]`."""
        return group.reduce(elements, self.reduction)

    def attach(self, model: nn.Module, groups: Iterable[UnitGroup]) -> None:
        """Called once before training; the place for hooks."""

    def detach(self) -> None:
        """Called when no update is left."""

    def begin_step(self, progress: float) -> None:
        """Called before the groups of an optimizer step are observed. `progress`: how far the schedule is, 0 to 1 at the target."""

    def observe(self, group: UnitGroup) -> None:
        """Take note of weights and gradients, once an optimizer step."""

    def discard(self) -> None:
        """Called in place of `observe` when the optimizer skips the step: forget what was seen since the last one."""

    def scores(self, group: UnitGroup) -> Tensor:
        """The score of each unit, `[units]`, float32."""
        raise NotImplementedError

    def updated(self) -> None:
        """Called after each mask update."""

    def figures(self) -> dict[str, float]:
        """What the logs shall say about it."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.state = dict(state)


class Magnitude(Criterion):
    """|w| (Han et al. 2015, https://arxiv.org/abs/1506.02626): the L1 norm, or with `reduction="l2"` the L2 norm."""

    def scores(self, group: UnitGroup) -> Tensor:
        return self.reduce(group, lambda target: weight(target).abs())


class Random(Criterion):
    """A number drawn once for each unit, from its group's name: a baseline that needs no seed to be the same everywhere."""

    def scores(self, group: UnitGroup) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
        return torch.rand(group.num_units, generator=generator).to(group.device)


class FPGM(Criterion):
    """Σ_j ‖w_i − w_j‖₂ over the rows of a matrix: rows near the geometric median go (He et al. 2019, https://arxiv.org/abs/1811.00250)."""

    def scores(self, group: UnitGroup) -> Tensor:
        def distances(target: Target) -> Tensor:
            rows = weight(target).float()
            return torch.cdist(rows, rows).sum(dim=1, keepdim=True)

        return group.reduce(distances, self.reduction, [view for view in group.weights if view.owns_rows])


# ---------------------------------------------------------------------------------------------------------------- gradients


class _Gradient(Criterion):
    """Keeps one accumulated number a unit."""

    def scores(self, group: UnitGroup) -> Tensor:
        if group.name not in self.state:
            raise RuntimeError(f"{group.name!r} has no score yet: call observe() after backward, before each optimizer step.")
        return self.state[group.name]


class Gradient(_Gradient):
    """|g| of the last step."""

    def observe(self, group: UnitGroup) -> None:
        self.state[group.name] = self.reduce(group, lambda target: gradient(target).abs())


class Snip(_Gradient):
    """|w·g| of the last step (Lee et al. 2019, https://arxiv.org/abs/1810.02340, eq. 4)."""

    def observe(self, group: UnitGroup) -> None:
        self.state[group.name] = self.reduce(group, lambda target: (weight(target) * gradient(target)).abs_())


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


class Taylor(_MeanOverSteps):
    """(w·g)², over the steps since the last update (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, eq. 8)."""

    def quantity(self, group: UnitGroup) -> Tensor:
        return self.reduce(group, lambda target: (weight(target) * gradient(target)).square_())


class Fisher(_MeanOverSteps):
    """(∂L/∂m)² for a factor m on the unit's output, over the steps since the last update: the diagonal of the Fisher information.

    ∂L/∂m = Σ w·g over the weights by which the unit leaves its block (Kwon et al. 2022, https://arxiv.org/abs/2204.09656, eq. 9,
    with gradients of optimizer steps in the place of single examples).
    """

    def quantity(self, group: UnitGroup) -> Tensor:
        return group.reduce(lambda target: weight(target) * gradient(target), "sum", group.weights[-1:]).square_()


class Movement(_Gradient):
    """S, trained by Adam on ∂L/∂S = Σ ∂L/∂W'·W over the unit, straight through the mask (Sanh et al. 2020,
    https://arxiv.org/abs/2005.07683, eq. 5; blocks as in Lagunas et al. 2021, https://arxiv.org/abs/2109.04838).

    W' = W⊙M is the parameter, so its gradient is ∂L/∂W' at every element; W is the value that a masked weight left with. Scores
    start at 0 and masked units come back when theirs rises again.
    """

    regrows = True
    betas, epsilon = (0.9, 0.999), 1e-8

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "sum"
        #: Parameter name → values of masked weights; the pruner keeps it true.
        self.values: dict[str, Tensor] = {}

    def observe(self, group: UnitGroup) -> None:
        step = self.reduce(group, lambda target: self._weight(target) * gradient(target))
        score = self.state.get(group.name, torch.zeros_like(step))
        step = step + self.penalty_gradient(score)
        first, second, count = (self.state.get(f"{group.name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step"))
        if first is None or second is None or count is None:
            first, second, count = torch.zeros_like(step), torch.zeros_like(step), torch.zeros(())
        first = first.lerp(step, 1 - self.betas[0])
        second = second.lerp(step.square(), 1 - self.betas[1])
        count = count + 1
        corrected = (second / (1 - self.betas[1] ** int(count))).sqrt() + self.epsilon
        direction = (first / (1 - self.betas[0] ** int(count))) / corrected
        self.state[group.name] = score - self.settings.score_learning_rate * direction
        for key, value in (("exp_avg", first), ("exp_avg_sq", second), ("step", count)):
            self.state[f"{group.name}.{key}"] = value

    def penalty_gradient(self, score: Tensor) -> Tensor:
        """The gradient of a penalty on S, `[units]`."""
        return torch.zeros_like(score)

    def _weight(self, target: Target) -> Tensor:
        """W: the values that masked weights left with, and the parameter elsewhere."""
        kept = self.values.get(target.name)
        return weight(target) if kept is None else weight(target) + target.matrix(kept)


class SoftMovement(Movement):
    """Movement scored by σ(S), with λ·r·mean σ(S) added to the loss, where r says how far the schedule is (Sanh et al. 2020,
    section 4.2).

    With `scope="threshold"` a unit goes when σ(S) is at most τ·r, so λ decides how many do. Under `regularization="auto"` λ is
    steered: the score halfway between the last head (neuron, unit) that shall go and the first that shall stay is brought down to
    logit(τ), where it arrives when r is 0.9. Adam moves a score by about its learning rate at most, whatever the gradient, so a
    proportional and integral controller works on that scale: with e = gap/(10·rate), the drift wanted is e plus 0.03 of its sum
    over the steps, in shares of the rate, and λ makes the penalty that many times as large as the root mean square of the score
    gradients. λ is negative while scores have to be held up.
    """

    proportional, integral, largest, settle = 0.1, 0.03, 3.0, 0.9

    def attach(self, model: nn.Module, groups: Iterable[UnitGroup]) -> None:
        self._groups = list(groups)
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

    def penalty_gradient(self, score: Tensor) -> Tensor:
        probability = score.sigmoid()
        return self.regularization * self._progress * probability * (1 - probability) / self._units

    def scores(self, group: UnitGroup) -> Tensor:
        return super().scores(group).sigmoid()

    def figures(self) -> dict[str, float]:
        if not self.state:
            return {}
        mean = sum(float(self.scores(group).sum()) for group in self._groups) / self._units
        return {"regularization": self.regularization, "penalty": self.regularization * self._progress * mean}

    def _steer(self) -> None:
        """Set λ for the step at hand."""
        names = [group.name for group in self._groups]
        if self._progress == 0 or names[0] not in self.state:
            return
        threshold, rate = float(self.settings.threshold or 0), self.settings.score_learning_rate
        boundary = _boundary(*whole_scores(self._groups, [self.state[name] for name in names]), self.settings.target_sparsity)
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
    """The score halfway between the lowest ones that make up `share` of the sizes, as nearly as can be, and the others."""
    ordered, order = scores.double().sort()
    spent = torch.cat([sizes.new_zeros(1), sizes[order]]).double().cumsum(0)
    count = int((spent - share * spent[-1]).abs().argmin())
    margin = ordered.new_tensor(0.1)
    padded = torch.cat([ordered[:1] - margin, ordered, ordered[-1:] + margin])
    return float(padded[count : count + 2].mean())


# -------------------------------------------------------------------------------------------------------------- activations


class ActivationCriterion(Criterion):
    """Base of criteria that read what flows through a layer while the model trains.

    Padding does not count, evaluation and the recomputation of gradient checkpointing are ignored. `state` holds, by weight,
    sums over the tokens that this process has seen since the last update, and last their number: `[channels + 1]`. They are summed
    over processes, so that each token counts once, when scores or `state_dict` are asked for, which all have to do together.
    """

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        #: The state as of the last optimizer step that was not skipped.
        self._observed: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        #: The outermost model in whose forward this is, while it trains.
        self._forward_of: nn.Module | None = None
        self._tokens: Tensor | None = None

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """What a batch of tokens adds. `inputs`: `[tokens, in]`, `outputs`: `[tokens, out]`. Returns a vector."""
        raise NotImplementedError

    def channels(self, target: Target) -> int:
        """The length of that vector."""
        return target.shape[0]

    def views(self, group: UnitGroup) -> tuple[View, ...]:
        """The views whose layers are watched: those that own output rows."""
        return tuple(view for view in group.weights if view.owns_rows)

    def attach(self, model: nn.Module, groups: Iterable[UnitGroup]) -> None:
        for one in {model, *transformers_models(model).values()}:  # a wrapper's own layers run outside, masks are given inside
            self._handles.append(one.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
            self._handles.append(one.register_forward_hook(self._forward_ends))
        targets = {view.target.module_name: view.target for group in groups for view in self.views(group)}
        for name, module in named_layers(model):
            if (target := targets.get(name)) is not None:
                self.state[target.name] = torch.zeros(self.channels(target) + 1, device=target.parameter.device)
                self._handles.append(module.register_forward_hook(self._hook(target.name)))
        self._observed = dict(self.state)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def observe(self, group: UnitGroup) -> None:
        self._observed = dict(self.state)

    def discard(self) -> None:
        self.state = dict(self._observed)

    def updated(self) -> None:
        self.state = {name: torch.zeros_like(sums) for name, sums in self.state.items()}
        self._observed = dict(self.state)

    def merged(self, name: str) -> Tensor:
        """The mean over all tokens seen, on all processes."""
        sums = summed(self.state[name])
        if not sums[-1]:
            raise RuntimeError(f"{name!r} has seen no training batch since the last update, so it has no activation score.")
        return sums[:-1] / sums[-1]

    def state_dict(self) -> dict[str, Tensor]:
        """The sums over all processes."""
        return {name: summed(sums) for name, sums in self.state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the sums over all processes: the first one takes them."""
        self.state = {name: sums if rank() == 0 else torch.zeros_like(sums) for name, sums in state.items()}
        self._observed = dict(self.state)

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training:
            self._forward_of = None
        elif self._forward_of is None:
            self._forward_of = model
        mask = kwargs.get("attention_mask")
        self._tokens = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        # What runs later is the recomputation of checkpointed layers during backward.
        if model is self._forward_of:
            self._forward_of = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._forward_of is None:
                return
            channels = 1 if isinstance(base_layer(module), (nn.Conv1d, nn.Conv2d)) else -1
            inputs, outputs = args[0].detach().movedim(channels, -1), output.detach().movedim(channels, -1)
            tokens = self._tokens
            if tokens is not None and inputs.shape[:-1] == tokens.shape:
                inputs, outputs = inputs[tokens], outputs[tokens]
            inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
            self.state[name] = self.state[name] + torch.cat([self.statistic(inputs, outputs), outputs.new_tensor([len(outputs)])])

        return hook


class APoZ(ActivationCriterion):
    """1 − the average share of zeros in an output: how often it is positive, so a ReLU would let it pass (Hu et al. 2016,
    https://arxiv.org/abs/1607.03250, eq. 1)."""

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return (outputs > 0).float().sum(dim=0)

    def scores(self, group: UnitGroup) -> Tensor:
        return group.reduce(lambda target: self.merged(target.name)[:, None], self.reduction, self.views(group))


class MeanActivation(APoZ):
    """The mean absolute activation of an output (after Molchanov et al. 2017, https://arxiv.org/abs/1611.06440)."""

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs.abs().sum(dim=0)


class Wanda(ActivationCriterion):
    """|w|·‖x‖₂, with ‖x‖₂ over the tokens of an input (Sun et al. 2024, https://arxiv.org/abs/2306.11695, eq. 1)."""

    def views(self, group: UnitGroup) -> tuple[View, ...]:
        return group.weights

    def channels(self, target: Target) -> int:
        return target.inputs

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return inputs.square().sum(dim=0)

    def scores(self, group: UnitGroup) -> Tensor:
        def elements(target: Target) -> Tensor:
            matrix, norms = weight(target).abs(), self.merged(target.name).sqrt()
            repeats = matrix.shape[1] // norms.numel()
            # A convolution's columns are inputs times kernel positions.
            return matrix * (norms.repeat(repeats) if target.kernel_first else norms.repeat_interleave(repeats))

        return self.reduce(group, elements)


#: Name → class.
CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "gradient": Gradient,
    "snip": Snip,
    "snip_momentum": SnipMomentum,
    "taylor": Taylor,
    "movement": Movement,
    "soft_movement": SoftMovement,
    "fpgm": FPGM,
    "apoz": APoZ,
    "mean_activation": MeanActivation,
    "wanda": Wanda,
    "fisher": Fisher,
    "random": Random,
}


def register_criterion(name: str, criterion: type[Criterion], reads_gradients: bool = False) -> None:
    """Make a criterion known to configs under `name`.

    Args:
        name: what `PruningConfig(criterion=...)` calls it.
        criterion: the class.
        reads_gradients: whether it needs the gradients of the weights it scores, which frozen weights do not have.

    Raises:
        ValueError: the name is taken by another class.
    """
    if CRITERIA.get(name, criterion) is not criterion:
        raise ValueError(f"criterion={name!r} is taken by {CRITERIA[name].__name__}; choose another name.")
    CRITERIA[name] = criterion
    config.CRITERIA.add(name)
    if reads_gradients:
        config.GRADIENT_CRITERIA.add(name)
