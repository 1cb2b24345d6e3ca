"""Snapshots of a model by reference: enough to restore the very same model without copying any weight.

Changes to a model are made under `all_or_nothing`, trials under `unchanged`. Whatever is raised inside (out of memory, Ctrl-C),
every module gets back its class, attributes, hooks and mode, every parameter and buffer is the same object with the same storage,
and every config has its old values.

A parameter that is cut would be there twice, whole and in part, until the smaller model is verified. So what goes is set aside, and
the whole parameter, unless somebody else has it too, is let go: what stays and what went make it anew, one parameter at a time.
"""

from __future__ import annotations

import copy
import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Some entries of a tensor along a dimension: the same ones everywhere (`index`: `[n]`), or others for each entry of the first
    dimension (`[first, n]`)."""
    return tensor.index_select(dim, index) if index.ndim == 1 else tensor.take_along_dim(_beside(index, dim, tensor), dim)


def _beside(index: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """The indices of [`taken`] with the dimensions of the tensor, of size one where they do not matter."""
    shape = [1] * tensor.ndim
    shape[: index.ndim - 1] = index.shape[:-1]
    shape[dim] = index.shape[-1]
    return index.view(shape)


class Held:
    """A parameter or buffer as it is now: by reference, or once it is split by its two parts."""

    def __init__(self, tensor: Tensor) -> None:
        self._hold(tensor)

    def _hold(self, tensor: Tensor) -> None:
        self.alive: Callable[[], Tensor | None] = lambda: tensor
        self._data: Tensor | None = tensor.data
        self._parts: list[tuple[Tensor, Tensor]] = []

    def split(self, tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
        """Let the parameter go, and return what stays of it, see [`taken`], which must not change in place from now on."""
        stays = taken(tensor.detach(), dim, kept)
        hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks  # which cannot be moved to another parameter
        if self._data is not None and type(tensor) is nn.Parameter and tensor.is_contiguous() and not hooks:
            others = torch.ones((*kept.shape[:-1], tensor.shape[dim]), dtype=torch.bool, device=tensor.device)
            rest = others.scatter_(-1, kept, False).nonzero()[:, -1].view(*kept.shape[:-1], -1)
            self._parts = [(kept, stays), (rest, taken(tensor.detach(), dim, rest))]
            self._dim, self._shape, self._gradient = dim, tensor.shape, tensor.grad
            self._requires_grad, self._attributes = tensor.requires_grad, dict(vars(tensor))
            self.alive, self._data = weakref.ref(tensor), None
        return stays

    def restored(self) -> Tensor:
        """The tensor as it was; another object only if nobody has had it since it was split."""
        tensor = self.alive()
        if tensor is None:
            data = self._parts[0][1].new_empty(self._shape)
            for index, part in self._parts:
                data.scatter_(self._dim, _beside(index, self._dim, part).expand(part.shape), part)
            tensor = nn.Parameter(data, requires_grad=self._requires_grad)
            tensor.grad = self._gradient
            vars(tensor).update(self._attributes)
            self._hold(tensor)
        elif self._data is not None:
            tensor.data = self._data
        return tensor


class Snapshot:
    """The current modules, parameters, buffers and configs of a model. No value is copied, so none may change in place."""

    def __init__(self, model: nn.Module) -> None:
        self._held = {id(tensor): Held(tensor) for tensor in (*model.parameters(), *model.buffers())}
        owners: list[Any] = [*model.modules(), *configs_of(model)]
        self._owners = [(owner, type(owner), dict(vars(owner)), self._dictionaries(owner)) for owner in owners]

    @torch.no_grad()
    def select(self, tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        """[`taken`] from a parameter that the result is to replace, see [`Held.split`]."""
        held = self._held.get(id(tensor))
        known = held is not None and held.alive() is tensor  # an object that is gone may have left its id to another
        return held.split(tensor, dim, index) if held is not None and known else taken(tensor, dim, index)

    def restore(self) -> None:
        """Restore everything."""
        for owner, kind, attributes, dictionaries in self._owners:
            owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(attributes)
            for name, items in dictionaries.items():  # the same dictionaries, since a hook's handle refers to the one it is in
                attributes[name].clear()
                attributes[name].update({key: item.restored() if isinstance(item, Held) else item for key, item in items.items()})

    def _dictionaries(self, owner: object) -> dict[str, dict[Any, Any]]:
        """The contents of an object's attributes that are dictionaries: a module's parameters, buffers, children and hooks."""
        found = {name: value for name, value in vars(owner).items() if isinstance(value, dict)}
        return {name: {key: self._held.get(id(item), item) for key, item in value.items()} for name, value in found.items()}


def return_memory() -> None:
    """Return freed memory to the system where the C library is glibc, which keeps it.

    The parts of a parameter do not fit exactly where the ones before were freed, so the process would grow by half of the model.
    """
    with suppress(AttributeError, TypeError):  # other C libraries; Windows has no library of the process
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Snapshot]:
    """Restore the model if the body raises."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
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


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
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
