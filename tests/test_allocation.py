"""Allocation: exact counts whatever the scores, floors and caps really enforced, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import unit_group as group
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import profile

from hf_prune.model.targets import Target
from hf_prune.model.units import UnitGroup, View
from hf_prune.pruning import selection
from hf_prune.pruning.allocation import allocate, most_removable
from hf_prune.pruning.selection import candidates, lowest

#: Ties, zeros of both signs, huge and tiny scores.
VALUES = [0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 3.5, 3.4e38, -3.4e38, 1e-45]
SCORES = st.lists(st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0]), st.floats(-5, 5, width=32)), min_size=1, max_size=24)


def mask(size: int, value: bool) -> st.SearchStrategy[list[bool]]:
    """Any mask of `size` units, now and then one of a single value."""
    return st.just([value] * size) | st.lists(st.booleans(), min_size=size, max_size=size)


def grid(rows: int, columns: int, n_of_m: tuple[int, int] | None = None) -> UnitGroup:
    """Single weights in rows."""
    target = Target("grid.weight", "grid", nn.Parameter(torch.ones(rows, columns)))
    return UnitGroup("grid", (View(target, 1, 1),), n_of_m=n_of_m)


def nothing(groups: list[UnitGroup]) -> list[Tensor]:
    return [torch.zeros(g.num_units, dtype=torch.bool) for g in groups]


@given(SCORES, st.integers(-1, 30))
def test_lowest_takes_exactly_so_many_of_the_lowest(scores: list[float], count: int) -> None:
    chosen = lowest(torch.tensor(scores), count)
    wanted = min(max(count, 0), len(scores))
    assert int(chosen.sum()) == wanted
    assert sorted(torch.tensor(scores)[chosen].tolist()) == sorted(torch.tensor(scores).tolist())[:wanted]


@pytest.mark.parametrize("kind", ["random", "few values", "sorted", "all equal", "infinite"])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.99])
def test_large_numbers_of_scores(kind: str, share: float) -> None:
    """Enough scores that the threshold is bracketed by a sample, including distributions that a sample says little about."""
    torch.manual_seed(0)
    scores = torch.randn(700_001)
    if kind == "few values":
        scores = scores.mul(2).round()
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "all equal":
        scores = torch.zeros_like(scores)
    elif kind == "infinite":
        scores[::2] = -torch.inf
        scores[1::4] = torch.inf
    count = max(int(share * scores.numel()), 1)
    chosen = lowest(scores, count)
    assert int(chosen.sum()) == count
    assert float(scores[chosen].max()) <= float(scores[~chosen].min())


def test_ties_are_spread_evenly() -> None:
    assert lowest(torch.zeros(12), 4).view(4, 3).sum(dim=1).tolist() == [1, 1, 1, 1]


@given(st.integers(1, 5), st.integers(2, 12), st.data())
def test_candidates_equal_a_brute_force_choice(cells: int, m: int, data: st.DataObject) -> None:
    n, size = data.draw(st.integers(1, m - 1)), cells * m
    scores = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)))
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    for given_gone in (None, gone):
        chosen, goes_first = candidates(scores, (n, m), given_gone), gone & (given_gone is not None)
        for cell in range(cells):
            part, first = (tensor[cell * m : (cell + 1) * m].tolist() for tensor in (scores, goes_first))
            wanted = sorted(range(m), key=lambda i: (-math.inf if first[i] else part[i], i))[:n]
            assert chosen[cell * m : (cell + 1) * m].nonzero().flatten().tolist() == sorted(wanted)


@pytest.mark.parametrize("sample", [1, 2**14])
@given(st.data())
def test_numpy_and_torch_choose_the_same_units(sample: int, data: st.DataObject) -> None:
    """The selection of the CPU beside that of other devices: ties, zeros of both signs, huge scores, units gone or not allowed."""
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    scores = [torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size))) for size in sizes]
    gone, allowed = ([torch.tensor(data.draw(mask(size, value))) for size in sizes] for value in (False, True))
    before = [tensor.clone() for tensor in (*scores, *gone, *allowed)]
    least = sum(int((away & may).sum()) for away, may in zip(gone, allowed))
    count = data.draw(st.integers(least, sum(sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SAMPLE", sample)
        chosen = torch.cat(selection.lowest_units(scores, gone, allowed, count))
    row = selection.ranked(scores, gone, allowed)
    wanted = selection.lowest_in_torch(row, count) if 0 < count < row.numel() else torch.full_like(chosen, bool(count))
    assert chosen.equal(wanted)
    assert all(one.equal(other) for one, other in zip((*scores, *gone, *allowed), before))


def test_wide_cells_are_not_compared_in_pairs() -> None:
    scores = torch.randint(9, (4, 96), generator=torch.Generator().manual_seed(0)).float().flatten()
    with profile() as seen:
        chosen = candidates(scores, (48, 96))
    assert sum(event.count for event in seen.key_averages()) < 100
    assert chosen.view(4, 96).sum(dim=1).tolist() == [48] * 4


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(["local", "global"]))
def test_exact_counts(scores: list[list[float]], sparsity: float, scope: str) -> None:
    groups = [group(str(i), len(values)) for i, values in enumerate(scores)]
    removed = allocate(groups, [torch.tensor(values) for values in scores], nothing(groups), sparsity, scope)
    if scope == "local":
        assert [int(gone.sum()) for gone in removed] == [round(sparsity * g.num_units) for g in groups]
    else:
        assert sum(int(gone.sum()) for gone in removed) == round(sparsity * sum(g.num_units for g in groups))


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["local", "global"]))
def test_what_is_gone_stays_gone(scores: list[list[float]], first: float, second: float, scope: str) -> None:
    groups = [group(str(i), len(values)) for i, values in enumerate(scores)]
    tensors = [torch.tensor(values) for values in scores]
    before = allocate(groups, tensors, nothing(groups), min(first, second), scope)
    after = allocate(groups, [-values for values in tensors], before, max(first, second), scope)
    for old, new in zip(before, after):
        assert bool((new | ~old).all())
    if scope == "global":
        assert sum(int(gone.sum()) for gone in after) == round(max(first, second) * sum(g.num_units for g in groups))


@given(st.lists(SCORES, min_size=2, max_size=4), st.floats(0.2, 0.6), st.floats(0, 0.2), st.floats(0.6, 1))
def test_floor_and_cap_hold_and_the_budget_is_spent(scores: list[list[float]], sparsity: float, floor: float, cap: float) -> None:
    groups = [group(str(i), len(values)) for i, values in enumerate(scores)]
    limits = {"floors": [floor] * len(groups), "caps": [cap] * len(groups)}
    removed = allocate(groups, [torch.tensor(v) for v in scores], nothing(groups), sparsity, "global", **limits)
    least = [round(floor * g.num_units) for g in groups]
    most = [max(most_removable(g, cap), low) for g, low in zip(groups, least)]
    counts = [int(gone.sum()) for gone in removed]
    for count, low, high in zip(counts, least, most):
        assert low <= count <= high
    wanted = round(sparsity * sum(g.num_units for g in groups))
    assert sum(counts) == min(max(wanted, sum(least)), sum(most))


@given(st.lists(st.tuples(SCORES, st.integers(1, 7)), min_size=2, max_size=4), st.floats(0, 1))
def test_units_of_different_size_meet_the_budget_within_one_unit(parts: list[tuple[list[float], int]], sparsity: float) -> None:
    groups = [group(str(i), len(values), size) for i, (values, size) in enumerate(parts)]
    removed = allocate(groups, [torch.tensor(values) for values, _ in parts], nothing(groups), sparsity, "global")
    spent = sum(int(gone.sum()) * g.unit_size for gone, g in zip(removed, groups))
    budget = sparsity * sum(g.num_units * g.unit_size for g in groups)
    assert abs(spent - budget) <= max(g.unit_size for g in groups)


@given(st.integers(1, 4), st.integers(0, 2**20), st.floats(0, 0.5), st.sampled_from(["local", "global"]))
def test_n_m_cells_are_never_overfull_while_sparsity_rises(cells: int, seed: int, sparsity: float, scope: str) -> None:
    torch.manual_seed(seed)
    groups = [group("a", cells * 4, n_of_m=(2, 4)), group("b", 8, n_of_m=(2, 4))]
    scores = [torch.randn(g.num_units) for g in groups]
    half = allocate(groups, scores, nothing(groups), sparsity / 2, scope)
    removed = allocate(groups, [torch.randn(g.num_units) for g in groups], half, sparsity, scope)
    final = allocate(groups, scores, removed, 0.5, scope)
    for old, new, last in zip(half, removed, final):
        assert bool((new | ~old).all())
        assert int(new.view(-1, 4).sum(dim=1).max()) <= 2
        assert last.view(-1, 4).sum(dim=1).unique().tolist() == [2]


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**20), st.floats(0, 0.5), st.floats(0, 0.5))
def test_under_scope_row_the_lowest_of_each_row_go(
    rows: int, cells: int, cell: bool, seed: int, first: float, second: float
) -> None:
    """Rows lose as many to within one unit, the group exactly its share; what is gone stays gone, and no cell is overfull."""
    units, (low, high) = grid(rows, 4 * cells, (2, 4) if cell else None), sorted([first, second])
    scores = torch.randint(6, (rows, 4 * cells), generator=torch.Generator().manual_seed(seed)).float()
    (before,) = allocate([units], [scores.flatten()], nothing([units]), low, "row")
    (fresh,) = allocate([units], [scores.flatten()], nothing([units]), high, "row")
    (after,) = allocate([units], [-scores.flatten()], [before], high, "row")
    assert bool((after | ~before).all())
    for gone, share in ((before, low), (fresh, high), (after, high)):
        counts = gone.view(rows, -1).sum(dim=1)
        assert int(counts.sum()) == round(share * units.num_units)
        assert int(counts.max() - counts.min()) <= 1
        assert not cell or int(gone.view(-1, 4).sum(dim=1).max()) <= 2
    for row, gone in zip(scores, fresh.view(rows, -1)):
        allowed = candidates(row, (2, 4)) if cell else torch.ones_like(gone)
        assert sorted(row[gone].tolist()) == sorted(row[allowed].tolist())[: int(gone.sum())]


def test_zero_scores_do_not_wipe_a_layer() -> None:
    groups = [group(str(i), 12) for i in range(6)]
    removed = allocate(groups, [torch.zeros(12)] * 6, nothing(groups), 0.5, "global", caps=[0.98] * 6)
    assert [int(gone.sum()) for gone in removed] == [6] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_name_their_module(bad: float) -> None:
    with pytest.raises(ValueError, match=r"'encoder\.layer\.3\.output\.dense'"):
        allocate(
            [group("encoder.layer.3.output.dense", 2)],
            [torch.tensor([1.0, bad])],
            [torch.zeros(2, dtype=torch.bool)],
            0.5,
            "global",
        )


def test_a_dear_unit_that_overshoots_gives_way_to_one_that_fits() -> None:
    groups = [group("dear", 2, size=10), group("cheap", 2, size=6)]
    removed = allocate(groups, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], nothing(groups), 0.12, "global")
    assert [gone.tolist() for gone in removed] == [[False, False], [True, False]]
    assert not any(gone.any() for gone in allocate(groups, [torch.ones(2), torch.ones(2)], nothing(groups), 0.0, "global"))
