"""How the remaining weights are updated when others are removed.

An update is a function from a weight, the moments of its layer and what goes of it to the weight that stays in its place. It knows
neither pattern nor driver. `zero` leaves the others as they are: training repairs what is lost. Whatever else an update does, it is
done once and for all: units that others have made up for cannot come back, so masks only grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..settings.config import UPDATES as UPDATE_NAMES
from .reconstruction import Moments, aimed, damping, inverse, refit, sequential

#: `(weight [out, in], moments of the layer or None, gone: bool [out, in])` → weight `[out, in]`. In `prune()` the bias is the last
#: column, which never goes, and the moments have a constant input 1 for it; while training there is no such column.
UpdateFunction = Callable[[Tensor, Moments | None, Tensor], Tensor]

#: λ of the objective as a share of the mean of the diagonal of Σ x·xᵀ.
DAMPING = 1e-3


@dataclass(frozen=True)
class Update:
    """An update as the registry knows it.

    Attributes:
        compute: the function; its weights are in float32 at least.
        reads_second_moments: whether it is given the moments of the layer.
        whole_columns: whether units have to leave through whole columns: heads, groups, neurons, `channelx1`.
        dense_target: whether it aims at what the dense model gave; else at what the weight gives from the inputs as they are.
        in_order: whether it goes through the columns from left to right; criterion `obs` then chooses in each what costs least when
            those to its left are done.
        moves_bias: whether it changes nothing but the bias, which only `prune()` gives it.
    """

    compute: UpdateFunction
    reads_second_moments: bool = False
    whole_columns: bool = False
    dense_target: bool = False
    in_order: bool = False
    moves_bias: bool = False


#: Name → update.
UPDATES: dict[str, Update] = {}


def register_update(name: str, **properties: bool) -> Callable[[UpdateFunction], UpdateFunction]:
    """Function decorator: make an update known to configs.

    Args:
        name: what `PruningConfig(update=...)` calls it.
        properties: the attributes of [`Update`] that are true of it.

    Raises:
        ValueError: the name is taken by another function.
    """

    def register(compute: UpdateFunction) -> UpdateFunction:
        if name in UPDATES and UPDATES[name].compute is not compute:
            raise ValueError(f"update={name!r} is taken by {UPDATES[name].compute.__name__}; choose another name.")
        UPDATES[name] = Update(compute, **properties)
        UPDATE_NAMES.add(name)
        return compute

    return register


@register_update("zero")
def zero(weight: Tensor, moments: Moments | None, gone: Tensor) -> Tensor:
    """The others stay as they are."""
    return weight.masked_fill(gone, 0)


@register_update("bias", reads_second_moments=True, moves_bias=True)
def bias(weight: Tensor, moments: Moments | None, gone: Tensor) -> Tensor:
    """The mean of what goes is added to the bias (FLAP, An et al. 2024, https://arxiv.org/abs/2312.11983, section 3.3)."""
    assert moments is not None
    means = moments.inputs[-1] / moments.inputs[-1, -1]
    changed = weight.masked_fill(gone, 0)
    changed[:, -1] += (weight * gone) @ means
    return changed


@register_update("least_squares", reads_second_moments=True, whole_columns=True, dense_target=True)
def least_squares(weight: Tensor, moments: Moments | None, gone: Tensor) -> Tensor:
    """The columns that stay are solved for, so that the layer gives its target; see `reconstruction.refit`."""
    assert moments is not None
    return refit(weight, moments, ~gone.all(dim=0), damping(moments.inputs, DAMPING))


@register_update("obs", reads_second_moments=True, whole_columns=True)
def obs(weight: Tensor, moments: Moments | None, gone: Tensor) -> Tensor:
    """The columns that stay make up for those that go: Optimal Brain Surgeon, with all of them at once."""
    assert moments is not None
    return least_squares(weight, moments.without_target(weight), gone)


@register_update("sparsegpt", reads_second_moments=True, dense_target=True, in_order=True)
def sparsegpt(weight: Tensor, moments: Moments | None, gone: Tensor) -> Tensor:
    """Column by column, those to the right make up for what goes of a row; see `reconstruction.sequential`.

    It starts at the weight that comes nearest to the layer's target. The paper starts at the old weight: what layers before have
    lost would stay lost.
    """
    assert moments is not None
    inverted = inverse(moments.inputs, damping(moments.inputs, DAMPING))
    return sequential(aimed(weight, moments, inverted), inverted, lambda columns, *_: gone[:, columns])[0]
