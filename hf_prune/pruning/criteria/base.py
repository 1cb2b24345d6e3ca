"""How units are scored: the larger the score, the longer a unit is kept.

A criterion turns weight, gradient or activation into a quantity of elements or rows, the pattern reduces it to units, and the
criterion accumulates that over steps: its state is one number per unit, held as tensors. `pruning/statistics.py` collects what it
reads.

A custom criterion is one class, registered under its name:

```python
@register_criterion("sensitivity")
class Sensitivity(Criterion):
    "Running mean of |g|."

    reads_gradients = True

    def observe(self, group):
        seen = self.reduce(group, lambda target: gradient(target).abs())
        self.state[group.name] = 0.99 * self.state.get(group.name, seen) + 0.01 * seen

    def scores(self, group):
        return self.state[group.name]
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...model.targets import Target
from ...model.units import UnitGroup, View
from ...settings.config import PruningConfig
from ..statistics import Activations


class Criterion:
    """Base class. `state` maps names to tensors that accumulate over steps.

    Args:
        settings: the rule's complete settings; `reduction` says how elements become units.
    """

    #: Whether masked weights can come back, so that their values have to be kept.
    regrows = False
    #: Whether it needs the gradients of the weights it scores, which frozen weights do not have.
    reads_gradients = False
    #: Whether it scores whole output rows, so that it needs units that own some.
    scores_rows = False
    #: Whether it scores inputs of a weight, so that units have to leave through inputs of one weight.
    scores_inputs = False
    #: Whether these inputs have to be whole: columns of the weight.
    scores_columns = False
    #: Whether it scores units by the error that remains once others make up for them, which `prune()` measures layer by layer.
    scores_remainders = False
    #: Whether it scores what the model loses without a unit, which `prune()` tries out.
    scores_absences = False
    #: If so, whether units go one after the other in these trials.
    in_turn = False
    #: Whether it scores layers as a whole.
    scores_layers = False
    #: Whether it adds a penalty to the loss, which the setting `regularization` weighs.
    regularizes = False
    #: The statistics of activations that it reads, names in `statistics.STATISTICS`, of the views it watches.
    activations: tuple[str, ...] = ()
    #: What was seen of them; set when the criterion is attached to a model.
    seen: Activations

    def __init__(self, settings: PruningConfig) -> None:
        self.settings = settings
        self.reduction = settings.reduction
        self.state: dict[str, Tensor] = {}

    @property
    def scores_weights(self) -> bool:
        """Whether it scores weights as they are, so that there are scores before anything was seen."""
        return not (self.reads_gradients or self.activations or self.scores_remainders or self.scores_absences)

    def reduce(self, group: UnitGroup, elements: Callable[[Target], Tensor]) -> Tensor:
        """Reduce elements of a group's weights to units, `[units]`."""
        return group.reduce(elements, self.reduction)

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        """The views of a group whose layers' activations are read."""
        return group.weights

    def obstacle(self, group: UnitGroup) -> str:
        """Why it cannot score the units of a group, or an empty string; called before training."""
        if self.scores_inputs and len(group.compensated) != 1:
            return "scores inputs of a weight, and no unit leaves through those of one weight alone"
        if self.scores_inputs and group.compensated[0].target.parameter.ndim > 2:
            return "scores inputs of a weight, and a convolution has one for each kernel position"
        if self.scores_columns and not group.compensated[0].owns_columns:
            return "scores inputs of a layer, and no unit holds whole ones"
        if self.scores_rows and not any(view.owns_rows for view in group.weights):
            return "scores output rows, and no unit owns one"
        return ""

    def attach(self, groups: Sequence[UnitGroup], seen: Activations) -> None:
        """Called once before training, with the groups to score and the statistics of their activations."""
        self.seen = seen

    def begin_step(self, progress: float) -> None:
        """Called before the groups of an optimizer step are observed. `progress`: of the schedule, from 0 to 1 at the target."""

    def observe(self, group: UnitGroup) -> None:
        """Take note of weights and gradients, once an optimizer step."""

    def scores(self, group: UnitGroup) -> Tensor:
        """The score of each unit, `[units]`, float32."""
        raise NotImplementedError

    def updated(self) -> None:
        """Called after each mask update."""

    def metrics(self) -> dict[str, float]:
        """Metrics to log."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to resume exactly."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.state = dict(state)
