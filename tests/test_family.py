"""A family from one run: the schedule, what is saved at each target, and that training goes on as if nothing had been saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot, tiny_bert
from models import ragged_batch
from test_costs import rules, table_of

from hf_prune import ConfigError, Pruner, PruningConfig, condense, prune

#: Twelve steps, two targets of six steps each, the last of which is for recovery.
FAMILY: dict[str, Any] = {"criterion": "magnitude", "warmup_steps": 0, "cooldown_steps": 2, "frequency": 2}


def config(family: str = "bert", **settings: Any) -> PruningConfig:
    return PruningConfig(rules=rules(family), **FAMILY | settings)


# ------------------------------------------------------------------------------------------------------------------- a plain loop


@pytest.mark.parametrize(
    ("target", "values"), [("target_parameters", [0.9, 0.8]), ("target_bytes", [0.95, 60000]), ("target_flops", [0.9, 0.8, 0.7])]
)
def test_a_plain_loop_says_when_a_member_is_complete(target: str, values: list[float]) -> None:
    model = tiny_bert()
    sizes = {"target_parameters": model.num_parameters(), "target_bytes": 4 * model.num_parameters()}
    pruner = Pruner(model, config(**{target: values}), total_steps=12)
    assert pruner.members == dict(zip([12 * (place + 1) // len(values) for place in range(len(values))], values))
    left = []
    for step in range(1, 13):
        pruner.step()
        left.append(pruner.metrics()[target.removeprefix("target_")])
        if step in pruner.members:
            asked = pruner.members[step]
            if target in sizes:
                assert condense(copy.deepcopy(model)).num_parameters() * sizes[target] / sizes["target_parameters"] == left[-1]
                assert left[-1] <= (asked if asked >= 1 else asked * sizes[target])
            assert left[-2] == left[-1]  # it had a step to recover
    pruner.finish()
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > len(values)


def test_a_family_of_one_is_a_run_to_one_target() -> None:
    alone, family = (Pruner(tiny_bert(), config(target_parameters=value), total_steps=12) for value in (0.8, [0.8]))
    assert (alone.members, family.members) == ({}, {12: 0.8})
    for _ in range(12):
        alone.step()
        family.step()
    assert all(torch.equal(value, family.state_dict()[name]) for name, value in alone.state_dict().items())


def test_a_speedup_of_each_member_is_that_of_the_table(tmp_path: Path) -> None:
    model = tiny_bert()
    table = table_of(model, tmp_path / "table.json")
    pruner = Pruner(model, config(target_speedup=[1.2, 1.5], latency_table=str(table)), total_steps=12)
    for step in range(1, 13):
        pruner.step()
        if step in pruner.members:
            assert pruner.members[step] <= pruner.metrics()["speedup"] < pruner.members[step] + 0.15
    pruner.finish()


def test_a_plain_loop_resumes_with_the_targets_it_had(tmp_path: Path) -> None:
    """The costs of the state give other shares than those measured now, for each of the targets."""
    dense = tiny_bert()
    tables = [table_of(dense, tmp_path / f"{number}.json", cost) for number, cost in enumerate((1.0, 0.2))]
    whole, resumed = (
        Pruner(copy.deepcopy(dense), config(target_speedup=[1.1, 1.3], latency_table=str(table)), total_steps=12)
        for table in tables
    )
    for _ in range(4):
        whole.step()
    resumed.model.load_state_dict(snapshot(whole.model))
    resumed.load_state_dict(whole.state_dict())
    for _ in range(8):
        whole.step()
        resumed.step()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"target_parameters": [0.9, 0.01]}, 12, r"target_parameters=0\.01: cannot be reached"),
        ({"target_parameters": [0.5, 1e6]}, 12, "target_parameters=1000000.0: is reached already"),
        ({"target_parameters": [0.7, 20000]}, 12, r"target_parameters\[1\]=20000: must ask for more than 0\.7 before it"),
        ({"target_parameters": [0.9, 0.8], "cooldown_steps": 12}, 12, r"cooldown_steps=12: .* 12 steps to each of 2 targets"),
        ({"target_parameters": [0.9, 0.8], "cooldown_steps": 2}, 3, r"cooldown_steps=2: warm-up .* to each of 2 targets"),
        ({"target_parameters": [0.9, 0.8], "warmup_steps": 11}, 12, r"warmup_steps=11: .* to each of 2 targets"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(settings: dict[str, Any], steps: int, message: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        Pruner(model, config(**settings), total_steps=steps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rules_of_one_budget_have_one_schedule() -> None:
    both = rules("bert")
    both[0].warmup_steps = 3
    with pytest.raises(ConfigError, match="is one budget, so its rules need the same warmup_steps"):
        Pruner(tiny_bert(), PruningConfig(rules=both, target_parameters=[0.9, 0.8]), total_steps=12)


def test_without_training_there_is_one_target_a_call() -> None:
    model = tiny_bert()
    with pytest.raises(ConfigError, match=r"target_bytes=\[0\.9, 0\.8\]: is a family, .* one target at a time: .*database"):
        prune(model, PruningConfig(rules=rules("bert"), target_bytes=[0.9, 0.8]), [ragged_batch(model)])


def test_concerns_hold_for_each_stage() -> None:
    pruner = Pruner(tiny_bert(), config(target_parameters=[0.9, 0.8], cooldown_steps=0, frequency=4), total_steps=12)
    found = [concern for concern in pruner.concerns if concern.startswith("rules[0]")]
    assert ["(at step 4, 6 of 6)" in found[0], "after the last of 6 steps" in found[1]] == [True, True]
    assert ["(at step 10, 12 of 12)" in found[2], "after the last of 12 steps" in found[3]] == [True, True]
    assert "12 in 4 updates" in pruner.summary()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"schedule": "constant"}, [1, 7]),
        ({"frequency": None, "updates": 4}, [3, 5, 9, 11]),
        ({"frequency": 1}, [*range(1, 6), *range(7, 12)]),
    ],
)
def test_each_stage_has_its_share_of_the_updates(settings: dict[str, Any], steps: list[int]) -> None:
    """`constant` prunes at once, right after the step at which the member before it is complete."""
    pruner = Pruner(tiny_bert(), config(target_parameters=[0.9, 0.8], **settings), total_steps=12)
    updates, left = [], [float(pruner.model.num_parameters())]
    for step in range(1, 13):
        pruner.step()
        left.append(pruner.metrics()["parameters"])
        updates += [step] if left[-1] < left[-2] else []
    assert pruner.budgets[0].timeline.updates == steps
    assert set(updates) <= set(steps)
    assert (left[6] <= 0.9 * left[0], left[6] > 0.85 * left[0], left[12] <= 0.8 * left[0]) == (True, True, True)
