"""Which weights a rule names, always seen as `[out, in]` matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import PruningConfigError, closest

#: Layer types whose weights can be pruned. GPT-2's Conv1D stores `[in, out]`; convolutions are flattened to `[out, in·kernel]`.
PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)

ModuleNames = str | list[str] | None


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter seen as a matrix: a weight as `[out, in]`, a bias as `[out, 1]`.

    Attributes:
        name: the parameter's name in the model.
        module_name: the name of its module.
        parameter: the parameter itself.
        transposed: the parameter is stored `[in, out]`.
        kernel_first: a convolution is flattened to `[out, kernel·in]` instead of `[out, in·kernel]`, so that neighbouring columns
            are neighbouring inputs.
    """

    name: str
    module_name: str
    parameter: nn.Parameter
    transposed: bool = False
    kernel_first: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """`tensor`, which has the parameter's shape, as `[out, in]`; a view unless `kernel_first`."""
        if self.transposed:
            return tensor.T
        return (tensor.movedim(1, -1) if self.kernel_first else tensor).reshape(tensor.shape[0], math.prod(tensor.shape[1:]))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """An `[out, in]` matrix in the parameter's shape; a view."""
        if self.transposed:
            return matrix.T
        rows, inputs, *kernel = (*self.parameter.shape, 1)[: max(self.parameter.ndim, 2)]
        return matrix.reshape(rows, *kernel, inputs).movedim(-1, 1) if self.kernel_first else matrix.reshape(self.parameter.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = self.matrix(self.parameter).shape
        return rows, columns


def weight_target(name: str, module: nn.Module, kernel_first: bool = False) -> Target:
    """The weight of a layer."""
    weight = module.get_parameter("weight")
    return Target(f"{name}.weight", name, weight, isinstance(module, Conv1D), kernel_first and weight.ndim > 2)


def bias_target(name: str, module: nn.Module) -> Target | None:
    """The bias of a layer, if it has one."""
    return Target(f"{name}.bias", name, module.get_parameter("bias")) if module.bias is not None else None


def prunable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `(name, module)` for every layer whose weight can be pruned; a weight that layers share is yielded once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module


def body_prefix(model: nn.Module) -> str:
    """The name prefix of the modules that make up the model's body, `""` when the model is a bare body."""
    base = getattr(model, "base_model", model)
    return next((f"{name}." for name, module in model.named_modules() if module is base and name), "")


def names_module(names: ModuleNames, name: str) -> bool:
    """Whether `names` selects the module `name`: a regular expression matches all of it, a list item it or its end, as in PEFT."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in names)


def check_names(names: ModuleNames, known: list[str], field: str) -> None:
    """Raise unless every expression or list item matches one of the `known` module names.

    Raises:
        PruningConfigError: something matches nothing; names the closest module.
    """
    for item in [names] if isinstance(names, str) else [[entry] for entry in names or ()]:
        if not any(names_module(item, name) for name in known):
            text = item if isinstance(item, str) else item[0]
            match = closest(text, known) or closest(text, {name.rsplit(".", 1)[-1] for name in known})
            allowed = f"matches no module; a regular expression must match a whole name, such as {known[0]!r}."
            raise PruningConfigError(field, text, allowed, match)
