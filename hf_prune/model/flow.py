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

#: Modules → what is done to a tensor that goes into them or comes out.
Changes = Mapping[nn.Module, Callable[[Tensor], Tensor]]

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
    def again(self, outputs: Changes | None = None, inputs: Changes | None = None) -> Any:
        """What the layer returns when it is called again.

        Args:
            outputs, inputs: modules of the layer → what is done to the tensors that they put out, or are given; what else a module
                puts out (a router its choice) stays.
        """
        handles = [
            module.register_forward_hook(
                lambda module, args, output, change=change: change(output) if isinstance(output, Tensor) else None
            )
            for module, change in (outputs or {}).items()
        ] + [
            module.register_forward_pre_hook(lambda module, args, change=change: (change(args[0]), *args[1:]))
            for module, change in (inputs or {}).items()
        ]
        try:
            return self.layer(*_fresh(self.args), **_fresh(self.kwargs))
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def inputs_of(self, modules: Sequence[nn.Module], outputs: Changes | None = None) -> list[Tensor | None]:
        """The first input of each of some modules while the layer is called again; None for one that is not called.

        Args:
            modules: modules of the layer.
            outputs: modules of the layer → what is done to the tensors that they put out, `[..., features]` → the same shape.
        """
        seen: dict[nn.Module, Tensor] = {}
        handles = [module.register_forward_pre_hook(lambda module, args: _note(seen, module, args)) for module in modules]
        try:
            self.again(outputs)
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


def noise_at(rows: Tensor, size: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Adds noise of a size, different at every position, to these features of an output, `rows` on the CPU."""

    def disturb(output: Tensor) -> Tensor:
        shape = (*output.shape[:-1], len(rows))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
        return output.index_add(-1, rows.to(output.device), size * noise.to(output.device))

    return disturb


# ---------------------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True)
class Reach:
    """What one output of a module, disturbed at one position, changes in the input of another.

    Attributes:
        features: the features that change anywhere.
        elsewhere: whether they change at other positions than that one.
        linear: whether they change in proportion.
    """

    features: tuple[int, ...]
    elsewhere: bool
    linear: bool


def reached(
    call: LayerCall, source: nn.Module, targets: Sequence[nn.Module], outputs: Sequence[int], copies: int
) -> dict[nn.Module, dict[int, Reach]]:
    """What each of some outputs of a module reaches in the inputs of others, where it reaches anything.

    Args:
        call: of the layer that has them all, in a pass of `copies` equal rows, so that as many outputs are tried at once.
        source: the module whose outputs are disturbed in its first call, one by one.
        targets: the modules whose inputs are compared.
        outputs: which outputs are tried.
        copies: the number of rows.

    Returns:
        target → output → what it reaches.
    """
    found: dict[nn.Module, dict[int, Reach]] = {target: {} for target in targets}
    before = call.inputs_of(targets)
    spot = _Spot(copies)
    while len(outputs):
        spot.outputs = outputs[:copies]
        after = []
        for spot.size in (1.0, -1.0):
            spot.calls = 0
            after.append(call.inputs_of(targets, {source: spot}))
        for target, still, up, down in zip(targets, before, *after):
            if still is None or up is None or down is None or still.shape[0] % copies:
                continue
            still, up, down = (value.view(copies, -1, value.shape[-1]) for value in (still, up, down))
            effect, bend = changed(still, up), changed(still, up + down - still)
            for place, output in enumerate(spot.outputs):
                if features := effect[place].any(0).nonzero().flatten().tolist():
                    positions = effect[place].any(1).nonzero().flatten().tolist()
                    elsewhere = positions != [spot.position] or spot.positions != still.shape[1]
                    found[target][output] = Reach(tuple(features), elsewhere, not bool(bend[place].any()))
        outputs = outputs[len(spot.outputs) :]
    return found


class _Spot:
    """Disturbs the first output of a module at one position: another feature in each row.

    An output without rows (of positions, which all rows share) is disturbed everywhere, in one feature.
    """

    outputs: Sequence[int]
    size: float

    def __init__(self, copies: int) -> None:
        self.copies, self.calls, self.position, self.positions = copies, 0, 0, 0

    def __call__(self, output: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            return output
        if output.shape[0] % self.copies:
            self.outputs, self.positions = self.outputs[:1], 0
            return noise_at(torch.tensor(self.outputs))(output)
        changed = output.clone()
        rows = changed.view(self.copies, -1, output.shape[-1])
        self.positions = rows.shape[1]
        self.position = self.positions // 3
        rows[torch.arange(len(self.outputs)), self.position, list(self.outputs)] += self.size
        return changed
