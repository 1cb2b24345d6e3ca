"""Selecting the lowest scores: an exact number of them, ties spread evenly, or the n lowest of every m neighbours.

A mask update ranks every unit of a model, up to one per weight, and this is most of its cost. On the CPU numpy does it, which
partitions and compares several times faster than torch; on other devices torch does. Both choose the same units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: How many scores are sampled to bracket a threshold.
_SAMPLE = 2**14
#: Up to this many neighbours, comparing them in pairs is faster than sorting them.
_PAIRWISE = 8
#: Numbers of neighbours that fit into one integer, one byte each.
_LANES = (2, 4, 8)

Scores = NDArray[Any]
Mask = NDArray[np.bool_]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest scores, spreading the choice evenly over the positions of ties. `[n]` → bool `[n]`."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        (chosen,) = _lowest_arrays([_array(scores)], [np.ones(scores.numel(), np.bool_)], count)
        return torch.from_numpy(chosen)
    return lowest_in_torch(scores, count)


def lowest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the lowest scores of each row; of equal ones, the first. `[rows, n]`, and how many of each row → bool `[rows, n]`."""
    places = torch.arange(scores.shape[1], device=scores.device)
    marked = torch.zeros_like(scores, dtype=torch.bool)
    return marked.scatter_(1, scores.argsort(dim=1, stable=True), places < counts[:, None])


def lowest_units(scores: Sequence[Tensor], gone: Sequence[Tensor], allowed: Sequence[Tensor | None], count: int) -> list[Tensor]:
    """The `count` lowest of all scores together, as [`lowest`] marks them: removed units first, those not allowed last.

    Args:
        scores: finite, `[units]` each.
        gone: units already removed, bool `[units]` each.
        allowed: units that may be removed, bool `[units]`, or None for all, for each.
        count: how many units to mark, those already removed included.

    Returns:
        Bool `[units]` for each.
    """
    if all(score.device.type == "cpu" for score in scores):
        taken = [away if may is None else away & may for away, may in zip(gone, allowed)]
        alive = [(~away if may is None else may & ~away).numpy() for away, may in zip(gone, allowed)]
        more, most = count - sum(_count(away.numpy()) for away in taken), sum(map(_count, alive))
        if 0 <= more <= most:
            chosen = alive if more == most else _lowest_arrays([_array(score) for score in scores], alive, more) if more else taken
            return [torch.as_tensor(goes) | away for goes, away in zip(chosen, taken)]
    return list(lowest(ranked(scores, gone, allowed), count).split([score.numel() for score in scores]))  # type: ignore[no-untyped-call]


def ranked(scores: Sequence[Tensor], gone: Sequence[Tensor], allowed: Sequence[Tensor | None]) -> Tensor:
    """All scores concatenated, -∞ for units already removed and +∞ for those not allowed. `[units]` each → `[all units]`."""
    row = torch.cat(list(scores)).masked_fill_(torch.cat(list(gone)), -torch.inf)
    for score, may in zip(row.split([score.numel() for score in scores]), allowed):  # type: ignore[no-untyped-call]
        if may is not None:
            score.masked_fill_(~may, torch.inf)
    return row


def candidates(scores: Tensor, n_of_m: tuple[int, int], gone: Tensor | None = None) -> Tensor:
    """Mark the n lowest of every m neighbouring scores; of equal ones, the first. `[k·m]` → bool `[k·m]`.

    Args:
        scores: `[k·m]`.
        n_of_m: `(n, m)`.
        gone: units already removed, which are marked first, bool `[k·m]`.
    """
    n, m = n_of_m
    if scores.device.type == "cpu" and m in _LANES:
        return torch.from_numpy(_candidates_in_lanes(_array(scores), n, m, None if gone is None else gone.numpy()))
    if gone is not None:
        scores = scores.masked_fill(gone, -torch.inf)
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


# ------------------------------------------------------------------------------------------------------------------------ torch


def lowest_in_torch(scores: Tensor, count: int) -> Tensor:
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


