"""What the inputs of a layer that stay do for those that go: the maths of pruning without training, on plain tensors.

A layer `y = W·x` should give `t` (what the dense model gave there) from inputs `x` (what the pruned model gives there). Of the
calibration tokens only sums are kept, the [`Moments`]; each question about the error of a weight `V`

    E(V) = Σ a·‖t − V·x‖² + λ·‖V − W‖²

(`a`: how much a token matters) is answered from them. The second term pulls to the old weights, never to zero: inputs whose size is
set by a few outliers would else lose all others. The least E for a given set of inputs is a linear system ([`refit`]); which unit
costs least, and which next once the others have adapted, is Optimal Brain Surgeon ([`elimination`]; Hassibi and Stork 1993;
for units ZipLM, Kurtić et al. 2023, https://arxiv.org/abs/2302.04089, eq. 2 to 4); [`sequential`] is its restriction to the columns
to the right, with a mask of its own for each row (SparseGPT, Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

#: How many units are eliminated, or columns passed, before what is left is brought up to date in one product.
_BLOCK = 64


@dataclass
class Moments:
    """Sums over tokens of what goes into a layer and of what should come out.

    Attributes:
        inputs: Σ a·x·xᵀ, `[in, in]`.
        cross: Σ a·t·xᵀ, `[out, in]`.
        targets: Σ a·t², `[out]`.
        tokens: how many.
    """

    inputs: Tensor
    cross: Tensor
    targets: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, outputs: int, inputs: int, device: torch.device | str = "cpu") -> Moments:
        """Of no token yet. Sums are in float64, whatever the model's type."""
        total = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(total(inputs, inputs), total(outputs, inputs), total(outputs))

    def add(self, inputs: Tensor, targets: Tensor, importance: Tensor | None = None) -> None:
        """Count more tokens. `inputs`: `[tokens, in]`; `targets`: `[tokens, out]`; `importance`: `[tokens]`, by default 1 each."""
        weighted = inputs if importance is None else inputs * importance[:, None]
        self.inputs += weighted.T @ inputs
        self.cross += targets.T @ weighted
        self.targets += (targets.square() if importance is None else targets.square() * importance[:, None]).sum(dim=0)
        self.tokens += len(inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return self.inputs.nbytes + self.cross.nbytes + self.targets.nbytes

    def errors(self, weight: Tensor) -> Tensor:
        """Σ a·(t − V·x)² of each output for the weight `V`, `[out, in]`. Returns `[out]`."""
        return self.targets - 2 * (self.cross * weight).sum(dim=1) + ((weight @ self.inputs) * weight).sum(dim=1)

    @classmethod
    def of(cls, weight: Tensor, inputs: Tensor, tokens: int = 1) -> Moments:
        """Of inputs with the second moments `inputs`, and of what `weight` gives from them as the target."""
        inputs = inputs.to(weight.dtype)
        cross = weight @ inputs
        return cls(inputs, cross, (cross * weight).sum(dim=1), tokens)

    def without_target(self, weight: Tensor) -> Moments:
        """The same tokens, with what `weight` gives as their target."""
        return Moments.of(weight, self.inputs, self.tokens)


def damping(inputs: Tensor, share: float) -> float:
    """λ as a share of the mean of the diagonal of Σ x·xᵀ; at least the smallest that keeps dead inputs solvable."""
    return max(share * float(inputs.diagonal().mean()), torch.finfo(torch.float32).tiny)


def refit(weight: Tensor, moments: Moments, kept: Tensor, damp: float) -> Tensor:
    """The weight of least E whose columns that are not kept are zero.

    Args:
        weight: the old weight W, `[out, in]`.
        moments: of the layer.
        kept: bool `[in]`.
        damp: λ.

    Returns:
        `[out, in]`: (C + λW)_K·(H_KK + λI)⁻¹ in the columns K that are kept, with C = Σ a·t·xᵀ and H = Σ a·x·xᵀ.
    """
    solved = torch.zeros_like(weight)
    if bool(kept.any()):
        system = moments.inputs[kept][:, kept]
        system.diagonal().add_(damp)
        wanted = moments.cross[:, kept] + damp * weight[:, kept]
        solved[:, kept] = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(system)).T
    return solved


def inverse(inputs: Tensor, damp: float) -> Tensor:
    """(H + λI)⁻¹, `[in, in]`."""
    system = inputs.clone()
    system.diagonal().add_(damp)
    return torch.cholesky_inverse(torch.linalg.cholesky(system))


def aimed(weight: Tensor, moments: Moments, inverse: Tensor) -> Tensor:
    """The weight of least E with all columns, from (H + λI)⁻¹, `[in, in]`: W + (C - W·H)·(H + λI)⁻¹.

    The same as [`refit`] with all columns kept; written as a difference it is W itself, bit for bit, where W gives the target.
    """
    return weight + (moments.cross - weight @ moments.inputs) @ inverse


