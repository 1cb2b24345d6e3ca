"""Which pruner is attached to which model, recorded outside of the model, so that a copy of the model has none."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import nn


class Owner(Protocol):
    """An object that is attached to a model, such as a pruner."""

    def at_work(self) -> bool:
        """Whether it is still in use. It may not be after an interrupted run, which no event reports."""

    def release(self) -> None:
        """Detach from the model."""


#: Weak references: neither model nor pruner is kept alive by them.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, owner: Owner) -> None:
    """Record that `owner` is attached to a model."""
    _OWNERS[model] = weakref.ref(owner)


def detach(model: nn.Module, owner: Owner) -> None:
    """Record that `owner` is no longer attached."""
    if model in _OWNERS and _OWNERS[model]() is owner:
        del _OWNERS[model]


def is_attached(model: nn.Module) -> bool:
    """Whether a pruner is attached to a model. One that is left over from an interrupted run is released first."""
    owner = _OWNERS[model]() if model in _OWNERS else None
    if owner is None or owner.at_work():
        return owner is not None
    owner.release()
    return False
