"""What a run's length makes of a config: the timetable and the sizes that a plan shows, what is warned of, and what is refused."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
from helpers import prune_at_once, tiny_bert

from hf_prune import ConfigError, Pruner, PruningConfig, condense


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_plan_has_the_timetable_and_the_sizes_after_condensing(scope: str) -> None:
    config = PruningConfig(
        rules=[{"pattern": "head"}, {"pattern": "neuron", "schedule": "linear", "frequency": 100}], scope=scope, target_sparsity=0.5
    )
    model = tiny_bert(num_hidden_layers=2)
    pruner = Pruner(model, config, total_steps=75)
    plan = pruner.plan()
    heads, neurons = plan.rules
    assert (heads.warmup, heads.first_update, heads.last_update, heads.updates, heads.recovery) == (7, 9, 53, 20, 22)
    assert (neurons.schedule, neurons.updates, neurons.first_update) == ("linear", 1, 53)
    assert (heads.concerns, len(neurons.concerns)) == ((), 1)
    attention, feed_forward = plan.groups[0], plan.groups[-1]
    assert attention.units_left == ((2, 2) if scope == "local" else (attention.units - int(0.98 * attention.units), 4))
    text = str(plan)
    assert "Timetable in 75 steps" in text
    assert "frequency=100 makes 1 mask update (at step 53 of 75)" in text
    assert f"{plan.parameters:,} parameters in these modules, about {plan.condensed_parameters:,} after condensing" in text
    assert plan.to_dict()["rules"][0]["updates"] == 20
    pruner.release()
    before = model.num_parameters()
    prune_at_once(model, replace(config, rules=[{"pattern": "head"}, {"pattern": "neuron"}], criterion="magnitude"))
    condense(model)
    assert before - model.num_parameters() == pytest.approx(plan.parameters - plan.condensed_parameters, rel=0.02)
    assert feed_forward.pattern == "neuron"


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"frequency": 100}, 16, "frequency=100 makes 1 mask update (at step 11 of 16)"),
        ({"frequency": 3}, 12, None),
        ({"updates": 8, "warmup_steps": 14, "cooldown_steps": 1}, 17, "updates=8 makes 2 mask updates (at step 15, 16 of 17)"),
        ({"cooldown_steps": 0}, 75, "no step is left for the model to recover"),
        ({"updates": 1}, 75, None),
        ({}, 75, None),
        ({"schedule": "constant"}, 75, None),
        ({"schedule": "lottery"}, 75, None),
        (
            {"min_sparsity_per_module": 0.3},
            75,
            "min_sparsity_per_module=0.3 rounds to 1 of the 4 units of bert.encoder.layer.0.attention.self; the nearest possible "
            "values are 0.25 and 0.5.",
        ),
        ({"min_sparsity_per_module": 0.25}, 75, None),
    ],
)
def test_a_timetable_that_harms_the_model_and_shares_that_rounding_misses_are_warned_of(
    settings: dict[str, Any], steps: int, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        pruner = Pruner(tiny_bert(num_hidden_layers=1), PruningConfig(pattern="head", **settings), total_steps=steps)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [concern for rule in pruner.plan().rules for concern in rule.concerns]
    assert len(messages) == (words is not None)
    assert all(words in message for message in messages)


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"pattern": "head", "scope": "local"}, "is 0.4 of 4 units and rounds to none; * 0.25 (1 unit of 4 in a module)."),
        ({"pattern": "layer"}, "is 0.2 of 2 units and rounds to none; * 0.5 (1 unit of 2)."),
    ],
)
def test_a_target_that_rounds_to_no_unit_is_an_error_before_the_first_step(settings: dict[str, str], nearest: str) -> None:
    wanted = ".*".join(map(re.escape, nearest.split("*")))
    with pytest.raises(ConfigError, match=rf"target_sparsity=0\.1: {wanted}"):
        Pruner(tiny_bert(num_hidden_layers=2), PruningConfig(target_sparsity=0.1, **settings), total_steps=75)
