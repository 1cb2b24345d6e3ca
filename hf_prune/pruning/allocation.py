"""Unit scores + budget → the units to remove. Counts are exact for any scores, with ties, zeros and locked units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.passes import count_nonzero
from ..model.units import UnitGroup
from ..settings.config import LOCAL_SCOPES
from .selection import candidates, lowest, lowest_in_rows, lowest_units, ranked

#: How many steps, in which dynamic programming counts costs, all groups cost together.
BUCKETS = 10_000
#: What sums of floating point numbers may be off by, relative to a budget.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Levels:
    """What a group of units costs at the sizes that it can have.

    Attributes:
        left: how many units are left, ascending, `[levels]`; the last is all of them.
        costs: what the group costs then, float64 `[levels]`.
    """

    left: Tensor
    costs: Tensor

    @classmethod
    def of(cls, costs: Mapping[int, float]) -> Levels:
        """Of costs by the number of units left."""
        left = sorted(costs)
        return cls(torch.tensor(left), torch.tensor([costs[number] for number in left], dtype=torch.float64))

    def in_units(self, number: int) -> Levels:
        """The same with `number` units in all, each several of the units here: those levels that are whole numbers of them."""
        size, rest = divmod(int(self.left[-1]), number)
        assert not rest
        whole = self.left % size == 0
        return Levels(self.left[whole] // size, self.costs[whole])

    def saving(self, share: float) -> Levels:
        """The same where units save this share of what they did when they go."""
        return Levels(self.left, (self.costs[-1] - share * (self.costs[-1] - self.costs)).clamp_min(0.0))

    def cost(self, left: int) -> float:
        """What so many units cost; between two levels on the line between them."""
        place = int(torch.searchsorted(self.left, left))
        if int(self.left[place]) == left or place == 0:
            return float(self.costs[place])
        (low, high), (cheap, dear) = self.left[place - 1 : place + 1].tolist(), self.costs[place - 1 : place + 1].tolist()
        return float(cheap + (dear - cheap) * (left - low) / (high - low))


def allocate(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    removed: Sequence[Tensor],
    sparsity: float,
    scope: str,
    costs: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
    caps: Sequence[float] | None = None,
    threshold: float | None = None,
    at_least: bool = False,
) -> list[Tensor]:
    """Choose the units to remove.

    Args:
        groups: the unit groups of one budget.
        scores: unit scores, `[units]` each; the lowest are removed first. Under `"global"`, scores per cost.
        removed: units already removed, bool `[units]` each; they stay removed.
        sparsity: share of the total cost to remove, in `[0, 1]`.
        scope: `"local"`: each group separately; `"row"`: each row of a group's units; `"global"`: all ranked together, counted in
            their costs; `"threshold"`: all units with scores of at most `threshold`, regardless of `sparsity`.
        costs: cost of one unit of each group; by default its number of weights.
        floors, caps: smallest and largest share of each group to remove, under `"global"` and `"threshold"`; by default none.
        at_least: under `"global"`, remove no less than the share, and no more than that by the cost of the cheapest removed unit.

    Returns:
        Bool `[units]` for each group. The number of units is the requested one to within one unit (of the group under `"local"` and
        `"row"`, of the largest size under `"global"`), and never less than the number already removed.

    Raises:
        ValueError: a score is NaN or infinite; names the group.
    """
    for group, score in zip(groups, scores):
        low, high = torch.aminmax(score)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"The scores of {group.name!r} hold NaN or infinite values; look at its weights and gradients.")
    costs = [group.unit_size for group in groups] if costs is None else costs
    floors = [0.0] * len(groups) if floors is None else floors
    caps = [1.0] * len(groups) if caps is None else caps
    if scope == "global":
        return _allocate_global(groups, scores, removed, sparsity, costs, floors, caps, at_least)
    chosen = []
    for group, score, gone, floor, cap in zip(groups, scores, removed, floors, caps):
        if scope in LOCAL_SCOPES:
            count = round(sparsity * group.num_units)
        else:
            assert threshold is not None
            below = count_nonzero((score <= threshold) | gone)
            count = min(max(below, least_removed(group, floor)), most_removable(group, cap))
        least = count_nonzero(gone)
        count = min(max(count, least), group.max_removable)
        if scope == "row":
            chosen.append(_lowest_of_each_row(group, score, gone, count))
        else:
            chosen += lowest_units([score], [gone], [_allowed(group, score, gone)], count)
    return chosen


def normalize(scores: Sequence[Tensor], how: str) -> list[Tensor]:
    """Make the scores of groups comparable: divide each by its mean absolute value or its L2 norm, or leave them (`"none"`)."""
    if how == "none":
        return list(scores)
    norms = [score.abs().mean() if how == "mean" else score.norm() for score in scores]
    return [score / norm if norm > 0 else score for score, norm in zip(scores, norms)]


def most_removable(group: UnitGroup, cap: float) -> int:
    """How many units of a group may be removed under a cap. For a group of one unit a cap has no meaning, so it may be removed."""
    return min(int(cap * group.num_units), group.max_removable) if group.num_units > 1 else 1


def least_removed(group: UnitGroup, floor: float) -> int:
    """How many units of a group must be removed under a floor: its share, rounded to the nearest unit."""
    return round(floor * group.num_units)


def _affordable(prices: Tensor, is_free: Tensor, slack: float) -> Tensor:
    """Which units of a ranking can stay after all, the best first, without costing more than what was taken too much.

    Args:
        prices: what they cost, lowest score first, `[n]`.
        is_free: which of them may stay, bool `[n]`.
        slack: how much was taken too much.
    """
    keep, cheapest = torch.zeros_like(is_free), float(prices.min()) if len(prices) else 0.0
    for place in reversed(range(len(prices))):
        if slack < cheapest:
            break
        if is_free[place] and prices[place] <= slack:
            keep[place] = True
            slack -= float(prices[place])
    return keep


def allocate_levels(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    removed: Sequence[Tensor],
    levels: Sequence[Levels],
    needed: float,
    floors: Sequence[float],
    caps: Sequence[float],
) -> list[Tensor]:
    """Choose a level for each group so that the scores of the units that go add up to the least, and the costs fit a budget.

    A knapsack by dynamic programming over costs in steps of which all groups together cost [`BUCKETS`], each cost rounded up, so
    that the budget is kept (as in SPDY, Frantar and Alistarh 2022, https://arxiv.org/abs/2201.13096, section 3.2).

    Args:
        groups, scores, removed, floors, caps: see [`allocate`].
        levels: of each group.
        needed: the cost that has to go.

    Returns:
        Bool `[units]` for each group: the units to remove. If nothing fits the budget, as much as may go.
    """
    total = sum(float(level.costs[-1]) for level in levels)
    step = total / BUCKETS or 1.0
    buckets = max(math.floor((total - needed) / step * (1 + _ROUNDING)), 0)
    best = torch.zeros(buckets + 1, dtype=torch.float64)
    orders, options, choices = [], [], []
    for group, score, gone, level, floor, cap in zip(groups, scores, removed, levels, floors, caps):
        order = score.double().masked_fill(gone, -torch.inf).argsort(stable=True)
        losses = torch.cat([best.new_zeros(1), score.double().masked_fill(gone, 0)[order].cumsum(0).cpu()])
        already = count_nonzero(gone)
        fewest, most = max(least_removed(group, floor), already), max(most_removable(group, cap), already)
        counts = {count for count in (group.num_units - level.left).tolist() if fewest <= count <= most} | {fewest}
        sizes = {count: math.ceil(level.cost(group.num_units - count) / step * (1 - _ROUNDING)) for count in sorted(counts)}
        totals = torch.full((len(sizes), buckets + 1), torch.inf, dtype=torch.float64)
        for row, (count, size) in zip(totals, sizes.items()):
            if size <= buckets:
                row[size:] = best[: buckets + 1 - size] + losses[count]
        best, choice = totals.min(dim=0)
        orders.append(order)
        options.append(list(sizes.items()))
        choices.append(choice)
    chosen, place, fits = [], buckets, bool(torch.isfinite(best[-1]))
    for group, order, sizes, choice in zip(reversed(groups), reversed(orders), reversed(options), reversed(choices)):
        count, size = sizes[int(choice[place])] if fits else min(sizes, key=lambda option: (option[1], -option[0]))
        place -= size if fits else 0
        chosen.append(torch.zeros(group.num_units, dtype=torch.bool, device=order.device).index_fill_(0, order[:count], True))
    return chosen[::-1]


def _allowed(group: UnitGroup, score: Tensor, gone: Tensor) -> Tensor | None:
    """The units that the pattern allows to remove, None for all."""
    return None if group.n_of_m is None else candidates(score, group.n_of_m, gone)


def _lowest_of_each_row(group: UnitGroup, score: Tensor, gone: Tensor, count: int) -> Tensor:
    """Mark the lowest units of each row, `count` in all; the first rows have one more where they do not divide it."""
    rows, _, columns, _ = group.weights[0].grid
    counts = torch.full((rows,), count // rows, device=score.device)
    counts[: count % rows] += 1
    grid = ranked([score], [gone], [_allowed(group, score, gone)]).view(rows, columns)
    return lowest_in_rows(grid, torch.maximum(counts, gone.view(rows, columns).sum(dim=1))).flatten()


def _allocate_global(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    removed: Sequence[Tensor],
    sparsity: float,
    costs: Sequence[float],
    floors: Sequence[float],
    caps: Sequence[float],
    at_least: bool,
) -> list[Tensor]:
    """Rank all units together; if that breaks a floor or a cap, force the floors, exclude units above the caps, and rank again."""
    numbers = [group.num_units for group in groups]
    budget = sparsity * sum(number * cost for number, cost in zip(numbers, costs))
    least = [max(least_removed(group, floor), count_nonzero(gone)) for group, gone, floor in zip(groups, removed, floors)]
    most = [max(most_removable(group, cap), count) for group, count, cap in zip(groups, least, caps)]
    allowed = [_allowed(group, score, gone) for group, score, gone in zip(groups, scores, removed)]
    if len(set(costs)) == 1:
        count = min(max(_units_for(budget, costs[0], at_least), sum(least)), sum(most))
        chosen = lowest_units(scores, removed, allowed, count)
    else:
        chosen = _lowest_for_budget(ranked(scores, removed, allowed), numbers, costs, budget, sum(least), sum(most), at_least)
    counts = [count_nonzero(units) for units in chosen]
    if all(low <= count <= high for low, count, high in zip(least, counts, most)):
        return chosen
    flat = ranked(scores, removed, allowed)
    for score, low, high in zip(flat.split(numbers), least, most):  # type: ignore[no-untyped-call]
        forced, within = lowest(score, low), lowest(score, high)
        score.masked_fill_(~within, torch.inf).masked_fill_(forced, -torch.inf)
    return _lowest_for_budget(flat, numbers, costs, budget, sum(least), sum(most), at_least)


def _units_for(budget: float, cost: float, at_least: bool) -> int:
    """How many units of a cost make up a budget."""
    return math.ceil(budget / cost * (1 - _ROUNDING)) if at_least else round(budget / cost)


def _lowest_for_budget(
    flat: Tensor, numbers: list[int], costs: Sequence[float], budget: float, least: int, most: int, at_least: bool
) -> list[Tensor]:
    """Mark the lowest units whose costs come nearest to the budget, between `least` and `most` units in all.

    Args:
        flat: the scores of all groups, concatenated, `[units]`.
        numbers, costs: the number of units of each group, and the cost of one of them.
    """
    if len(set(costs)) == 1:
        count = min(max(_units_for(budget, costs[0], at_least), least), most)
        return list(lowest(flat, count).split(numbers))  # type: ignore[no-untyped-call]
    # Units differ in cost: walk up the ranking until the budget is met. Ties are ordered by relative position in their group.
    positions = torch.cat([torch.arange(number, device=flat.device) / number for number in numbers])
    order = positions.argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]
    prices = torch.cat([torch.full((number,), cost) for number, cost in zip(numbers, costs)]).to(flat.device)
    spent = prices[order].double().cumsum(0)
    count = int(torch.searchsorted(spent, budget * (1 - _ROUNDING)))
    if count < spent.numel() and (at_least or spent[count] - budget <= prices[order[count]] / 2):
        count += 1
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if at_least:
        count = min(max(count, least), most)
        order = order[:count]
        keep = _affordable(prices[order], torch.isfinite(flat[order]), float(spent[count - 1]) - budget if count else 0.0)
        chosen[order[~keep]] = True
    elif max(count, least):
        chosen[order[: min(max(count, least), most)]] = True
    else:  # the first unit costs too much: take the first that is closer to the budget than none at all
        chosen[order[(prices[order] <= 2 * budget).nonzero().flatten()[: min(most, 1)]]] = budget > 0
    return list(chosen.split(numbers))  # type: ignore[no-untyped-call]
