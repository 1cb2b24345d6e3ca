"""Unit scores + budget → the units that go. Exact counts, whatever the scores: ties, zeros and locked units included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .units import UnitGroup


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest scores, spreading the choice evenly over the positions of ties. `[n]` → bool `[n]`."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    missing = count - int(chosen.sum())
    ties = (scores == threshold).nonzero().flatten()
    spread = torch.arange(missing, device=scores.device) * ties.numel() // missing
    chosen[ties[spread]] = True
    return chosen


def candidates(scores: Tensor, cell: tuple[int, int]) -> Tensor:
    """Mark the n lowest of every m neighbouring scores, the first of equals going first. `[k·m]` → bool `[k·m]`."""
    n, m = cell
    columns = scores.view(-1, m).unbind(dim=1)
    ranks = torch.zeros(scores.numel() // m, m, dtype=torch.uint8 if m < 256 else torch.int32, device=scores.device)
    for later in range(m):
        for earlier in range(later):
            goes_first = columns[earlier] <= columns[later]
            ranks[:, later] += goes_first
            ranks[:, earlier] += ~goes_first
    return (ranks < n).flatten()


def allocate(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    removed: Sequence[Tensor],
    sparsity: float,
    scope: str,
    floor: float = 0.0,
    cap: float = 1.0,
    threshold: float | None = None,
) -> list[Tensor]:
    """Choose the units that go.

    Args:
        groups: the unit groups of one rule.
        scores: unit scores, `[units]` each; the lowest go first.
        removed: units gone already, bool `[units]` each; they stay gone.
        sparsity: share of the weights that shall be gone, in `[0, 1]`.
        scope: `"local"`: each group by itself; `"global"`: all ranked together, counted in weights; `"threshold"`: whatever scores
            at most `threshold`, `sparsity` aside.
        floor, cap: least and largest share of a group that may be gone, under `"global"` and `"threshold"`.

    Returns:
        Bool `[units]` for each group. The number of units is the one asked for to within one unit (of the group under
        `"local"`, of the largest size under `"global"`), never less than what is removed already.

    Raises:
        ValueError: a score is NaN or infinite; names the group.
    """
    ranked = []
    for group, score, gone in zip(groups, scores, removed):
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"The scores of {group.name!r} hold NaN or infinite values; look at its weights and gradients.")
        ranked.append(score.masked_fill(gone, -torch.inf))
    if scope == "local":
        return [_lowest_in_group(group, score, round(sparsity * group.num_units)) for group, score in zip(groups, ranked)]
    if scope == "threshold":
        assert threshold is not None
        return [_below_threshold(group, score, threshold, floor, cap) for group, score in zip(groups, ranked)]
    return _allocate_global(groups, ranked, sparsity, floor, cap)


def normalize(scores: Sequence[Tensor], how: str) -> list[Tensor]:
    """Make the scores of groups comparable: divide each by its mean absolute value or its L2 norm, or leave them (`"none"`)."""
    if how == "none":
        return list(scores)
    norms = [score.abs().mean() if how == "mean" else score.norm() for score in scores]
    return [score / norm if norm > 0 else score for score, norm in zip(scores, norms)]


def _lowest_in_group(group: UnitGroup, scores: Tensor, count: int) -> Tensor:
    """The `count` lowest units of a group that its pattern lets go, never fewer than those removed already (score −inf)."""
    count = max(count, int((scores == -torch.inf).sum()))
    if group.cell is None:
        return lowest(scores, count)
    return lowest(scores.masked_fill(~candidates(scores, group.cell), torch.inf), min(count, group.max_removable))


def _below_threshold(group: UnitGroup, scores: Tensor, threshold: float, floor: float, cap: float) -> Tensor:
    """The units that score at most `threshold`, within the group's floor and cap."""
    count = max(int((scores <= threshold).sum()), round(floor * group.num_units))
    return _lowest_in_group(group, scores, min(count, most_removable(group, cap)))


def _allocate_global(
    groups: Sequence[UnitGroup], scores: Sequence[Tensor], sparsity: float, floor: float, cap: float
) -> list[Tensor]:
    """Take each group's floor, shut out what lies above its cap, and rank the rest together."""
    forced, ranked = [], []
    for group, score in zip(groups, scores):
        least = _lowest_in_group(group, score, round(floor * group.num_units))
        most = max(most_removable(group, cap), int(least.sum()))
        within = _lowest_in_group(group, score, most)
        forced.append(least)
        ranked.append(score.masked_fill(~within, torch.inf).masked_fill(least, -torch.inf))
    sizes = [group.unit_size for group in groups]
    budget = sparsity * sum(group.num_units * size for group, size in zip(groups, sizes))
    flat = torch.cat(ranked)
    least_total, most_total = int((flat == -torch.inf).sum()), int((flat != torch.inf).sum())
    if len(set(sizes)) == 1:
        chosen = lowest(flat, min(max(round(budget / sizes[0]), least_total), most_total))
    else:
        # Units differ in size: walk up the ranking until the budget is met. Ties go by relative position in their group.
        positions = torch.cat([torch.arange(group.num_units, device=flat.device) / group.num_units for group in groups])
        order = positions.argsort(stable=True)
        order = order[flat[order].argsort(stable=True)]
        weights = torch.cat([torch.full((group.num_units,), size) for group, size in zip(groups, sizes)]).to(flat.device)
        spent = weights[order].double().cumsum(0)
        count = int(torch.searchsorted(spent, budget))
        if count < spent.numel() and spent[count] - budget > weights[order[count]] / 2:
            count -= 1
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[order[: min(max(count + 1, least_total), most_total)]] = True
    return list(torch.split(chosen, [group.num_units for group in groups]))


def most_removable(group: UnitGroup, cap: float) -> int:
    """How many units of a group may go under a cap. Below one unit a cap has no meaning, so a single unit may go."""
    return min(int(cap * group.num_units), group.max_removable) if group.num_units > 1 else 1
