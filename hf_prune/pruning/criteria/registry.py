"""The criteria by name; each registers itself where it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...settings.config import CRITERIA as CRITERION_NAMES
from ...settings.config import DECLARED
from .base import Criterion

_C = TypeVar("_C", bound=type[Criterion])

#: Name → class.
CRITERIA: dict[str, type[Criterion]] = {}


def register_criterion(name: str) -> Callable[[_C], _C]:
    """Class decorator: make a criterion known to configs.

    Args:
        name: what `PruningConfig(criterion=...)` calls it.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(criterion: _C) -> _C:
        if CRITERIA.get(name, criterion) is not criterion:
            raise ValueError(f"criterion={name!r} is taken by {CRITERIA[name].__name__}; choose another name.")
        CRITERIA[name] = criterion
        CRITERION_NAMES.add(name)
        for attribute, names in DECLARED.items():
            if getattr(criterion, attribute):
                names.add(name)
        return criterion

    return register