def elimination(weight: Tensor, inverse: Tensor, units: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Take units away, each time the one whose loss the others can best make up for.

    A unit M costs ρ = tr(V_M·(P_MM)⁻¹·V_Mᵀ), the exact rise of E when it goes and all others adapt; P is the inverse that is left
    of (H + λI)⁻¹, V the weight as it has adapted.

    Args:
        weight: the weight of least E with all columns, `[out, in]`; rows may be scaled by the root of what they matter.
        inverse: (H + λI)⁻¹, `[in, in]`.
        units: the columns of each unit, `[units, width]`; other columns never go.
        count: how many units to take away.

    Returns:
        Their numbers in the order of going, `[count]`, and the rise of E with each, `[count]`.
    """
    if units.shape[1] == 1:
        return _eliminate_columns(weight, inverse, units[:, 0], count)
    return _eliminate_groups(weight, inverse, units, count)


def _eliminate_columns(weight: Tensor, inverse: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Units of one column. What a step changes is kept as rank-one terms and brought into the matrices once in a while."""
    others = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    others[columns] = False
    place = torch.cat([columns, others.nonzero().flatten()])
    weight, inverse = weight[:, place], inverse[place][:, place]
    names = torch.arange(len(columns), device=weight.device)
    order, rises = names.new_empty(count), weight.new_empty(count)
    done = 0
    while done < count:
        left, steps = len(names), min(_BLOCK, count - done)
        norms, diagonal = weight.square().sum(dim=0), inverse.diagonal().clone()
        rows, outs = weight.new_zeros(steps, len(diagonal)), weight.new_zeros(steps, len(weight))
        gone = torch.zeros(len(diagonal), dtype=torch.bool, device=weight.device)
        for step in range(steps):
            costs = (norms[:left] / diagonal[:left]).masked_fill_(gone[:left], torch.inf)
            unit = costs.argmin()
            order[done + step], rises[done + step] = names[unit], costs[unit]
            gone[unit] = True
            past, outs_past = rows[:step], outs[:step]
            row = inverse[unit] - past[:, unit] @ past
            out = weight[:, unit] - past[:, unit] @ outs_past
            root = row[unit].sqrt()
            row, out = row / root, out / root
            overlap = out @ weight - (outs_past @ out) @ past
            norms += row * (row * out.dot(out) - 2 * overlap)
            diagonal -= row.square()
            rows[step], outs[step] = row, out
        stay = ~gone
        weight = (weight - outs.T @ rows)[:, stay]
        inverse = (inverse - rows.T @ rows)[stay][:, stay]
        names = names[stay[:left]]
        done += steps
    return order, rises


def _eliminate_groups(weight: Tensor, inverse: Tensor, units: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Units of several columns, of which there are few."""
    number, _width = units.shape
    order, rises = torch.empty(count, dtype=torch.long, device=weight.device), weight.new_empty(count)
    alive = torch.ones(number, dtype=torch.bool, device=weight.device)
    for step in range(count):
        names = alive.nonzero().flatten()
        columns = units[names]
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        parts = weight[:, columns].transpose(0, 1)
        costs = (torch.linalg.solve(blocks, parts.transpose(1, 2)) * parts.transpose(1, 2)).sum(dim=(1, 2))
        best = costs.argmin()
        order[step], rises[step] = names[best], costs[best]
        gone = columns[best]
        across = torch.linalg.solve(blocks[best], inverse[gone])
        weight = weight - weight[:, gone] @ across
        inverse = inverse - inverse[:, gone] @ across
        alive[names[best]] = False
    return order, rises


#: (some neighbouring columns, the weight as it has adapted by then `[out, columns]`, the diagonal of the factor `[columns]`) → what
#: goes of it, bool `[out, columns]`.
Choice = Callable[[slice, Tensor, Tensor], Tensor]


def sequential(weight: Tensor, inverse: Tensor, choose: Choice, step: int = 1) -> tuple[Tensor, Tensor]:
    """Zero what goes, column by column from the left, and let the columns to the right make up for it, row by row.

    With U the upper Cholesky factor of (H + λI)⁻¹, U_jj² is the first entry of the inverse of H + λI restricted to the columns from
    j on: a weight of column j costs w²/U_jj², with w as it has adapted to what went to its left.

    Args:
        weight: `[out, in]`.
        inverse: (H + λI)⁻¹, `[in, in]`.
        choose: says what goes; asked once for every `step` columns, when all to their left are done.
        step: how many columns are chosen together.

    Returns:
        `[out, in]`: each row as OBS has it that may change only columns to the right of the one that goes; and what went, bool
        `[out, in]`.
    """
    factor = torch.linalg.cholesky(inverse, upper=True)
    weight, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    size, columns = step * max(_BLOCK // step, 1), weight.shape[1]
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        errors = weight.new_zeros(len(weight), stop - start)
        for column in range(start, stop):
            if column % step == 0:
                some = slice(column, min(column + step, columns))
                gone[:, some] = choose(some, weight[:, some], factor.diagonal()[some])
            error = torch.where(gone[:, column], weight[:, column], 0) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight.masked_fill(gone, 0), gone
