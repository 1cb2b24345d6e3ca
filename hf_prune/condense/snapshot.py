"""Snapshots of a model by reference: enough to restore the very same model without copying any weight.

Changes to a model are made under `all_or_nothing`, trials under `unchanged`. Whatever is raised inside (out of memory, Ctrl-C),
every module gets back its class, attributes, hooks and mode, every parameter and buffer is the same object with the same storage,
and every config has its old values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class Snapshot:
    """The current modules, parameters, buffers and configs of a model. No value is copied, so none may change in place."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
        owners: list[Any] = [*model.modules(), *_configs(model)]
        self._owners = [(owner, type(owner), dict(vars(owner)), _dictionaries(owner)) for owner in owners]

    def restore(self) -> None:
        """Restore everything."""
        for owner, kind, attributes, dictionaries in self._owners:
            owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(attributes)
            for name, items in dictionaries.items():  # the same dictionaries, since a hook's handle refers to the one it is in
                attributes[name].clear()
                attributes[name].update(items)
        for tensor, data in self._tensors:
            tensor.data = data


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore the model if the body raises."""
    snapshot = Snapshot(model)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model after the body, whatever it does."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


def own_configs(model: nn.Module) -> None:
    """Give a model's modules copies of their configs, so that other models that share the config objects are not affected."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, config in _configs_in(module).items():
            setattr(module, name, copy.deepcopy(config, memo))


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that a module of a model holds, nested ones included, each once."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [config for module in model.modules() for config in _configs_in(module).values()]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += _configs_in(config).values()
    return list(found.values())


def _configs_in(owner: object) -> dict[str, PreTrainedConfig]:
    """An object's attributes that are configs."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, PreTrainedConfig)}


def _dictionaries(owner: object) -> dict[str, dict[Any, Any]]:
    """The contents of an object's attributes that are dictionaries: a module's parameters, buffers, children and hooks."""
    return {name: dict(value) for name, value in vars(owner).items() if isinstance(value, dict)}
