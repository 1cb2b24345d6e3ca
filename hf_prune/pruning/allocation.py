"""Unit scores + budget → the units that go. Exact counts, whatever the scores: ties, zeros and locked units included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.units import UnitGroup

#: How many scores are sampled to bracket a threshold.
_SAMPLE = 2**14
#: Up to how many neighbours it is faster to compare them in pairs than to sort them.
_PAIRWISE = 8


def _bracket(scores: Tensor, k: int) -> tuple[Tensor, int]:
    """Some of the scores that hold the k-th lowest and all equal to it, and how many of the others are lower.

    A sorted sample says between which values the k-th lowest lies, so that selection need not look at all of them.
    """
    if scores.numel() > 16 * _SAMPLE:
        sample = scores[:: scores.numel() // _SAMPLE].sort().values
        place, margin = k * sample.numel() // scores.numel(), 4 * math.isqrt(sample.numel())
        low, high = sample[max(place - margin, 0)], sample[min(place + margin, sample.numel() - 1)]
        lower = scores < low
        below = int(torch.count_nonzero(lower))
        inside = scores[(scores <= high) ^ lower]
        if below < k <= below + inside.numel():
            return inside, below
    return scores, 0


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest scores, spreading the choice evenly over the positions of ties. `[n]` → bool `[n]`."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    inside, below = _bracket(scores, count)
    threshold = inside.kthvalue(count - below).values
    missing = count - below - int(torch.count_nonzero(inside < threshold))
    if missing == int(torch.count_nonzero(inside == threshold)):
        return scores <= threshold
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    spread = torch.arange(missing, device=scores.device) * ties.numel() // missing
    chosen[ties[spread]] = True
    return chosen


def candidates(scores: Tensor, n_of_m: tuple[int, int]) -> Tensor:
    """Mark the n lowest of every m neighbouring scores, the first of equals going first. `[k·m]` → bool `[k·m]`."""
    n, m = n_of_m
    if m > _PAIRWISE:
        chosen = torch.zeros_like(scores, dtype=torch.bool).view(-1, m)
        order = scores.view(-1, m).argsort(dim=1, stable=True)
        return chosen.scatter_(1, order[:, :n], True).flatten()
    columns = scores.view(-1, m).unbind(dim=1)
    # The rank of a score is the number of others that go before it; comparing each pair once settles both sides.
    ranks = torch.zeros(m, scores.numel() // m, dtype=torch.uint8, device=scores.device)
    for later in range(m):
        for earlier in range(later):
            goes_first = columns[earlier] <= columns[later]
            ranks[later] += goes_first.to(ranks.dtype)
            ranks[earlier] += goes_first.logical_not_().to(ranks.dtype)
    return (ranks < n).T.reshape(-1)


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
) -> list[Tensor]:
    """Choose the units that go.

    Args:
        groups: the unit groups of one budget.
        scores: unit scores, `[units]` each; the lowest go first. Under `"global"`, scores per cost.
        removed: units gone already, bool `[units]` each; they stay gone.
        sparsity: share of the cost of all units that shall be gone, in `[0, 1]`.
        scope: `"local"`: each group by itself; `"global"`: all ranked together, counted in their costs; `"threshold"`: whatever
            scores at most `threshold`, `sparsity` aside.
        costs: what a unit of each group costs; by default the weights it holds.
        floors, caps: least and largest share of each group that may be gone, under `"global"` and `"threshold"`; by default none.

    Returns:
        Bool `[units]` for each group. The number of units is the one asked for to within one unit (of the group under
        `"local"`, of the largest size under `"global"`), never less than what is removed already.

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
        return _allocate_global(groups, scores, removed, sparsity, costs, floors, caps)
    chosen = []
    for group, score, gone, floor, cap in zip(groups, scores, removed, floors, caps):
        if scope == "local":
            count = round(sparsity * group.num_units)
        else:
            assert threshold is not None
            below = int(torch.count_nonzero((score <= threshold) | gone))
            count = min(max(below, least_removed(group, floor)), most_removable(group, cap))
        least = int(torch.count_nonzero(gone))
        chosen.append(_lowest_in_group(group, score.masked_fill(gone, -torch.inf), max(count, least)))
    return chosen


