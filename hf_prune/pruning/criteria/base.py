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

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ...model.targets import Target
from ...model.units import UnitGroup
from ...settings.config import PruningConfig


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
