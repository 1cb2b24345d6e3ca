"""What depends on a size in a config is not listed but seen: where two models without weights differ that have all of a config but
this size in common, a model is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..condense.snapshot import Snapshot
from ..settings.errors import ConfigError


def outline(model: PreTrainedModel, **sizes: int) -> nn.Module:
    """A model of the same class and config without weights, not condensed.

    Args:
        model: the model; it and its config stay as they are.
        sizes: what the config says instead.

    Raises:
        ConfigError: the class needs more than its config.
    """
    config: Any = copy.deepcopy(model.config)
    config.hf_prune = None
    for name, size in sizes.items():
        setattr(config, name, size)
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            made: nn.Module = kind(config)
    except TypeError as error:
        allowed = f"must be a class that its config alone makes, so that it can be seen what has the size in question ({error})."
        raise ConfigError("model", kind.__name__, allowed) from None
    return made


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def sized(old: nn.Module, new: nn.Module) -> dict[str, list[int]]:
    """The parameters and buffers in which two outlines differ: name → the dimensions that do. Both have the same names."""
    smaller = tensors(new)
    differing = {
        name: [dim for dim, (one, other) in enumerate(zip(tensor.shape, smaller[name].shape)) if one != other]
        for name, tensor in tensors(old).items()
    }
    return {name: dims for name, dims in differing.items() if dims}


@torch.no_grad()
def cut_to(
    model: PreTrainedModel, old: nn.Module, new: nn.Module, kept: Callable[[str], Tensor], what: str, snapshot: Snapshot
) -> None:
    """Cut all of a model that has a size, where its outlines differ, and set the attributes of its modules in which they do.

    Args:
        model: the model, changed in place.
        old, new: outlines with the old and the new size.
        kept: the name of a parameter or buffer → which entries stay of its dimensions that have the size, bool, `[size]`; or
            `[first, size]`, equally many for each entry of its first dimension.
        what: has the size, in words.
        snapshot: of the model, which makes what goes recoverable.

    Raises:
        ConfigError: the model has not the shapes of the old outline.
    """
    found, made = tensors(model), {}
    for name, dims in sized(old, new).items():
        whole = found.get(name)
        if id(whole) in made:
            continue
        stays = kept(name)
        if whole is None or any(whole.shape[dim] != stays.shape[-1] for dim in dims):
            there = "none" if whole is None else f"one of the shape {tuple(whole.shape)}"
            raise ConfigError("model", type(model).__name__, f"must have {name!r} with {stays.shape[-1]} {what}; it has {there}.")
        index = stays.nonzero()[:, -1].view(*stays.shape[:-1], -1).to(whole.device)
        cut: Tensor = whole
        for dim in dims:
            cut = snapshot.select(cut, dim, index)
        made[id(whole)] = nn.Parameter(cut, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else cut
    modules, before = dict(model.named_modules()), dict(old.named_modules())
    for name, tensor in found.items():  # those that others have, too
        if id(tensor) in made:
            owner, _, own = name.rpartition(".")
            setattr(modules[owner], own, made[id(tensor)])
    for name, module in new.named_modules():
        for attribute, value in vars(module).items():
            if type(value) in (int, type(None)) and vars(before[name]).get(attribute) != value and name in modules:
                setattr(modules[name], attribute, value)
