"""Units: what lives or dies together, as blocks laid over matrices.

A [`View`] is a grid of equal blocks over (some rows of) a parameter; a [`UnitGroup`] ties views whose blocks, counted row by row,
are the same units: an attention head is a block of rows in query, key and value and a block of columns in the output projection.
Criteria, allocation and masks know units only; which units a pattern makes is the business of `patterns.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import is_sharded
from .targets import Target


@dataclass(frozen=True, eq=False)
class View:
    """A grid of `height`×`width` blocks over rows `start:stop` of a target's matrix; block number = unit number, row by row."""

    target: Target
    height: int
    width: int
    start: int
    stop: int

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """`(block rows, height, block columns, width)`."""
        return (self.stop - self.start) // self.height, self.height, self.target.shape[1] // self.width, self.width

    def gather(self, matrix: Tensor) -> Tensor:
        """The elements of each block. `matrix`: `[out, in]` of the whole target, or `[out, 1]`. Returns `[rows, h, columns, w]`."""
        rows, height, columns, width = self.grid
        if matrix.shape[1] == 1:
            columns = width = 1
        return matrix[self.start : self.stop].reshape(rows, height, columns, width)

    @property
    def owns_rows(self) -> bool:
        """Whether a unit holds whole rows of the target, that is outputs of its own."""
        return self.width == self.target.shape[1]

    @torch.no_grad()
    def apply(self, kept: Tensor, tensor: Tensor) -> None:
        """Zero the blocks of units that are not kept, in place.

        Nothing of the size of a linear layer's parameter is made, unless it is sharded: `kept` is broadcast over the blocks.

        Args:
            kept: bool `[units]`.
            tensor: the parameter, its gradient, or anything else of its shape.
        """
        rows, height, columns, width = self.grid
        factors = kept.view(rows, 1, columns, 1)
        if tensor.ndim <= 2 and not is_sharded(tensor):
            self.target.matrix(tensor)[self.start : self.stop].view(self.grid).mul_(factors)
        else:
            # The matrix of a convolution may be a copy, that of a sharded parameter is one: the factors are brought into its shape.
            matrix = torch.ones(self.target.shape, dtype=torch.bool, device=kept.device)
            matrix[self.start : self.stop] = factors.expand(self.grid).reshape(rows * height, columns * width)
            tensor.mul_(self.target.from_matrix(matrix))


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are ranked together locally: the blocks of one weight, the heads of one attention block.

    Attributes:
        name: the module or block it stands for.
        weights: views whose elements count, in score and in sparsity.
        biases: views that follow: the bias of a removed row goes with it.
        cell: `(n, m)` when at most n of every m neighbouring units may go (N:M), else None.
    """

    name: str
    weights: tuple[View, ...]
    biases: tuple[View, ...] = ()
    cell: tuple[int, int] | None = None

    @property
    def num_units(self) -> int:
        """Number of units."""
        rows, _, columns, _ = self.weights[0].grid
        return rows * columns

    @property
    def unit_size(self) -> int:
        """Weights a unit holds."""
        return sum(view.height * view.width for view in self.weights)

    def apply(self, kept: Tensor, gradients: bool = False) -> None:
        """Zero the units that are not kept (bool `[units]`) in the parameters, biases included, or in their gradients."""
        for view in (*self.weights, *self.biases):
            parameter = view.target.parameter
            if (tensor := parameter.grad if gradients else parameter) is not None:
                view.apply(kept, tensor)

    @property
    def size(self) -> int:
        """Weights the group holds."""
        return self.num_units * self.unit_size

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.weights[0].target.parameter.device

    @property
    def max_removable(self) -> int:
        """The largest number of units the pattern lets go."""
        return self.num_units * self.cell[0] // self.cell[1] if self.cell else self.num_units

    def reduce(self, elements: Callable[[Target], Tensor], how: str, views: Iterable[View] | None = None) -> Tensor:
        """From elements to units: one number a unit over all its views. Returns `[units]`, float32.

        Args:
            elements: the quantity of a target, `[out, in]`, or `[out, 1]` where it belongs to whole rows.
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
            part = part.flatten().float()
            total = part if total is None else torch.maximum(total, part) if how == "max" else total + part
        assert total is not None
        if how == "l2":
            return total.sqrt()
        return total / size if how == "mean" and size > 1 else total
