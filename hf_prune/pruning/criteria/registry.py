"""The criteria by name."""

from __future__ import annotations

from ...settings.config import CRITERIA as CRITERION_NAMES
from ...settings.config import DECLARED
from .activations import APoZ, MeanActivation, Wanda
from .base import Criterion
from .gradients import Fisher, Gradient, Snip, SnipMomentum, Taylor
from .movement import Movement, SoftMovement
from .weights import FPGM, Magnitude, Random

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


def register_criterion(name: str, criterion: type[Criterion]) -> None:
    """Make a criterion known to configs under `name`.

    Args:
        name: what `PruningConfig(criterion=...)` calls it.
        criterion: the class; it declares what it reads and scores.

    Raises:
        ValueError: the name is taken by another class.
    """
    if CRITERIA.get(name, criterion) is not criterion:
        raise ValueError(f"criterion={name!r} is taken by {CRITERIA[name].__name__}; choose another name.")
    CRITERIA[name] = criterion
    CRITERION_NAMES.add(name)
    for attribute, names in DECLARED.items():
        if getattr(criterion, attribute):
            names.add(name)
