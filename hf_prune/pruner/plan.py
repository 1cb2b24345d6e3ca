"""What a pruner will do, module by module, before it does anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..tables import as_text
from .rules import Rule


@dataclass(frozen=True)
class PlannedGroup:
    """The effective setting of one module or block.

    `sparsity` is what it will have at the end: its own target under local scope; under global scope the share of all modules
    of the rule together, each between `min_sparsity` and `max_sparsity`.
    """

    name: str
    rule: str
    pattern: str
    criterion: str
    scope: str
    schedule: str
    units: int
    weights: int
    sparsity: float | None
    min_sparsity: float
    max_sparsity: float


@dataclass(frozen=True)
class PruningPlan:
    """The groups that will be pruned, and what is left out with its reason. Prints as a table."""

    groups: tuple[PlannedGroup, ...]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"groups": [asdict(group) for group in self.groups], "left_out": dict(self.left_out)}

    def __rich__(self) -> Table:
        table = Table(title="Pruning plan")
        for column in ("module", "rule", "pattern", "criterion", "schedule", "units", "weights", "sparsity"):
            table.add_column(column, justify="right" if column in ("units", "weights", "sparsity") else "left")
        for group in self.groups:
            figure = f"at most {group.max_sparsity:.0%}" if group.sparsity is None else f"{group.sparsity:.1%} ({group.scope})"
            cells = (group.name, group.rule, group.pattern, group.criterion, group.schedule)
            table.add_row(*cells, f"{group.units:,}", f"{group.weights:,}", figure)
        for name, reason in self.left_out.items():
            table.add_row(name, "", f"left out: {reason}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def make_plan(rules: Iterable[Rule], left_out: Mapping[str, str]) -> PruningPlan:
    """The plan of matched rules."""
    groups = []
    for rule in rules:
        settings = rule.settings
        bounded = settings.scope == "global"
        for group in rule.groups:
            groups.append(
                PlannedGroup(
                    name=group.name,
                    rule=rule.name,
                    pattern=str(settings.pattern),
                    criterion=settings.criterion,
                    scope=settings.scope,
                    schedule=settings.schedule,
                    units=group.num_units,
                    weights=group.size,
                    sparsity=None if settings.scope == "threshold" else settings.target_sparsity,
                    min_sparsity=settings.min_sparsity_per_module if bounded else 0.0,
                    max_sparsity=1.0 if settings.scope == "local" else settings.max_sparsity_per_module,
                )
            )
    return PruningPlan(tuple(groups), dict(left_out))
