"""Computing in float64 with weights that stay in their own dtype: what is read of them is widened for the moment of its use.

A model whose parameters are [`Wide`] gives the very bits that the same model in float64 gives, but for the order of a product's
sums, and costs one slice of a weight instead of a second model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

aten = torch.ops.aten

#: How many elements of a weight are widened at a time in a matrix product: two megabytes, which stay in a core's cache.
ELEMENTS = 1 << 18

#: What rearranges a tensor and computes nothing.
_VIEWS = (aten.alias.default, aten.detach.default, aten.t.default, aten.transpose.int, aten.view.default, aten.slice.Tensor)


class Wide(Tensor):
    """A tensor of float64 to all who ask, held as it was given."""

    narrow_: Tensor

    @staticmethod
    def __new__(cls, narrow: Tensor) -> Wide:
        """`narrow`: floating-point, on any device that has float64."""
        new: Any = Tensor._make_wrapper_subclass
        wide: Wide = new(cls, narrow.shape, narrow.stride(), dtype=torch.float64, device=narrow.device)
        wide.narrow_ = narrow
        return wide

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wide({self.narrow_!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first, kwargs = args[0] if args else None, kwargs or {}
        if isinstance(first, Wide) and func in _VIEWS:
            return Wide(func(first.narrow_, *args[1:], **kwargs))
        if isinstance(first, Wide) and func is aten.embedding.default:
            return func(first.narrow_, *args[1:], **kwargs).double()
        if func in (aten.mm.default, aten.addmm.default) and not kwargs and isinstance(args[-1], Wide):
            *bias, states = map(_widened, args[:-1])
            product = _product(states, args[-1].narrow_)
            return product.add_(bias[0]) if bias else product
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _widened(value: Any) -> Any:
    return value.narrow_.double() if isinstance(value, Wide) else value


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """`states @ weight` in float64, `[n, in] × [in, out] → [n, out]`, some columns of the weight at a time."""
    columns = max(ELEMENTS // max(weight.shape[0], 1), 1)
    product = states.new_empty(states.shape[0], weight.shape[1])
    for start in range(0, weight.shape[1], columns):
        stop = start + columns
        product[:, start:stop] = states @ weight[:, start:stop].double()
    return product


def widen(model: nn.Module) -> None:
    """Let a model compute in float64. Its `_parameters` change; undo that with `snapshot.unchanged`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = Wide(parameter.detach())  # type: ignore[assignment]
    for buffer in model.buffers():  # small, and some are written in place
        if buffer.is_floating_point():
            buffer.data = buffer.data.double()
