"""What a pruner will do, module by module and step by step, and what `condense` will remove, reported in advance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from ..measure.tables import as_text, table_of_modules
from ..model.units import UnitGroup
from ..settings.config import LOCAL_SCOPES
from .allocation import least_removed, most_removable
from .budget import Budget
from .rules import Rule


@dataclass(frozen=True)
class PlannedGroup:
    """The effective settings of one module or block.

    `sparsity` is the final one: its own target under local scope; under global scope that of all modules of the budget together,
    each between `min_sparsity` and `max_sparsity`. `budget` names the rules that share it; `is_open` tells whether the rule has no
    target of its own. `units_left` are the smallest and the largest number of units that can be left at the end: equal under local
    scope, while under the others scores decide; `condense` removes the other units if the pattern `is_condensable`.
    """

    name: str
    rule: str
    budget: str
    is_open: bool
    pattern: str
    is_condensable: bool
    criterion: str
    scope: str
    schedule: str
    units: int
    weights: int
    sparsity: float | None
    min_sparsity: float
    max_sparsity: float
    units_left: tuple[int, int]

    @property
    def target(self) -> str:
        """The target of its rule in words, and whose it is."""
        if self.sparsity is None:
            return "by score"
        shared = "the config's" if self.rule == self.budget else f"shared by {self.budget}"
        return f"{self.sparsity:.1%}, {shared if self.is_open else 'its own'}"


@dataclass(frozen=True)
class PlannedRule:
    """The schedule of a rule, in optimizer steps of the run.

    Attributes:
        name: `"rules[0]"` and so on, or `"config"`.
        schedule: how sparsity rises.
        steps: steps of the run.
        warmup: steps before pruning may begin.
        first_update, last_update: the steps after which masks change for the first and the last time; 0 if they never do.
        updates: number of mask updates.
        recovery: steps after the last update.
        concerns: warnings about settings that are allowed but perhaps not intended.
    """

    name: str
    schedule: str
    steps: int
    warmup: int
    first_update: int
    last_update: int
    updates: int
    recovery: int
    concerns: tuple[str, ...]


@dataclass(frozen=True)
class PruningPlan:
    """What will be pruned and when, what is left out with its reason, and what condensing saves. Prints as tables.

    Attributes:
        groups: the modules and blocks.
        left_out: module or block → reason.
        rules: the schedules of the rules.
        parameters: number of parameters of the pruned modules.
        condensed_parameters: about how many of them are left after `condense`; zeros that it cannot remove count as left, and so
            does everything under threshold scope.
        sparsity: the final sparsity as in logs, report and card: the share of zeros in the weights of the model's body.
    """

    groups: tuple[PlannedGroup, ...]
    left_out: Mapping[str, str]
    rules: tuple[PlannedRule, ...]
    parameters: int
    condensed_parameters: int
    sparsity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "groups": [asdict(group) for group in self.groups],
            "left_out": dict(self.left_out),
            "rules": [asdict(rule) for rule in self.rules],
            "parameters": self.parameters,
            "condensed_parameters": self.condensed_parameters,
            "sparsity": self.sparsity,
        }

    def __rich__(self) -> Group:
        concerns = (concern for rule in self.rules for concern in rule.concerns)
        tables = (self._modules(), self._rules(), self._timetable(), self._left_out())
        return Group(*(table for table in tables if table.row_count), *concerns)

    def _modules(self) -> Table:
        saved = f"{self.parameters:,} parameters in these modules, about {self.condensed_parameters:,} after condensing"
        title = f"Pruning plan: {self.sparsity:.2%} of the body's weights will be zero"
        table = table_of_modules(title, "module", "rule", "units", "weights", "target", "condensed", caption=saved)
        for group in self.groups:
            sparsity = f"at most {group.max_sparsity:.0%}" if group.sparsity is None else f"{group.sparsity:.1%}"
            fewest, most = group.units_left
            left = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
            condensed = left if group.is_condensable else ""
            table.add_row(group.name, group.rule, f"{group.units:,}", f"{group.weights:,}", sparsity, condensed)
        return table

    def _rules(self) -> Table:
        table = Table("rule", "pattern", "criterion", "scope", "target", "schedule", title="Rules", box=box.SIMPLE)
        for row in dict.fromkeys(
            (group.rule, group.pattern, group.criterion, group.scope, group.target, group.schedule) for group in self.groups
        ):
            table.add_row(*row)
        return table

    def _timetable(self) -> Table:
        title = f"Timetable in {self.rules[0].steps:,} steps" if self.rules else "No mask changes"
        table = table_of_modules(title, "rule", "warm-up", "updates", "first", "last", "recovery")
        for rule in self.rules:
            steps = (rule.warmup, rule.updates, rule.first_update, rule.last_update, rule.recovery)
            table.add_row(rule.name, *(f"{count:,}" for count in steps))
        return table

    def _left_out(self) -> Table:
        table = Table(title="Left out", box=box.SIMPLE)
        table.add_column("module", overflow="fold")
        table.add_column("because")
        for name, reason in self.left_out.items():
            table.add_row(name, reason)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def make_plan(budgets: Iterable[Budget], left_out: Mapping[str, str], sparsity: float) -> PruningPlan:
    """The plan of these budgets. `sparsity`: the final share of zeros in the weights of the model's body."""
    groups, planned = [], []
    #: Parameter name → share of it that condensing leaves, and its size.
    left: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for budget, rule in [(each, rule) for each in budgets for rule in each.rules]:
        settings, timeline, updates = rule.settings, rule.timeline, rule.timeline.updates
        bounded = settings.scope == "global"
        cut = rule.pattern.is_condensable and settings.scope != "threshold"
        density: dict[str, float] = {}
        for group in rule.groups:
            fewest, most = _units_left(rule, group)
            share = fewest / group.num_units if settings.scope in LOCAL_SCOPES else 1 - settings.sparsity
            for target in (view.target for view in (*group.weights, *group.biases)):
                sizes[target.name] = target.parameter.numel()
                density[target.name] = share if cut else 1.0
            groups.append(
                PlannedGroup(
                    name=group.name,
                    rule=rule.name,
                    budget=budget.name,
                    is_open=rule.is_open,
                    pattern=str(rule.pattern),
                    is_condensable=rule.pattern.is_condensable,
                    criterion=settings.criterion,
                    scope=settings.scope,
                    schedule=settings.schedule,
                    units=group.num_units,
                    weights=group.size,
                    sparsity=None if settings.scope == "threshold" else settings.sparsity,
                    min_sparsity=settings.min_sparsity_per_module if bounded else 0.0,
                    max_sparsity=1.0 if settings.scope in LOCAL_SCOPES else settings.max_sparsity_per_module,
                    units_left=(fewest, most),
                )
            )
        left |= {name: left.get(name, 1.0) * share for name, share in density.items()}
        planned.append(
            PlannedRule(
                name=rule.name,
                schedule=settings.schedule,
                steps=timeline.total,
                warmup=timeline.begin,
                first_update=updates[0] if updates else 0,
                last_update=updates[-1] if updates else 0,
                updates=len(updates),
                recovery=timeline.recovery,
                concerns=tuple(rule.concerns),
            )
        )
    parameters, condensed = sum(sizes.values()), round(sum(left[name] * size for name, size in sizes.items()))
    return PruningPlan(tuple(groups), dict(left_out), tuple(planned), parameters, condensed, sparsity)


def _units_left(rule: Rule, group: UnitGroup) -> tuple[int, int]:
    """The smallest and the largest number of units of a group that can be left at the end."""
    settings, number = rule.settings, group.num_units
    if settings.scope in LOCAL_SCOPES:
        left = number - min(round(settings.sparsity * number), group.max_removable)
        return left, left
    fewest = number - most_removable(group, settings.max_sparsity_per_module)
    return fewest, number - least_removed(group, settings.min_sparsity_per_module)
