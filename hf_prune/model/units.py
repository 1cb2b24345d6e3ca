"""Units: weights that are kept or removed together, as blocks of matrices.

A [`View`] is a grid of equal blocks over (some rows of) a parameter; a [`UnitGroup`] combines views whose blocks, numbered row by
row, belong to the same units: an attention head is a block of rows in query, key and value and a block of columns in the output
projection. Criteria, allocation and masks deal only with units; `pruning/patterns.py` decides which units a pattern has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .sharding import is_sharded
from .targets import Target, bias_target, weight_target


@dataclass(frozen=True, eq=False)
class View:
    """A grid of `height`×`width` blocks over a target's matrix; blocks, and so units, are numbered row by row.

    Attributes:
        target: the parameter.
        height, width: the size of a block.
        rows: the rows of the matrix that the grid covers, by default all. They need not be contiguous, as those of a head in a
            packed projection; a slice is masked in place, through a view.
    """

    target: Target
    height: int
    width: int
    rows: slice | Tensor = field(default_factory=lambda: slice(None))

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """`(block rows, height, block columns, width)`."""
        return self.num_rows // self.height, self.height, self.target.shape[1] // self.width, self.width

    @cached_property
    def num_rows(self) -> int:
        """The number of rows that the grid covers."""
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(self.target.shape[0])))
        return len(self.rows)

    def gather(self, matrix: Tensor) -> Tensor:
        """The elements of each block. `matrix`: `[out, in]` of the whole target, or `[out, 1]`. Returns `[rows, h, columns, w]`."""
        rows, height, columns, width = self.grid
        if matrix.shape[1] == 1:
            columns = width = 1
        return matrix[self.rows].reshape(rows, height, columns, width)

    def spread(self, kept: Tensor) -> Tensor:
        """From units to elements. `kept`: bool `[units]`. Returns bool `[out, in]`, True in rows outside of the view."""
        rows, height, columns, width = self.grid
        matrix = torch.ones(self.target.shape, dtype=torch.bool, device=kept.device)
        matrix[self.rows] = kept.view(rows, 1, columns, 1).expand(self.grid).reshape(rows * height, columns * width)
        return matrix

    @property
    def owns_rows(self) -> bool:
        """Whether a unit holds whole rows of the target, that is, whole outputs."""
        return self.width == self.target.shape[1]

    @property
    def owns_columns(self) -> bool:
        """Whether a unit holds whole columns of the target, that is inputs of its own."""
        return self.height == self.target.shape[0]

    @property
    def columns(self) -> Tensor:
        """The columns of each unit that owns some, `[units, width]`."""
        return torch.arange(self.target.shape[1], device=self.target.parameter.device).view(-1, self.width)

    @cached_property
    def adapters(self) -> tuple[View, ...]:
        """The views of LoRA matrices that are masked with these units: rows of B for whole rows, columns of A for whole columns.

        Empty if a unit holds neither; the matrices then stay as they are.
        """
        adapter, name = self.target.adapter, self.target.module_name
        if adapter is None:
            return ()
        if self.owns_rows:
            targets = (weight_target(f"{name}.lora_B", adapter.lora_B), bias_target(f"{name}.lora_B", adapter.lora_B))
            return tuple(View(target, self.height, target.shape[1], self.rows) for target in targets if target)
        if self.height == self.target.shape[0]:
            target = weight_target(f"{name}.lora_A", adapter.lora_A)
            return (View(target, target.shape[0], self.width),)
        return ()

    @torch.no_grad()
    def apply(self, kept: Tensor, gradients: bool = False) -> None:
        """Zero the blocks of units that are not kept, in place, in the target or in its gradient.

        It allocates nothing of the parameter's size, except for convolutions, shards, rows that are not contiguous, and under LoRA:
        `kept` is broadcast over the blocks.

        Args:
            kept: bool `[units]`.
            gradients: zero the gradient, if there is one.
        """
        for view in self.adapters:
            view.apply(kept, gradients)
        rows, _, columns, _ = self.grid
        factors, parameter = kept.view(rows, 1, columns, 1), self.target.parameter
        in_blocks = parameter.ndim <= 2 and not is_sharded(parameter) and isinstance(self.rows, slice)
        if not in_blocks:
            # The matrix of a convolution may be a copy, that of shards or of rows by their indices is one: the factors are brought
            # into the parameter's shape instead.
            factors = self.target.from_matrix(self.spread(kept))

        def blocks(tensor: Tensor) -> Tensor:
            return self.target.matrix(tensor)[self.rows].view(self.grid) if in_blocks else tensor

        self.target.mask(factors, blocks, adapted=not self.adapters, gradients=gradients)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are ranked together locally: the blocks of one weight, the heads of one attention block.

    Attributes:
        name: the name of the module or block.
        weights: views whose elements count in score and sparsity.
        biases: views that are masked along with them: the bias of a removed row.
        n_of_m: `(n, m)` if at most n of every m neighbouring units may be removed (N:M), else None.
        block: the block whose heads or neurons these units are parts of; `""` if units are independent.
        unit_axis: `"rows"` or `"columns"` if removing all units in a row or column of this grid removes its head or neuron.
    """

    name: str
    weights: tuple[View, ...]
    biases: tuple[View, ...] = ()
    n_of_m: tuple[int, int] | None = None
    block: str = ""
    unit_axis: str = ""

    @property
    def num_units(self) -> int:
        """Number of units."""
        rows, _, columns, _ = self.weights[0].grid
        return rows * columns

    @property
    def unit_size(self) -> int:
        """Number of weights of a unit."""
        return sum(view.height * view.width for view in self.weights)

    @property
    def compensated(self) -> tuple[View, ...]:
        """The views whose other weights can make up for units that go: those in which a unit holds no whole rows."""
        return tuple(view for view in self.weights if not view.owns_rows)

    def apply(self, kept: Tensor, gradients: bool = False) -> None:
        """Zero the units that are not kept (bool `[units]`) in the parameters, biases included, or in their gradients."""
        for view in (*self.weights, *self.biases):
            view.apply(kept, gradients)

    @property
    def size(self) -> int:
        """Number of weights of the group."""
        return self.num_units * self.unit_size

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.weights[0].target.parameter.device

    @property
    def max_removable(self) -> int:
        """The largest number of units that the pattern allows to remove."""
        return self.num_units * self.n_of_m[0] // self.n_of_m[1] if self.n_of_m else self.num_units

    def reduce(self, elements: Callable[[Target], Tensor], how: str, views: Iterable[View] | None = None) -> Tensor:
        """From elements to units: one number per unit over all its views. Returns `[units]`, float32 at least.

        Args:
            elements: the quantity of a target, `[out, in]`, or `[out, 1]` if it belongs to whole rows.
            how: `"mean"`, `"sum"`, `"l2"` or `"max"`.
            views: some of the group's views; default its weights.
        """
        total, size = None, 0
        for view in self.weights if views is None else views:
            parts = view.gather(elements(view.target))
            size += parts.shape[1] * parts.shape[3]
            if parts.shape[1] == parts.shape[3] == 1:
                part = parts.square() if how == "l2" else parts
            elif how == "max":
                part = parts.amax(dim=(1, 3))
            else:
                part = (parts.square() if how == "l2" else parts).sum(dim=(1, 3))
            part = part.flatten().to(torch.promote_types(part.dtype, torch.float32))
            total = part if total is None else torch.maximum(total, part) if how == "max" else total + part
        assert total is not None
        if how == "l2":
            return total.sqrt()
        return total.div_(size) if how == "mean" and size > 1 else total  # a sum, so nobody else has it


def whole_scores(groups: Sequence[UnitGroup], scores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores and sizes of whole heads and neurons if units are parts of them, else of the units themselves.

    A row or column is removed once its largest score is low enough, and the first row or column to be removed removes its head.

    Args:
        groups: the groups of one rule.
        scores: unit scores, `[units]` each.

    Returns:
        Scores and numbers of weights, `[heads and neurons]` each.
    """
    whole: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for group, score in zip(groups, scores):
        name = group.block or group.name
        sizes[name] = sizes.get(name, 0) + group.size
        if group.unit_axis or not group.block:
            rows, _, columns, _ = group.weights[0].grid
            line = score.view(rows, columns).amax(dim=1 if group.unit_axis == "rows" else 0) if group.unit_axis else score
            whole[name] = torch.minimum(whole[name], line) if name in whole else line
    counts = [torch.full_like(line, sizes[name] / line.numel()) for name, line in whole.items()]
    return torch.cat(list(whole.values())), torch.cat(counts)
