"""Budgets: the rules that share a target, the cost of a unit, and when masks are updated and to what sparsity.

Open rules, which have no target of their own, share that of the config. Under `scope="global"` all of them with the same schedule
and the same kind of scores form one budget: their units are ranked together by score per cost, and sparsity is counted over the
union of their weights. Every other rule is a budget of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..model.units import UnitGroup
from ..settings.errors import ConfigError
from .allocation import allocate, allocate_levels, normalize
from .costs import WEIGHTS, Costs, fitted, likely_sizes, sizes_of
from .rules import Rule
from .schedules import Stages, Timeline


@dataclass
class Budget:
    """The rules that share a target.

    Attributes:
        name: the names of its rules, joined.
        rules: its rules, all with the same schedule, scope and kind of scores.
        timeline: when masks change, and to what sparsity.
        costs: what is counted.
        requested_sparsity: the sparsity that the last mask update requested; it never falls.
    """

    name: str
    rules: list[Rule]
    timeline: Timeline | Stages
    costs: Costs = WEIGHTS
    requested_sparsity: float = 0.0

    @property
    def groups(self) -> list[UnitGroup]:
        """The unit groups of all its rules."""
        return [group for rule in self.rules for group in rule.groups]

    @property
    def weight_names(self) -> list[str]:
        """Names of the weights that its rules prune, each once."""
        return list(dict.fromkeys(name for rule in self.rules for name in rule.weight_names))

    @property
    def is_lottery(self) -> bool:
        """Whether weights are rewound at each update."""
        return self.timeline.schedule == "lottery"

    def progress(self, step: int) -> float:
        """The progress of the schedule at `step`: the sparsity it requests as a share of the target."""
        return self.timeline.sparsity(step) / self.timeline.target if self.timeline.target else 1.0

    def is_late(self, step: int) -> bool:
        """Whether the last mask update due by `step` did not happen: the step was skipped, or the run started later."""
        return self.requested_sparsity < self.timeline.sparsity(self.timeline.last_due(step))

    def is_due(self, step: int) -> bool:
        """Whether masks change right after optimizer step `step`. A lottery ticket is rewound only if more is pruned."""
        return self.is_late(step) or (self.timeline.is_due(step) and not self.is_lottery)

    def is_finished(self, step: int) -> bool:
        """Whether the last mask update has happened."""
        return step >= self.timeline.last_update and not self.is_late(step)

    def allocate(self, steps: int) -> list[list[Tensor]]:
        """Do the mask update due after `steps` optimizer steps. Returns the remaining units, bool `[units]`, by rule and group."""
        step = self.timeline.last_due(steps)
        progress, settings = self.progress(step), self.rules[0].settings
        self.requested_sparsity = max(self.requested_sparsity, self.timeline.sparsity(step))
        scores = [rule.criterion.scores(group) for rule in self.rules for group in rule.groups]
        scores = normalize(scores, settings.normalization)
        gone = [gone for rule in self.rules for gone in rule.removed]
        floors = [rule.settings.min_sparsity_per_module * progress for rule in self.rules for _ in rule.groups]
        if self.costs.measured is None:
            removed = allocate(
                self.groups,
                self._per_cost(scores) if settings.scope == "global" else scores,
                gone,
                self.requested_sparsity,
                settings.scope,
                costs=self._unit_costs,
                floors=floors,
                caps=self._caps,
                threshold=None if settings.threshold is None else settings.threshold * progress,
                at_least=self.costs is not WEIGHTS,
            )
        else:
            levels = [self.costs.levels(group) for group in self.groups]
            needed = self.requested_sparsity * self.costs.total_of(self.groups)
            removed = allocate_levels(self.groups, self._per_unit(scores), gone, levels, needed, floors, self._caps)
        kept = iter(~gone for gone in removed)
        return [[next(kept) for _ in rule.groups] for rule in self.rules]

    @property
    def _caps(self) -> list[float]:
        """The share of each group's units that may go."""
        return [rule.settings.max_sparsity_per_module for rule in self.rules for _ in rule.groups]

    @property
    def _unit_costs(self) -> list[float]:
        """The cost of one unit of each group, where all cost the same."""
        return [float(self.costs.levels(group).costs[-1]) / group.num_units for group in self.groups]

    @property
    def _weights_scored(self) -> list[int]:
        """By how many weights a unit's score is divided, group by group: a mean is a score per weight, others are per unit."""
        return [group.unit_size if rule.criterion.reduction == "mean" else 1 for rule in self.rules for group in rule.groups]

    def _per_unit(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Scores of units as they add up."""
        return [score * number for score, number in zip(scores, self._weights_scored)]

    def _per_cost(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Scores of units → scores per cost, up to a common factor."""
        factors = [number / cost for number, cost in zip(self._weights_scored, self._unit_costs)]
        if len(set(factors)) == 1:
            return list(scores)
        return [score * (factor / max(factors)) for score, factor in zip(scores, factors)]

    def spent(self) -> float:
        """The share of its cost that is removed."""
        return self._removed() / self.costs.total_of(self.groups)

    def load_costs(self, state: Mapping[str, Tensor], values: Sequence[float]) -> None:
        """Go on with costs as they were measured at first, for some targets."""
        self.aim(self.costs.restored(state), values)

    def aim(self, costs: Costs, values: Sequence[float]) -> None:
        """Go on to some targets in terms of other costs."""
        self.costs = costs
        self.requested_sparsity = self.spent()
        self.timeline = self.timeline.aimed_at(self.costs.shares(values, self.groups, self._caps))
        for rule in self.rules:
            rule.costs, rule.timeline = self.costs, self.timeline
            rule.settings = replace(rule.settings, target_sparsity=self.timeline.target)

    def fit(self, model: nn.Module, values: Sequence[float], scored: bool) -> None:
        """Let a budget of time meet its targets with the sizes that it comes to; see [`fitted`].

        Args:
            model: the model.
            values: the speed-ups that are asked.
            scored: whether units have scores by now; else it is fitted to [`likely_sizes`].

        Raises:
            ConfigError: a target cannot be reached.
        """

        def sizes(costs: Costs) -> list[dict[str, int]]:
            if not scored:
                return [likely_sizes(costs, value, self.groups, self._caps) for value in values]
            try:
                self.aim(costs, values)
            except ConfigError:  # a trial goes beyond what can be had; where the first does, aiming below says so
                return [{}]
            chosen = [self.allocate(end) for end in self.timeline.ends]
            removed = ([~kept for rule_kept in each for kept in rule_kept] for each in chosen)
            return [sizes_of(costs, self.groups, gone) for gone in removed]

        self.aim(fitted(self.costs, model, values, sizes).averaged(next(model.parameters()).device), values)

    def metrics(self) -> dict[str, float]:
        """Where a target in costs stands: the field of the target without its first word → what the model has by now."""
        return {} if self.costs is WEIGHTS else {self.costs.target.removeprefix("target_"): self.costs.reached(self._removed())}

    def _removed(self) -> float:
        """The cost that is removed."""
        kept = [int(kept.sum()) for rule in self.rules for kept in rule.kept]
        levels = [self.costs.levels(group) for group in self.groups]
        return sum(float(level.costs[-1]) - level.cost(count) for level, count in zip(levels, kept))


def make_budgets(rules: Iterable[Rule]) -> list[Budget]:
    """The budgets of a config's rules, in the order of the rules."""
    shared: dict[object, list[Rule]] = {}
    for rule in rules:
        settings = rule.settings
        alike = (rule.timeline, settings.criterion, settings.reduction, settings.normalization, settings.update)
        key = alike if rule.is_open and settings.scope == "global" else rule.name
        shared.setdefault(key, []).append(rule)
    return [
        Budget("+".join(rule.name for rule in members), members, members[0].timeline, members[0].costs)
        for members in shared.values()
    ]
