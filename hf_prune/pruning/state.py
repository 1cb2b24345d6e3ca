"""A pruner's state beside its masks, one companion for each part: existing zeros to keep, values that may come back, values to
rewind to. Each saves and loads its part; a fourth companion, without state, diagnoses gradients that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..model.sharding import is_sharded, local, placed_like, summed, whole
from ..model.targets import Target, bias_target, check_names, selector, weight_target, weights
from ..settings.config import PruningConfig
from ..settings.errors import ConfigError
from .budget import Budget
from .rules import Rule


class Companion(Protocol):
    """A part of a pruner with a state of its own."""

    def state_dict(self) -> dict[str, Tensor]:
        """Unsharded tensors by name, the same on all processes. Collective: all of them have to call it."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `state_dict` returned."""


class LockedZeros:
    """The zeros that `keep_zeros` locks: those of every weight that the config's `target_modules` names, and the zero biases of
    rows that are all zero. Without `keep_zeros` there are none.

    Attributes:
        weights: every weight that was searched for zeros.
        targets: the weights and biases with locked zeros.
    """

    def __init__(self, model: nn.Module, config: PruningConfig) -> None:
        self.weights: dict[str, Target] = {}
        self.targets: dict[str, Target] = {}
        self._kept: dict[str, Tensor] = {}
        names, exclude, found = config.target_modules, config.exclude_modules, list(weights(model)) if config.keep_zeros else []
        alone = config.pattern is None  # otherwise the names belong to the pattern and are checked with it
        for field, given in (("target_modules", names), ("exclude_modules", exclude)) if found and alone else ():
            check_names(given, [weight.name for weight in found], field)
        chosen = selector(model, names, exclude, "target_modules") if found else None
        for weight in found:
            if chosen is None or not chosen(weight.name):
                continue
            if weight.left_out:
                if alone and names is not None:
                    raise ConfigError("target_modules", names, f"names {weight.name!r}, but {weight.left_out}.")
                continue
            target, bias = weight_target(weight.name, weight.module), bias_target(weight.name, weight.module)
            self.weights[target.name] = target
            matrix = target.weight() != 0
            if bool(matrix.all()):
                continue
            self._keep(target, matrix)
            if bias is not None:
                self._keep(bias, matrix.any(dim=1, keepdim=True) | (bias.matrix(bias.parameter.detach()) != 0))

    def apply(self, gradients: bool = False) -> None:
        """Zero what is locked, in the parameters or in their gradients."""
        for name, kept in self._kept.items():
            self.targets[name].mask(kept, lambda tensor: tensor, adapted=True, gradients=gradients)

    def regrown(self) -> list[str]:
        """The names of weights and biases in which a locked zero is no longer zero. Collective: all processes have to call it."""
        return [name for name, kept in self._kept.items() if bool(whole((self.targets[name].value() * ~kept).any()))]

    def density(self, name: str) -> float:
        """The share of a weight that is not locked."""
        kept = self._kept.get(name)
        return 1.0 if kept is None else int(whole(kept.sum())) / kept.numel()

    def state_dict(self) -> dict[str, Tensor]:
        """Masks in the shapes of the parameters, False where a zero is locked."""
        return {name: whole(kept) for name, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Lock the zeros of a saved state."""
        self._kept = _placed(state, {name: target.parameter for name, target in self.targets.items()})

    def _keep(self, target: Target, matrix: Tensor) -> None:
        self.targets[target.name] = target
        self._kept[target.name] = target.from_matrix(matrix)


class Regrowth:
    """The values that weights had when they were masked, for criteria that let them come back, which read them as `values`."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        regrowing = [rule for rule in rules if rule.criterion.regrows]
        self._targets = {target.name: target for rule in regrowing for target in rule.targets}
        self._values = {name: torch.zeros_like(target.parameter) for name, target in self._targets.items()}
        for rule in regrowing:
            rule.criterion.values = self._values  # type: ignore[attr-defined]

    def exchange(self, mask: Callable[[], None]) -> None:
        """Call `mask` after restoring the values of weights that are no longer masked; keep those of newly masked ones."""
        for name, away in self._values.items():
            target = self._targets[name]
            restored = target.parameter + away
            away += target.value()
            target.parameter.copy_(restored)
        mask()
        for name, away in self._values.items():
            away *= self._targets[name].value() == 0

    def unmasked(self) -> dict[str, Tensor]:
        """The parameters without masks: masked weights have the values they had before."""
        return {name: self._targets[name].value() + away for name, away in self._values.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The values, and the weights under an adapter, which may differ from the base model's after they came back."""
        state = {f"value/{name}": whole(value) for name, value in self._values.items()}
        return state | {f"base/{name}": parameter.detach().clone() for name, parameter in self._adapted().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume; values that `state` lacks stay as they are."""
        parameters = {name: target.parameter for name, target in self._targets.items()}
        for name, value in _placed(under(state, "value/"), parameters).items():
            self._values[name].copy_(value)
        for name, parameter in self._adapted().items():
            if f"base/{name}" in state:
                parameter.copy_(state[f"base/{name}"])

    def _adapted(self) -> dict[str, nn.Parameter]:
        return {name: target.parameter for name, target in self._targets.items() if target.adapter is not None}


class Rewind:
    """The parameters at the start of a lottery schedule, to which they are rewound at each update but the last."""

    def __init__(self, model: nn.Module, budgets: Iterable[Budget]) -> None:
        self._model = model
        self._lotteries = [budget for budget in budgets if budget.is_lottery]
        self._start: dict[str, Tensor] = {}

    def before_update(self, steps: int) -> None:
        """Keep the values at the start of the schedule, or at the first step of a run that starts later."""
        starts = [budget.timeline.begin for budget in self._running(steps)]
        if steps in starts or (starts and not self._start and steps > min(starts)):
            self._start = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def after_update(self, due: Iterable[Budget], steps: int) -> None:
        """Rewind after a lottery update; free the values after the last one."""
        if any(budget.is_lottery for budget in due):
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._start[name])
        if not self._running(steps):
            self._start.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The values, by parameter."""
        return {name: whole(value) for name, value in self._start.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume, if the config has a lottery schedule."""
        self._start = _placed(state, dict(self._model.named_parameters())) if self._lotteries else {}

    def _running(self, steps: int) -> list[Budget]:
        return [budget for budget in self._lotteries if not budget.is_finished(steps)]


class GradientCheck:
    """Detects gradients that are not finite, and finds the first in the order of backward, since clipping spreads them to all
    parameters.

    All gradients are checked once per step. Their origin is found from one row and one column of each gradient as backward computes
    it: NaN and infinity in a layer's inputs or in the gradient of its outputs fill whole columns or rows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: Parameter name → sum of a row and a column of its gradient as backward left it.
        self._probes: dict[str, Tensor] = {}
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))  # type: ignore[no-untyped-call]
            for name, parameter in trained
        ]

    def broken(self) -> list[str]:
        """The names of the gradients with NaN or infinity; one pass and one synchronisation if there are none.

        Raises:
            RuntimeError: there is no gradient.
        """
        gradients = {name: item.grad for name, item in self._model.named_parameters() if item.grad is not None}
        if not gradients:
            raise RuntimeError(
                "No parameter has a gradient. Call observe() after backward and before zero_grad(); an optimizer that steps inside "
                "backward cannot be used."
            )
        norm = torch.nn.utils.get_total_norm([_values(gradient) for gradient in gradients.values()])
        if any(is_sharded(gradient) for gradient in gradients.values()):
            norm = summed(norm)
        if bool(torch.isfinite(norm)):
            return []
        return [name for name, gradient in gradients.items() if not bool(torch.isfinite(_values(whole(gradient))).all())]

    def message(self, broken: list[str], step: int) -> str:
        """The error message for the gradients at `step`."""
        probed = [name for name, probe in self._probes.items() if not torch.isfinite(probe)]
        first, *more = probed or broken
        others = f", as are those of {len(more)} more parameters" if more else ""
        cause = ". All gradients are, so the loss seems to be" if probed and len(probed) == len(self._probes) else ""
        return f"Step {step}: the gradient of {first!r} is NaN or infinite{others}{cause}. No weight was changed."

    def forget(self) -> None:
        """Forget the sums of this step's gradients."""
        self._probes.clear()

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = _values(parameter.grad.detach())
            self._probes[name] = gradient[:1].sum() + gradient[..., :1].sum() if gradient.ndim else gradient


def _values(gradient: Tensor) -> Tensor:
    """The part of a gradient on this rank; of a sparse one (`nn.Embedding(sparse=True)`) the rows it stores."""
    return gradient.coalesce().values() if gradient.is_sparse else local(gradient)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _placed(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state that belong to parameters, placed (device, shards) like them."""
    own = {name: value for name, value in state.items() if name in parameters}
    return {name: placed_like(value.to(parameters[name].device), parameters[name]) for name, value in own.items()}
