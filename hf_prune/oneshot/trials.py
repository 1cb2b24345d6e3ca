"""What a model loses with a unit, tried out: units are taken away, one at a time or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..model.units import UnitGroup
from ..pruning.rules import Rule
from .sensitivity import Prediction, divergence, predictions
from .walk import Rows

Unit = TypeVar("Unit", bound=Hashable)
#: The fewest rows on which a unit is tried out.
_FEWEST_ROWS = 2
#: What a unit costs at least, and by which factor at least costs rise from one unit that goes to the next.
_LEAST, _RISE = 1e-9, 1 + 1e-4


def absences(units: Sequence[Unit], loss: Callable[[Collection[Unit]], float]) -> dict[Unit, float]:
    """What each unit costs that goes alone.

    Args:
        units: those that may go.
        loss: of the model without some units; 0 without none.
    """
    return {unit: loss([unit]) for unit in units}


def greedy_absences(
    units: Sequence[Unit], loss: Callable[[Collection[Unit]], float], number: int | None = None
) -> tuple[list[Unit], dict[Unit, float]]:
    """Let units go one after the other, each time the one without which the loss is least (SLEB, Song et al. 2024,
    https://arxiv.org/abs/2402.09025, algorithm 1).

    Args:
        units, loss: see [`absences`].
        number: how many go. By default all but one.

    Returns:
        Those that go, in order, and what each unit adds to the loss; of units that stay, what they would have added next. Costs
        rise from one to the next, so that an allocation by cost takes units in this order.
    """
    gone: list[Unit] = []
    costs: dict[Unit, float] = {}
    before, least = 0.0, _LEAST
    for _ in range(len(units) - 1 if number is None else number):
        losses = {unit: loss([*gone, unit]) for unit in units if unit not in gone}
        best = min(losses, key=lambda unit: losses[unit])
        costs |= {unit: max(after - before, least) for unit, after in losses.items()}
        gone.append(best)
        before, least = losses[best], costs[best] * _RISE
        costs |= {unit: max(cost, least) for unit, cost in costs.items() if unit not in gone}
    return gone, costs


def probe_of(rows: Rows, units: int) -> Rows:
    """Rows to try units out on: all trials of as many units together take about as many rows as there are."""
    return rows.some(max(rows.number // max(units, 1), _FEWEST_ROWS))


@torch.no_grad()
def score_absences(model: torch.nn.Module, rules: Sequence[Rule], rows: Rows) -> None:
    """Let criteria that score the absence of units know what each costs, in nats of divergence from the dense model."""
    for rule in rules:
        places = [(group, unit) for group in rule.groups for unit in range(group.num_units)]
        probe = probe_of(rows, len(places))
        dense = predictions(model, probe)

        def loss(gone: Collection[tuple[UnitGroup, int]], probe: Rows = probe, dense: Sequence[Prediction] = dense) -> float:
            with _without(gone):
                return divergence(model, probe, dense) or 0.0

        if rule.criterion.in_turn:
            share = rule.settings.sparsity
            costs = greedy_absences(places, loss, max(round(share * len(places)), 1) if share else None)[1]
        else:
            costs = absences(places, loss)
        for group in rule.groups:
            values = [costs[group, unit] for unit in range(group.num_units)]
            rule.criterion.state[group.name] = torch.tensor(values, device=group.device)


@contextmanager
def _without(gone: Collection[tuple[UnitGroup, int]]) -> Iterator[None]:
    """Inside, units are zero."""
    kept: dict[UnitGroup, Tensor] = {}
    for group, unit in gone:
        kept.setdefault(group, torch.ones(group.num_units, dtype=torch.bool, device=group.device))[unit] = False
    parameters = {id(view.target.parameter): view.target.parameter for group in kept for view in (*group.weights, *group.biases)}
    values = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    try:
        for group, stay in kept.items():
            group.apply(stay)
        yield
    finally:
        for parameter, value in values:
            parameter.copy_(value)
