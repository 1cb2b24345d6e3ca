"""What reaches what inside a layer: the output of one module is disturbed, and what goes into others is compared.

Nothing is read from code or names. A layer is called again with what it was given in one pass of the whole model, so that a probe
costs one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: What an undisturbed value may differ by: less than this of the largest is the order of a sum, more is an effect.
_EFFECT = 1e-9


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A layer and what it was called with, the first time in a pass of its model."""

    name: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @torch.no_grad()
    def inputs_of(
        self, modules: Sequence[nn.Module], at: nn.Module | None = None, disturb: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor | None]:
        """The first input of each of some modules while the layer is called again; None for one that is not called.

        Args:
            modules: modules of the layer.
            at, disturb: the module whose output is disturbed, and how, `[..., features]` → the same shape.
        """
        seen: dict[nn.Module, Tensor] = {}
        handles = [module.register_forward_pre_hook(lambda module, args: _note(seen, module, args)) for module in modules]
        if at is not None and disturb is not None:
            handles.append(at.register_forward_hook(lambda module, args, output: disturb(output)))
        try:
            self.layer(*_fresh(self.args), **_fresh(self.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return [seen.get(module) for module in modules]


def _fresh(value: Any) -> Any:
    """What a layer is called with, with caches that no call has filled: they grow in place."""
    if isinstance(value, tuple):
        return tuple(map(_fresh, value))
    if isinstance(value, dict):
        return {name: _fresh(part) for name, part in value.items()}
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def _note(seen: dict[nn.Module, Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    seen.setdefault(module, args[0].detach().clone())


@torch.no_grad()
def layer_calls(model: Any, names: Iterable[str], batch: Mapping[str, Tensor]) -> dict[str, LayerCall]:
    """The calls of some layers in one pass of the model, by name; a layer that is not called has none."""
    found: dict[str, LayerCall] = {}
    handles = []
    for name in names:

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            found.setdefault(name, LayerCall(name, layer, _fresh(args), _fresh(kwargs)))

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def changed_features(before: Tensor, after: Tensor) -> Tensor:
    """Which features, the last dimension, differ anywhere, bool `[features]`."""
    return changed(before, after).flatten(0, -2).any(0)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which elements differ by more than the order of a sum explains."""
    return (after - before).abs() > _EFFECT * before.abs().max()


def noise_at(rows: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Adds noise, different at every position, to these features of an output, `rows` on the CPU."""

    def disturb(output: Tensor) -> Tensor:
        shape = (*output.shape[:-1], len(rows))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
        return output.index_add(-1, rows.to(output.device), noise.to(output.device))

    return disturb