def normalize(scores: Sequence[Tensor], how: str) -> list[Tensor]:
    """Make the scores of groups comparable: divide each by its mean absolute value or its L2 norm, or leave them (`"none"`)."""
    if how == "none":
        return list(scores)
    norms = [score.abs().mean() if how == "mean" else score.norm() for score in scores]
    return [score / norm if norm > 0 else score for score, norm in zip(scores, norms)]


def most_removable(group: UnitGroup, cap: float) -> int:
    """How many units of a group may go under a cap. Below one unit a cap has no meaning, so a single unit may go."""
    return min(int(cap * group.num_units), group.max_removable) if group.num_units > 1 else 1


def least_removed(group: UnitGroup, floor: float) -> int:
    """How many units of a group have to go under a floor: its share to the nearest unit."""
    return round(floor * group.num_units)


def _lowest_in_group(group: UnitGroup, scores: Tensor, count: int) -> Tensor:
    """The `count` lowest units of a group, or as many of them as its pattern lets go. Changes `scores`."""
    if group.n_of_m is None:
        return lowest(scores, count)
    allowed = candidates(scores, group.n_of_m)
    if count >= group.max_removable:
        return allowed
    return lowest(scores.masked_fill_(~allowed, torch.inf), count)


def _allocate_global(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    removed: Sequence[Tensor],
    sparsity: float,
    costs: Sequence[float],
    floors: Sequence[float],
    caps: Sequence[float],
) -> list[Tensor]:
    """Rank all units together; where that breaks a floor or a cap, take the floors, shut out what is above the caps, rank again."""
    flat = torch.cat(list(scores)).masked_fill_(torch.cat(list(removed)), -torch.inf)
    numbers = [group.num_units for group in groups]
    least = [
        max(least_removed(group, floor), int(torch.count_nonzero(gone))) for group, gone, floor in zip(groups, removed, floors)
    ]
    most = [max(most_removable(group, cap), count) for group, count, cap in zip(groups, least, caps)]
    ranked = flat.split(numbers)  # type: ignore[no-untyped-call]
    for group, score in zip(groups, ranked):
        if group.n_of_m is not None:
            score.masked_fill_(~candidates(score, group.n_of_m), torch.inf)
    chosen = _lowest_for_budget(groups, flat, sparsity, costs, sum(least), sum(most)).split(numbers)  # type: ignore[no-untyped-call]
    counts = [int(torch.count_nonzero(units)) for units in chosen]
    if all(low <= count <= high for low, count, high in zip(least, counts, most)):
        return list(chosen)
    for score, low, high in zip(ranked, least, most):
        forced, within = lowest(score, low), lowest(score, high)
        score.masked_fill_(~within, torch.inf).masked_fill_(forced, -torch.inf)
    return list(_lowest_for_budget(groups, flat, sparsity, costs, sum(least), sum(most)).split(numbers))  # type: ignore[no-untyped-call]


def _lowest_for_budget(
    groups: Sequence[UnitGroup], flat: Tensor, sparsity: float, costs: Sequence[float], least: int, most: int
) -> Tensor:
    """Mark the lowest units whose costs come nearest to the requested share, between `least` and `most` units in all."""
    budget = sparsity * sum(group.num_units * cost for group, cost in zip(groups, costs))
    if len(set(costs)) == 1:
        return lowest(flat, min(max(round(budget / costs[0]), least), most))
    # Units differ in cost: walk up the ranking until the budget is met. Ties go by relative position in their group.
    positions = torch.cat([torch.arange(group.num_units, device=flat.device) / group.num_units for group in groups])
    order = positions.argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]
    prices = torch.cat([torch.full((group.num_units,), cost) for group, cost in zip(groups, costs)]).to(flat.device)
    spent = prices[order].double().cumsum(0)
    count = int(torch.searchsorted(spent, budget))
    if count < spent.numel() and spent[count] - budget <= prices[order[count]] / 2:
        count += 1
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if not max(count, least):  # the first in line is too dear: the first that comes nearer to the budget than nothing does
        chosen[order[(prices[order] <= 2 * budget).nonzero().flatten()[: min(most, 1)]]] = budget > 0
        return chosen
    chosen[order[: min(max(count, least), most)]] = True
    return chosen
