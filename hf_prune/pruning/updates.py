"""How the remaining weights are updated when others are removed.

An update is a function from a weight, the second moments of its inputs and what goes of it to the weight that stays in its place.
It knows neither pattern nor driver. `zero` leaves the others as they are: training repairs what is lost. Whatever else an update
does, it is done once and for all: units that others have made up for cannot come back, so masks only grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..settings.config import UPDATES as UPDATE_NAMES

#: `(weight [out, in], second moments Σxxᵀ/tokens [in, in] or None, gone: bool [out, in])` → weight `[out, in]`.
UpdateFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """An update as the registry knows it.

    Attributes:
        compute: the function; its weights are in float32 at least.
        reads_second_moments: whether it is given the second moments of the layer's inputs.
    """

    compute: UpdateFunction
    reads_second_moments: bool = False


#: Name → update.
UPDATES: dict[str, Update] = {}


def register_update(name: str, reads_second_moments: bool = False) -> Callable[[UpdateFunction], UpdateFunction]:
    """Function decorator: make an update known to configs.

    Args:
        name: what `PruningConfig(update=...)` calls it.
        reads_second_moments: whether it needs the second moments of the layer's inputs.

    Raises:
        ValueError: the name is taken by another function.
    """

    def register(compute: UpdateFunction) -> UpdateFunction:
        if name in UPDATES and UPDATES[name].compute is not compute:
            raise ValueError(f"update={name!r} is taken by {UPDATES[name].compute.__name__}; choose another name.")
        UPDATES[name] = Update(compute, reads_second_moments)
        UPDATE_NAMES.add(name)
        return compute

    return register


@register_update("zero")
def zero(weight: Tensor, second_moments: Tensor | None, gone: Tensor) -> Tensor:
    """The others stay as they are."""
    return weight.masked_fill(gone, 0)
