"""Which pruner works on which model: known outside of the model, so that a copy of the model belongs to nobody."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import nn


class Owner(Protocol):
    """What works on a model."""

    def at_work(self) -> bool:
        """Whether it still does. It may not when its run was cut short: no event says so."""

    def release(self) -> None:
        """Let go of the model."""


#: Neither model nor pruner is kept alive by this.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, owner: Owner) -> None:
    """Note that `owner` works on a model."""
    _OWNERS[model] = weakref.ref(owner)


def detach(model: nn.Module, owner: Owner) -> None:
    """Note that `owner` does so no more."""
    if model in _OWNERS and _OWNERS[model]() is owner:
        del _OWNERS[model]


def is_attached(model: nn.Module) -> bool:
    """Whether a pruner works on a model. One that is left over from a run that was cut short has to let go of it first."""
    owner = _OWNERS[model]() if model in _OWNERS else None
    if owner is None or owner.at_work():
        return owner is not None
    owner.release()
    return False
