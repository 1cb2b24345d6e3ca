"""The maths of pruning without training, against slow and obvious references in float64."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_prune.model.targets import Target
from hf_prune.model.units import UnitGroup, View
from hf_prune.pruning.criteria.activations import kept_in_order
from hf_prune.pruning.reconstruction import Moments, aimed, damping, elimination, inverse, refit, sequential

PROBLEMS = st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(1e-3, 1.0))


def problem(sizes: tuple[int, int, int, int, float], importance: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Weight, inputs, targets, importance and damping; some inputs are dead, some hold outliers."""
    outputs, inputs, tokens, seed, share = sizes
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64)
    x[:, seed % inputs] *= [0, 1, 100][seed % 3]
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    a = torch.rand(tokens, dtype=torch.float64) if importance else torch.ones(tokens, dtype=torch.float64)
    return weight, x, x @ weight.T + torch.randn(tokens, outputs, dtype=torch.float64), a, damping(x.T @ x, share)


def energy(new: Tensor, weight: Tensor, x: Tensor, targets: Tensor, a: Tensor, damp: float) -> Tensor:
    """The objective as it is defined, token by token."""
    return (a[:, None] * (targets - x @ new.T) ** 2).sum() + damp * ((new - weight) ** 2).sum()


def least(weight: Tensor, x: Tensor, targets: Tensor, a: Tensor, damp: float, kept: Tensor) -> Tensor:
    """The weight of least energy, by `lstsq` over tokens and one more row for each weight that is pulled."""
    root = a.sqrt()[:, None]
    rows = torch.cat([(root * x)[:, kept], damp**0.5 * torch.eye(len(kept), dtype=x.dtype)[kept][:, kept]])
    wanted = torch.cat([root * targets, damp**0.5 * weight[:, kept].T])
    new = torch.zeros_like(weight)
    new[:, kept] = torch.linalg.lstsq(rows, wanted).solution.T
    return new


def moments_of(x: Tensor, targets: Tensor, a: Tensor | None = None) -> Moments:
    moments = Moments.zeros(targets.shape[1], x.shape[1])
    for part in range(0, len(x), 7):
        moments.add(x[part : part + 7], targets[part : part + 7], None if a is None else a[part : part + 7])
    return moments


@settings(max_examples=60, deadline=None)
@given(PROBLEMS, st.booleans(), st.data())
def test_refit_is_the_least_squares_solution(sizes: tuple[int, int, int, int, float], important: bool, data: st.DataObject) -> None:
    weight, x, targets, a, damp = problem(sizes, important)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.shape[1], max_size=x.shape[1])))
    moments = moments_of(x, targets, a if important else None)
    solved, reference = refit(weight, moments, kept, damp), least(weight, x, targets, a, damp, kept)
    assert not solved[:, ~kept].any()
    found, best = (energy(new, weight, x, targets, a, damp) for new in (solved, reference))
    assert found <= best * (1 + 1e-9) + 1e-9
    torch.testing.assert_close(moments.errors(solved), (a[:, None] * (targets - x @ solved.T) ** 2).sum(0), rtol=1e-6, atol=1e-6)
    assert moments.tokens == len(x)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_with_all_columns_only_the_target_moves_a_weight(sizes: tuple[int, int, int, int, float]) -> None:
    weight, x, targets, _, damp = problem(sizes)
    moments, everything = moments_of(x, targets), torch.ones(x.shape[1], dtype=torch.bool)
    inverted = inverse(moments.inputs, damp)
    torch.testing.assert_close(aimed(weight, moments, inverted), refit(weight, moments, everything, damp), rtol=1e-6, atol=1e-6)
    assert torch.equal(aimed(weight, moments.without_target(weight), inverted), weight)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS, st.integers(1, 3))
def test_elimination_is_greedy_refitting(sizes: tuple[int, int, int, int, float], width: int) -> None:
    """Each step takes the unit after whose loss refitting leaves the least energy, and costs what refitting costs."""
    outputs, number, *others = sizes
    weight, x, targets, a, damp = problem((outputs, number * width + 1, *others))
    columns = torch.randperm(number * width + 1, generator=torch.Generator().manual_seed(sizes[3]))
    units = columns[: number * width].view(number, width)  # the last column never goes, and units lie anywhere
    moments, everything = moments_of(x, targets), torch.ones(x.shape[1], dtype=torch.bool)
    full = refit(weight, moments, everything, damp)
    order, rises = elimination(full, inverse(moments.inputs, damp), units, number)
    kept, before = everything.clone(), energy(full, weight, x, targets, a, damp)
    assert sorted(order.tolist()) == list(range(number))
    for unit, rise in zip(order, rises):
        after = {}
        for other in (other for other in range(number) if kept[units[other]].all()):
            trial = kept.clone()
            trial[units[other]] = False
            after[other] = energy(least(weight, x, targets, a, damp, trial), weight, x, targets, a, damp)
        best = min(after.values())
        torch.testing.assert_close(after[int(unit)], best, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rise, after[int(unit)] - before, rtol=1e-5, atol=1e-5 * float(best))
        kept[units[unit]] = False
        before = after[int(unit)]


