"""Units: what lives or dies together, as blocks laid over matrices.

A [`View`] is a grid of equal blocks over (some rows of) a parameter; a [`UnitGroup`] ties views whose blocks, counted row by row,
are the same units: an attention head is a block of rows in query, key and value and a block of columns in the output projection.
Criteria, allocation and masks know units only; which units a pattern makes is the business of `pruning/patterns.py`.
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
    """A grid of `height`×`width` blocks over a target's matrix; block number = unit number, row by row.

    Attributes:
        target: the parameter.
        height, width: of a block.
        rows: those of the matrix that the grid lies over, by default all. Neighbours may lie apart, as the rows of a head do in a
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
        """How many rows the grid lies over."""
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
        """From units to elements. `kept`: bool `[units]`. Returns bool `[out, in]`, True in rows that are not the view's."""
        rows, height, columns, width = self.grid
        matrix = torch.ones(self.target.shape, dtype=torch.bool, device=kept.device)
        matrix[self.rows] = kept.view(rows, 1, columns, 1).expand(self.grid).reshape(rows * height, columns * width)
        return matrix

    @property
    def owns_rows(self) -> bool:
        """Whether a unit holds whole rows of the target, that is outputs of its own."""
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
        """The views of LoRA matrices whose units go with these: rows of B with whole rows, columns of A with whole columns.

        Where a unit holds neither, the matrices stay as they are, and there is none.
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

        Nothing of the size of the parameter is made, except for convolutions, shards, rows that lie apart, and under LoRA: `kept`
        is broadcast over the blocks.

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
        name: the module or block it stands for.
        weights: views whose elements count, in score and in sparsity.
        biases: views that follow: the bias of a removed row goes with it.
        n_of_m: `(n, m)` when at most n of every m neighbouring units may go (N:M), else None.
        block: the block whose heads or neurons these units are parts of; `""` when each unit stands for itself.
        unit_axis: `"rows"` or `"columns"` when a head or neuron is gone as soon as all units in its row or column of this grid are.
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
        """Weights a unit holds."""
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
        """Weights the group holds."""
        return self.num_units * self.unit_size

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.weights[0].target.parameter.device

    @property
    def max_removable(self) -> int:
        """The largest number of units the pattern lets go."""
        return self.num_units * self.n_of_m[0] // self.n_of_m[1] if self.n_of_m else self.num_units

    def reduce(self, elements: Callable[[Target], Tensor], how: str, views: Iterable[View] | None = None) -> Tensor:
        """From elements to units: one number a unit over all its views. Returns `[units]`, float32 at least.

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
            part = part.flatten().to(torch.promote_types(part.dtype, torch.float32))
            total = part if total is None else torch.maximum(total, part) if how == "max" else total + part
        assert total is not None
        if how == "l2":
            return total.sqrt()
        return total / size if how == "mean" and size > 1 else total


def whole_scores(groups: Sequence[UnitGroup], scores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores and sizes of what can go as a whole: heads and neurons where units are parts of them, else the units themselves.

    The largest score of a line decides when all of it is gone, and the first line to go takes the head with it.

    Args:
        groups: the groups of one rule.
        scores: unit scores, `[units]` each.

    Returns:
        Scores and weights held, `[heads and neurons]` each.
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