def _bracket(scores: Tensor, k: int) -> tuple[Tensor, int]:
    """A subset of the scores that contains the k-th lowest and all equal to it, and how many scores below it are left out.

    A sorted sample brackets the k-th lowest, so that selection does not have to look at all scores.
    """
    if scores.numel() > 16 * _SAMPLE:
        sample = scores[:: scores.numel() // _SAMPLE].sort().values
        low, high = (sample[place] for place in _places(k, scores.numel(), sample.numel()))
        lower = scores < low
        below = int(torch.count_nonzero(lower))
        inside = scores[(scores <= high) ^ lower]
        if below < k <= below + inside.numel():
            return inside, below
    return scores, 0


def _places(k: int, total: int, sampled: int) -> tuple[int, int]:
    """The positions of a sorted sample between which the k-th lowest of all scores very likely lies."""
    place, margin = k * sampled // total, 4 * math.isqrt(sampled)
    return max(place - margin, 0), min(place + margin, sampled - 1)


# ------------------------------------------------------------------------------------------------------------------------ numpy


def _array(scores: Tensor) -> Scores:
    """The scores as a numpy array."""
    return (scores.float() if scores.dtype == torch.bfloat16 else scores).detach().numpy()


def _count(mask: Mask) -> int:
    return int(np.count_nonzero(mask))


def _lowest_arrays(scores: Sequence[Scores], alive: Sequence[Mask], count: int) -> list[Mask]:
    """Mark the `count` lowest of the living scores, at least 1 and not all of them; see [`lowest`]."""
    inside, below = _bracket_arrays(scores, alive, count)
    threshold = np.partition(inside, count - below - 1)[count - below - 1]
    missing = count - below - _count(inside < threshold)
    if missing == _count(inside == threshold):
        return [(score <= threshold) & living for score, living in zip(scores, alive)]
    chosen = [(score < threshold) & living for score, living in zip(scores, alive)]
    ties = [np.flatnonzero((score == threshold) & living) for score, living in zip(scores, alive)]
    spread = np.arange(missing) * sum(map(len, ties)) // missing
    start = 0
    for goes, tied in zip(chosen, ties):
        goes[tied[spread[(spread >= start) & (spread < start + len(tied))] - start]] = True
        start += len(tied)
    return chosen


def _bracket_arrays(scores: Sequence[Scores], alive: Sequence[Mask], k: int) -> tuple[Scores, int]:
    """Like [`_bracket`], for the living scores only."""
    total = sum(map(_count, alive))
    if total > 16 * _SAMPLE:
        step = total // _SAMPLE | 1  # odd, so that it does not meet the same columns of a matrix again and again
        sample = np.sort(np.concatenate([score[::step][living[::step]] for score, living in zip(scores, alive)]))
        low, high = (sample[place] for place in _places(k, total, len(sample))) if len(sample) else (-np.inf, np.inf)
        below, inside = 0, []
        for score, living in zip(scores, alive):
            lower = (score < low) & living
            below += _count(lower)
            inside.append(score[((score <= high) & living) ^ lower])
        if below < k <= below + sum(map(len, inside)):
            return np.concatenate(inside), below
    return np.concatenate([score[living] for score, living in zip(scores, alive)]), 0


def _candidates_in_lanes(scores: Scores, n: int, m: int, gone: Mask | None) -> Mask:
    """Like [`candidates`], with the m neighbours side by side in the bytes of one integer.

    The rank of a score is the number of others that go before it. One that goes before another, `shift` places to the right, takes
    one from its own rank, which starts at the number of those to its right, and adds one to that of the other.
    """
    word = np.dtype(f"<u{m}")
    ranks = np.full(scores.size // m, sum(m - 1 - lane << 8 * lane for lane in range(m)), word)
    goes_first, alive = np.zeros(scores.size, np.bool_), None if gone is None else ~gone
    for shift in range(1, m):
        pairs = goes_first[:-shift]
        np.less_equal(scores[:-shift], scores[shift:], out=pairs)
        if gone is not None and alive is not None:
            pairs &= alive[shift:]
            pairs |= gone[:-shift]
        lanes = goes_first.view(word) & word.type(sum(1 << 8 * lane for lane in range(m - shift)))
        lanes *= word.type((1 << 8 * shift) - 1)
        ranks += lanes
    return ranks.view(np.uint8) < n