def test_elimination_in_blocks_is_elimination_step_by_step() -> None:
    """More columns than are eliminated between two products."""
    weight, x, targets, _, damp = problem((6, 200, 900, 1, 0.01))
    moments = moments_of(x, targets)
    full, inverted = refit(weight, moments, torch.ones(200, dtype=torch.bool), damp), inverse(moments.inputs, damp)
    order, rises = elimination(full, inverted, torch.arange(199)[:, None], 199)
    kept, now = torch.ones(200, dtype=torch.bool), full
    for unit, rise in zip(order, rises):
        left = inverse(moments.inputs[kept][:, kept], damp)
        costs = torch.full((200,), torch.inf, dtype=torch.float64)
        costs[kept] = now[:, kept].square().sum(dim=0) / left.diagonal()
        costs[199] = torch.inf
        torch.testing.assert_close(rise, costs.min(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(costs[unit], costs.min(), rtol=1e-6, atol=1e-9)
        kept[unit] = False
        now = refit(weight, moments, kept, damp)


@settings(max_examples=60, deadline=None)
@given(PROBLEMS, st.data())
def test_sequential_is_obs_restricted_to_the_columns_to_the_right(
    sizes: tuple[int, int, int, int, float], data: st.DataObject
) -> None:
    weight, x, _, _, damp = problem(sizes)
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=weight.numel(), max_size=weight.numel()))).view_as(weight)
    hessian = x.T @ x + damp * torch.eye(x.shape[1], dtype=x.dtype)
    found, went = sequential(weight, inverse(x.T @ x, damp), lambda columns, *_: gone[:, columns])
    assert torch.equal(went, gone)
    expected = weight.clone()
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            if gone[row, column]:  # what is least when this weight becomes zero and only those to the right may move
                right = hessian[column:, column:]
                left = torch.linalg.inv(right)
                expected[row, column:] -= expected[row, column] / left[0, 0] * left[0]
                expected[row, column] = 0
    assert not found[gone].any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [64, 150])
def test_sequential_crosses_its_blocks(size: int) -> None:
    """A weight moves for what goes in an earlier block of columns as within its own."""
    weight, x, _, _, damp = problem((3, size, 400, 1, 0.01))
    gone = torch.rand(3, size, generator=torch.Generator().manual_seed(0)) < 0.5
    inverted = inverse(x.T @ x, damp)
    factor, expected = torch.linalg.cholesky(inverted, upper=True), weight.clone()
    for column in range(size):
        error = torch.where(gone[:, column], expected[:, column], 0) / factor[column, column]
        expected[:, column:] -= error[:, None] * factor[column, column:]
    found, _ = sequential(weight, inverted, lambda columns, *_: gone[:, columns])
    torch.testing.assert_close(found, expected.masked_fill(gone, 0))


@settings(max_examples=60, deadline=None)
@given(PROBLEMS, st.sampled_from(["1x1", "2:4", "1:3", "2x1", "1x2"]), st.floats(0, 1), st.booleans())
def test_what_goes_in_order_costs_least_by_then(
    sizes: tuple[int, int, int, int, float], pattern: str, share: float, with_others: bool
) -> None:
    """The choice of SparseGPT, step by step: columns to the left are done, those to the right have made up for them."""
    outputs, blocks, *rest = sizes
    (n, m), is_n_of_m = map(int, re.split("[x:]", pattern)), ":" in pattern
    height, width, step = (1, 1, m) if is_n_of_m else (n, m, 128 // m * m)
    rows, columns = outputs * height, blocks * step if is_n_of_m else blocks * width
    weight, x, _, _, damp = problem((rows, columns + 1, *rest))  # the last column, as a bias, never goes
    target = Target("w", "", torch.nn.Parameter(weight[:, :-1]))
    group = UnitGroup("", (View(target, height, width),), n_of_m=(n, m) if is_n_of_m else None)
    others = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2 * with_others
    others[:, columns] = False
    number = int(share * group.max_removable)
    kept = kept_in_order(group.weights[0], group.n_of_m, weight, inverse(x.T @ x, damp), number, others)
    assert int((~kept).sum()) == number

    hessian, now, gone = x.T @ x + damp * torch.eye(len(x.T), dtype=x.dtype), weight.clone(), others.clone()
    for column in range(columns):
        if column % step == 0:
            stop = min(column + step, columns)
            squares = torch.stack([now[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, stop)], dim=1)
            costs = squares.masked_fill(others[:, column:stop], 0).view(outputs, height, -1, width).sum(dim=(1, 3))
            mine = kept.view(outputs, -1)[:, column // width : stop // width]
            for row, stays in zip(costs, mine) if is_n_of_m else [(costs.flatten(), mine.flatten())]:
                if (~stays).any() and stays.any() and (not is_n_of_m or int((~stays).sum()) == n):
                    assert row[~stays].max() <= row[stays].min() * (1 + 1e-6) + 1e-12
            gone[:, column:stop] |= (~mine).repeat_interleave(height, 0).repeat_interleave(width, 1)
        for row in range(rows):
            if gone[row, column]:
                left = torch.linalg.inv(hessian[column:, column:])
                now[row, column:] -= now[row, column] / left[0, 0] * left[0]


def test_float32_is_close_to_float64() -> None:
    """The bound that the documentation states: 1e-4 of the output for a well damped problem."""
    weight, x, targets, _, damp = problem((8, 60, 500, 1, 0.01))
    moments = moments_of(x, targets)
    single = Moments(moments.inputs.float(), moments.cross.float(), moments.targets.float(), moments.tokens)
    kept = torch.arange(60) % 3 > 0
    precise, rough = refit(weight, moments, kept, damp), refit(weight.float(), single, kept, damp)
    assert (x @ (precise - rough.double()).T).norm() <= 1e-4 * (x @ precise.T).norm()


def test_moments_have_what_a_weight_gives_as_their_target() -> None:
    weight, x, targets, _, _ = problem((3, 5, 20, 1, 0.1))
    own = moments_of(x, targets).without_target(weight)
    expected = moments_of(x, x @ weight.T)
    for found, wanted in ((own.cross, expected.cross), (own.targets, expected.targets)):
        torch.testing.assert_close(found, wanted)
