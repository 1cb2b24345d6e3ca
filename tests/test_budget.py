"""One target for all open rules: against a slow ranking of every unit, counted over the union of their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_bert
from torch import Tensor

from hf_prune import ConfigError, Pruner, PruningConfig
from hf_prune.model.units import UnitGroup
from hf_prune.pruning.allocation import Levels
from hf_prune.pruning.budget import Budget
from hf_prune.pruning.costs import Costs

HEADS_AND_NEURONS = [{"pattern": "head"}, {"pattern": "neuron"}]


def pruned(**settings: Any) -> Pruner:
    """A tiny BERT, pruned at once by magnitude."""
    config = PruningConfig.from_dict({"criterion": "magnitude", "schedule": "constant", "max_sparsity_per_module": 1.0} | settings)
    pruner = Pruner(tiny_bert(num_hidden_layers=2), config, total_steps=2)
    pruner.step()
    return pruner


def share_gone(pruner: Pruner, rule: int) -> float:
    gone = [kept.numel() - int(kept.sum()) for kept in pruner.rules[rule].kept]
    return sum(gone) / sum(group.num_units for group in pruner.rules[rule].groups)


@pytest.mark.parametrize("target", [0.1, 0.35, 0.5, 0.8])
def test_open_rules_spend_one_budget_on_the_cheapest_units_of_all(target: float) -> None:
    pruner = pruned(rules=HEADS_AND_NEURONS, target_sparsity=target)
    assert [budget.name for budget in pruner.budgets] == ["rules[0]+rules[1]"]
    ranking: list[tuple[float, int, bool]] = []
    reference = tiny_bert(num_hidden_layers=2)
    for rule in pruner.rules:
        for group, kept in zip(rule.groups, rule.kept):
            for unit in range(group.num_units):
                elements: list[Tensor] = []
                for view in group.weights:
                    matrix = reference.get_parameter(view.target.name).detach()
                    elements.append(view.gather(matrix).movedim(1, 2).flatten(2).flatten(0, 1)[unit])
                flat = torch.cat(elements).double()
                ranking.append((float(flat.abs().sum() / flat.numel()), flat.numel(), bool(kept[unit])))
    ranking.sort()
    total = sum(size for _, size, _ in ranking)
    gone = sum(size for _, size, kept in ranking if not kept)
    assert abs(gone - target * total) <= max(size for _, size, _ in ranking)
    assert pruner.reached_sparsity() == pytest.approx(gone / total, abs=1e-12)
    # Nothing that stays ranks below what went.
    assert [kept for _, _, kept in ranking] == sorted(kept for _, _, kept in ranking)


def test_heads_and_neurons_get_different_shares_of_one_budget() -> None:
    together = pruned(rules=HEADS_AND_NEURONS)
    apart = pruned(rules=[{**rule, "target_sparsity": 0.5} for rule in HEADS_AND_NEURONS])
    assert share_gone(apart, 0) == share_gone(apart, 1) == 0.5
    assert abs(share_gone(together, 0) - share_gone(together, 1)) > 0.05
    assert len(apart.budgets) == 2


def test_local_scope_gives_each_module_the_same_share() -> None:
    pruner = pruned(rules=HEADS_AND_NEURONS, scope="local")
    for rule in pruner.rules:
        for kept in rule.kept:
            assert float(kept.double().mean()) == 0.5


def test_a_rule_with_a_target_keeps_it_and_the_plan_says_which() -> None:
    pruner = pruned(rules=[{"pattern": "head", "target_sparsity": 0.25}, {"pattern": "neuron"}], target_sparsity=0.75)
    assert (share_gone(pruner, 0), share_gone(pruner, 1)) == (0.25, 0.75)
    assert {group.rule: group.budget for group in pruner.plan().groups} == {"rules[0]": "rules[0]", "rules[1]": "rules[1]"}
    shared = pruned(rules=HEADS_AND_NEURONS)
    assert {group.budget for group in shared.plan().groups} == {"rules[0]+rules[1]"}


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({}, {"rules[0]": "60.0%, shared by rules[0]+rules[1]", "rules[1]": "60.0%, shared by rules[0]+rules[1]"}),
        ({"scope": "local"}, {"rules[0]": "60.0%, the config's", "rules[1]": "60.0%, the config's"}),
        ({"own": 0.3}, {"rules[0]": "30.0%, its own", "rules[1]": "60.0%, the config's"}),
        ({"own": 0.6}, {"rules[0]": "60.0%, its own", "rules[1]": "60.0%, the config's"}),
        ({"pattern": "1xchannel"}, dict.fromkeys(("rules[0]", "rules[1]", "config"), "60.0%, shared by rules[0]+rules[1]+config")),
        ({"scope": "threshold", "threshold": 0.1}, {"rules[0]": "by score", "rules[1]": "by score"}),
    ],
    ids=str,
)
def test_the_plan_says_whose_target_each_rule_has(settings: dict[str, Any], targets: dict[str, str]) -> None:
    rules = [{"pattern": "head"} | ({"target_sparsity": settings.pop("own")} if "own" in settings else {}), {"pattern": "neuron"}]
    plan = pruned(rules=rules, target_sparsity=0.6, **settings).plan()
    assert {group.rule: group.target for group in plan.groups} == targets
    printed = str(plan).partition("Rules")[2].partition("Timetable")[0]
    for rule, target in targets.items():
        assert [line for line in printed.splitlines() if line.split()[:1] == [rule] and target in line]
    assert max(map(len, str(plan).splitlines())) <= 110


def test_scores_of_different_kinds_do_not_share_a_budget_but_each_meets_the_target() -> None:
    pruner = pruned(rules=[{"pattern": "head", "criterion": "random"}, {"pattern": "neuron"}])
    assert (share_gone(pruner, 0), share_gone(pruner, 1)) == (0.5, 0.5)


def test_nested_rules_have_to_say_how_much_each_takes() -> None:
    rules: list[dict[str, Any]] = [{"pattern": "2:4", "scope": "local"}, {"pattern": "head"}]
    with pytest.raises(ConfigError, match=r"rules\[1\].target_sparsity=None: must be given, since rules\[0\] names"):
        pruned(rules=rules)
    pruned(rules=[{**rules[0], "target_sparsity": 0.5}, rules[1]])


def test_another_cost_is_one_function() -> None:
    """Heads ten times as dear as they weigh: they save more, so more of them go, and the share of the cost is met."""
    pruner = pruned(rules=HEADS_AND_NEURONS, target_sparsity=0.0)

    def dear_heads(group: UnitGroup) -> Levels:
        left = torch.arange(group.num_units + 1)
        return Levels(left, left * group.unit_size * (10.0 if "attention" in group.name else 1.0))

    plain = Budget("plain", pruner.rules, pruned(rules=HEADS_AND_NEURONS).budgets[0].timeline)
    dear = Budget("dear", pruner.rules, plain.timeline, Costs("dear heads", 0.0, dear_heads))

    def gone(budget: Budget) -> tuple[int, int]:
        heads, neurons = budget.allocate(1)
        count = lambda kept: sum(int((~units).sum()) for units in kept)  # noqa: E731
        costs = [float(budget.costs.levels(group).costs[1]) for group in budget.groups]
        spent = sum(int((~units).sum()) * cost for units, cost in zip([*heads, *neurons], costs))
        total = sum(units.numel() * cost for units, cost in zip([*heads, *neurons], costs))
        assert abs(spent - 0.5 * total) <= max(costs)
        return count(heads), count(neurons)

    assert gone(dear)[0] > gone(plain)[0]
