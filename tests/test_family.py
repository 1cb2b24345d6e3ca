"""A family from one run: the schedule, what is saved at each target, and that training goes on as if nothing had been saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot, tiny_bert, trainer_for
from models import ragged_batch
from PIL import Image
from test_costs import rules, table_of

from hf_prune import CardFacts, ConfigError, ModelCardCallback, Pruner, PruningConfig, condense, prune
from hf_prune.hub.card import PICTURES, write_card
from hf_prune.hub.family import Family, Member, folder_name
from hf_prune.oneshot.folder import prune_to_folder

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


# --------------------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    ("target", "value", "name"),
    [
        ("target_speedup", 2, "speedup-2.0"),
        ("target_speedup", 1.25, "speedup-1.25"),
        ("target_parameters", 0.5, "parameters-0.5"),
        ("target_parameters", 1e6, "parameters-1000000"),
        ("target_bytes", 2.5e9, "bytes-2500000000"),
        ("target_flops", 1000.5, "flops-1000.5"),
    ],
)
def test_the_folder_of_a_member_is_called_by_what_was_asked(target: str, value: float, name: str) -> None:
    assert folder_name(target, value) == name


def made(*steps: int) -> Family:
    members = (
        Member(f"parameters-0.{9 - step}", step, 0.9 - step / 10, 9e5 - step, 9e5, 900, {"f1": 0.5 + step / 10}) for step in steps
    )
    return Family("target_parameters", 1e6, tuple(members))


def test_a_family_drops_what_a_resumed_run_makes_anew_and_what_another_run_made(tmp_path: Path) -> None:
    targets = {1: 0.8, 2: 0.7, 3: 0.6}
    second = made(2).members[0]
    assert made(1, 2, 3).with_member(second, targets) == made(1, 2)
    assert made(1).with_member(second, {1: 0.85, 2: 0.7}) == made(2)
    assert Family.load(tmp_path) is None
    made(1, 2).save(tmp_path)
    assert Family.load(tmp_path) == made(1, 2)
    (tmp_path / "family.json").write_text('{"target": "target_speedup", "dense": 1.0, "members": [{"folder": "a"}]}')
    with pytest.raises(ConfigError, match=r"family\.json: members\[0\]\.step=None: must be given"):
        Family.load(tmp_path)


def test_a_card_shows_the_family_and_what_was_asked(tmp_path: Path) -> None:
    budget = {"target": "target_parameters", "asked": 0.5, "predicted": 499000.0, "measured": 499000.0}
    facts = CardFacts(metrics_before={"f1": 0.9}, budget=budget, family=made(1, 2).to_dict())
    text = str(write_card(tmp_path, tiny_bert(), config(target_parameters=[0.8, 0.7]), facts))
    assert CardFacts.load(tmp_path) == facts
    for line in (
        "| target: parameters | asked for 0.5 of what the dense model has; predicted 499,000; measured 499,000 |",
        "| folder | asked | predicted | measured | parameters | f1 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `parameters-0.8` | 0.8 | 899,999 | 900,000 | 900 | 0.6 |",
        r"| rules\[0\] | head | parameters 0.8, 0.7, shared | magnitude | global | cubic | all that the pattern fits |",
    ):
        assert line in text.splitlines()
    assert f"]({PICTURES}/family.png)" in text
    with Image.open(tmp_path / PICTURES / "family.png") as image:
        assert len(image.convert("L").getcolors() or []) > 20
    assert "parameters-0.7" in str(made(1, 2))
    with pytest.raises(ConfigError, match=r"family\.members\[0\]\.stop"):
        CardFacts(family={"target": "t", "dense": 1.0, "members": [{"stop": 1}]})


def test_points_are_measured_or_else_predicted() -> None:
    first, second = made(1, 2).members
    family = Family("target_parameters", 1.0, (Member(**vars(first) | {"measured": None}), second))
    assert family.points("f1") == {"parameters-0.8": (first.predicted, 0.6), "parameters-0.7": (second.measured, 0.7)}
    assert family.points("accuracy") == {}


def test_the_card_of_a_run_says_what_was_asked_and_predicted(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config(target_parameters=0.8), callbacks=[ModelCardCallback()])
    dense = trainer.model.num_parameters()
    trainer.train()
    left = condense(copy.deepcopy(trainer.model)).num_parameters()
    assert CardFacts.load(tmp_path).budget == {"target": "target_parameters", "asked": 0.8, "predicted": left}
    assert left <= 0.8 * dense
    assert (
        f"| target: parameters | asked for 0.8 of what the dense model has; predicted {left:,} |"
        in (tmp_path / "README.md").read_text()
    )


def test_the_card_of_a_model_pruned_without_training_does_too(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "dense")
    settings = PruningConfig(rules=rules("bert"), target_parameters=0.8)
    made = prune_to_folder(
        model, tmp_path / "dense", tmp_path / "small", settings, [ragged_batch(model, rows=6, seed=seed) for seed in range(2)]
    )
    assert CardFacts.load(tmp_path / "small").budget == {"target": "target_parameters", "asked": 0.8, "predicted": made.parameters}
