"""A family from one run: the schedule, what is saved at each target, and that training goes on as if nothing had been saved."""

from __future__ import annotations

import copy
import logging
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from distillation_cases import WIDE, tokenizer
from helpers import (
    ROWS,
    TIMED,
    arguments,
    assert_equal,
    hooks,
    pruner_of,
    quickly_timed,
    rules,
    snapshot,
    table_of,
    timed_here,
    tiny_bert,
    trainer_for,
    with_dropout,
)
from models import ragged_batch, tiny
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, default_data_collator

from hf_prune import (
    CardFacts,
    ConfigError,
    DistillationTrainer,
    ModelCardCallback,
    Pruner,
    PruningCallback,
    PruningConfig,
    condense,
    prune,
)
from hf_prune.hub.card import PICTURES, write_card
from hf_prune.hub.family import Family, Member, folder_name, number
from hf_prune.measure.latency import Comparison, compare
from hf_prune.measure.latency_table import measured_speedup
from hf_prune.measure.memory import megabytes
from hf_prune.oneshot.folder import prune_to_folder
from hf_prune.pruning import costs
from hf_prune.pruning.costs import counted
from hf_prune.training.stage import Task, run_stage

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
    assert pruner.summary().endswith("; target_parameters=0.9 after step 6; target_parameters=0.8 after step 12")


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


# ----------------------------------------------------------------------------------------------------------------------- a Trainer


class AtStepEnd(TrainerCallback):
    """Keeps a copy of the model after some steps, and whatever could change under a run that goes on, after every step."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.models, self.seen = steps, {}, []  # type: ignore[var-annotated]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step in self.steps:
            self.models[state.global_step] = copy.deepcopy(model).eval()
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        gradients = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
        random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.seen.append((modules, gradients, random_states, vars(control).copy(), torch.get_num_threads()))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


def drawing(prediction: Any) -> dict[str, float]:
    """A metric that draws from every generator."""
    return {"drawn": random.random() + float(np.random.rand()) + float(torch.rand(()))}


RUNS: dict[str, dict[str, Any]] = {
    "gradients": {"keep_zeros": True},
    "activations": {"criterion": "wanda", "schedule": "lottery"},
    "learned": {"criterion": "movement"},
}


def run(folder: Path, settings: dict[str, Any], kind: Any = Trainer, **overrides: Any) -> tuple[Trainer, AtStepEnd]:
    given = {"target_parameters": [0.9, 0.8]} if not any(name.startswith("target") for name in settings) else {}
    callback = AtStepEnd(6, 12)
    evaluated = {"eval_dataset": ROWS[:16], "eval_strategy": "steps", "eval_steps": 4, "compute_metrics": drawing}
    trainer = trainer_for(
        folder,
        config(**{"criterion": "snip_momentum"} | given | settings),
        with_dropout(0),
        kind,
        **{"callbacks": [callback], "logging_steps": 1} | evaluated | overrides,
    )
    trainer.train()
    return trainer, callback


def logged(trainer: Trainer) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "total_flos")
    return [{key: value for key, value in log.items() if not key.endswith(timed)} for log in trainer.state.log_history]


def files(folder: Path) -> dict[str, bytes]:
    """What lies in the folders of the members, and the record of them, without pictures."""
    found = [*folder.glob("parameters-*/*"), folder / "family.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found) if path.is_file()}


@pytest.mark.parametrize("name", [*RUNS, "distilled"])
def test_a_run_goes_on_as_if_nothing_had_been_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = Trainer
    if name == "distilled":
        kind = partial(DistillationTrainer, teacher=tiny_bert(seed=5), distillation={"alpha_hidden": 1.0})
    overrides = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} if name == "learned" else {}
    trainer, seen = run(tmp_path / "family", RUNS.get(name, {}), kind, **overrides)
    monkeypatch.setattr("hf_prune.training.callback.save_member", lambda *args: None)
    plain, wanted = run(tmp_path / "plain", RUNS.get(name, {}), kind, **overrides)
    assert not [path for path in (tmp_path / "plain").iterdir() if path.name.startswith(("parameters", "family"))]
    assert_equal(snapshot(trainer.model), snapshot(plain.model))
    assert_equal(pruner_of(trainer).state_dict(), pruner_of(plain).state_dict())
    assert logged(trainer) == logged(plain)
    assert seen.seen == wanted.seen
    assert {path.name for path in (tmp_path / "family").iterdir()} == {
        "parameters-0.9",
        "parameters-0.8",
        "family.json",
        "pictures",
    }


def test_members_compute_what_the_model_did_when_it_met_their_target(tmp_path: Path) -> None:
    run(
        tmp_path,
        {},
        processing_class=tokenizer(),
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        compute_metrics=None,
        callbacks=[seen := AtStepEnd(6, 12), ModelCardCallback(dataset="glue")],
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    family = Family.load(tmp_path)
    assert family is not None
    assert (family.target, family.dense) == ("target_parameters", tiny_bert().num_parameters())
    assert [(member.folder, member.step, member.asked) for member in family.members] == [
        ("parameters-0.9", 6, 0.9),
        ("parameters-0.8", 12, 0.8),
    ]
    for member in family.members:
        folder = tmp_path / member.folder
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = ragged_batch(model)
        torch.testing.assert_close(model(**batch).logits, seen.models[member.step](**batch).logits, rtol=0, atol=1e-5)
        assert model.num_parameters() == member.parameters == member.predicted == member.measured
        assert member.parameters <= member.asked * family.dense
        evaluated = Trainer(model, arguments(tmp_path / "other"), eval_dataset=ROWS[:16]).evaluate()
        assert member.metrics == {"loss": pytest.approx(evaluated["eval_loss"], abs=1e-6)}
        facts = CardFacts.load(folder)
        assert (facts.metrics, facts.dataset, facts.model_name) == (member.metrics, "glue", f"{tmp_path.name}-{member.folder}")
        assert facts.budget == {
            "target": "target_parameters",
            **{name: getattr(member, name) for name in ("asked", "predicted", "measured")},
        }
        assert (facts.training["steps"], facts.history[-1]["step"]) == (member.step, member.step - 1 if member.step == 6 else 11)
        assert PruningConfig.from_pretrained(folder).cost_targets == [0.9, 0.8]
        assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "training_args.bin").exists()
    assert CardFacts.load(tmp_path).family == family.to_dict()
    assert f"]({PICTURES}/family.png)" in (tmp_path / "README.md").read_text()
    assert CardFacts.load(tmp_path).budget["asked"] == 0.8


def test_a_member_is_logged_in_a_line_and_without_data_it_is_saved_without_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hf_prune"):
        run(tmp_path, {"target_flops": [0.9, 0.85]}, eval_dataset=None, eval_strategy="no", compute_metrics=None)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_prune.training.family"]
    family = Family.load(tmp_path)
    assert family is not None
    assert [line.partition(" is complete at step ")[0] for line in lines] == ["flops-0.9", "flops-0.85"]
    assert lines[0].endswith("parameters; not evaluated.")
    assert f": flops predicted {number(family.members[0].predicted)}, measured {number(family.members[0].measured)}; " in lines[0]
    for member in family.members:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / member.folder)
        assert member.metrics == {}
        assert counted(model.eval(), "target_flops", 128) == member.measured == pytest.approx(member.predicted)
    assert not (tmp_path / PICTURES).exists()


def test_a_copy_has_none_of_the_hooks_and_costs_no_statistics() -> None:
    pruner = Pruner(tiny_bert(), config(target_parameters=[0.9, 0.8], criterion="wanda"), total_steps=12)
    own = torch.nn.Module.register_forward_hook(pruner.model, lambda *args: None)
    before, copied = hooks(pruner.model), pruner.copied()
    assert (hooks(copied), hooks(pruner.model)) == ([""], before)
    assert len(before) > 5
    own.remove()
    assert_equal(snapshot(copied), snapshot(pruner.model))


def test_a_run_that_breaks_off_while_a_member_is_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on, also from a step before a member that was written, in whose place it puts the same."""
    saving = {"save_strategy": "steps", "save_steps": 4, "compute_metrics": None}
    whole_folder, folder = tmp_path / "whole" / "run", tmp_path / "broken" / "run"  # of one name, which cards have
    whole, _ = run(whole_folder, {}, **saving)
    written: list[Path] = []

    def broken(member: Path, *args: Any) -> Any:
        written.append(member)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write_card(member, *args)

    monkeypatch.setattr("hf_prune.training.family.write_card", broken)
    with pytest.raises(KeyboardInterrupt):
        run(folder, {}, **saving)
    made = {path.name for path in (folder).iterdir()}
    assert made == {"parameters-0.9", "family.json", "pictures", "checkpoint-4", "checkpoint-8"}
    left = folder / ".parameters-0.8-killed.unfinished"  # as a process that is killed leaves it
    left.mkdir()
    (left / "parameters-0.8.lock").touch()
    shutil.rmtree(folder / "checkpoint-8")
    resumed = trainer_for(
        folder,
        config(criterion="snip_momentum", target_parameters=[0.9, 0.8]),
        with_dropout(9),
        eval_dataset=ROWS[:16],
        eval_strategy="steps",
        eval_steps=4,
        **saving,
    )
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_equal(snapshot(resumed.model), snapshot(whole.model))
    assert files(folder) == files(whole_folder)
    assert not left.exists()


def test_a_run_to_speedups_resumes_with_the_costs_it_began_with(tmp_path: Path) -> None:
    """Those of its state count, not those of a table that has become another meanwhile."""
    table = tmp_path / "table.json"
    speed = {"target_speedup": [1.05, 1.2], "latency_table": str(table_of(tiny_bert(), table))}
    plain = {"eval_dataset": None, "eval_strategy": "no", "compute_metrics": None}
    whole, _ = run(tmp_path / "whole", speed, save_strategy="steps", save_steps=4, **plain)
    made = Family.load(tmp_path / "whole")
    table_of(tiny_bert(), table, 0.2)
    resumed = trainer_for(tmp_path / "resumed", config(criterion="snip_momentum", **speed), with_dropout(9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(snapshot(resumed.model), snapshot(whole.model))
    assert_equal(pruner_of(resumed).state_dict(), pruner_of(whole).state_dict())
    assert Family.load(tmp_path / "resumed") == made
    other, _ = run(tmp_path / "other", speed, **plain)
    assert any(not torch.equal(value, snapshot(whole.model)[name]) for name, value in snapshot(other.model).items())


def test_a_resumed_run_to_a_speedup_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(name: str, seed: int) -> Trainer:
        to = config(criterion="snip_momentum", target_speedup=1.01, latency_length=32, latency_batch_size=2)
        return trainer_for(tmp_path / name, to, tiny_bert(seed=seed, **TIMED), save_strategy="steps", save_steps=4)

    def measured(*given: Any) -> float:
        found.append(measured_speedup(*given))
        return found[-1]

    found: list[float] = []
    whole, resumed = trainer("whole", 0), trainer("resumed", 9)
    monkeypatch.setattr(costs, "measured_speedup", measured)
    with quickly_timed():
        whole.train()
    assert len(found) == 1, "the costs of blocks were not fitted to the whole model"
    for name in ("latency_table", "measured_speedup"):
        monkeypatch.delattr(costs, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(snapshot(resumed.model), snapshot(whole.model))
    assert_equal(pruner_of(resumed).state_dict(), pruner_of(whole).state_dict())


@pytest.mark.parametrize(
    ("setting", "protocol"),
    [
        ({}, "batch of 2 × 8, torch.float32, cpu, one thread, CPU time"),
        ({"dtype": "bfloat16", "threads": 2}, "batch of 2 × 8, torch.bfloat16, cpu, 2 threads, time"),
        ({"runtime": "onnx"}, "batch of 2 × 8, torch.float32, cpu (onnx), one thread, CPU time"),
        (None, None),
    ],
)
def test_the_speed_of_a_member_is_measured_where_its_blocks_were(
    setting: dict[str, Any] | None, protocol: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the setting of the table; and under mixed precision, which is the run's and not the model's."""
    plain: list[bool] = []

    def compared(model: Any, **given: Any) -> Comparison:
        plain.append(getattr(model.forward, "__func__", None) is type(model).forward)
        return compare(model, **given)

    monkeypatch.setattr("hf_prune.training.family.compare", compared)
    file = tmp_path / "table.json"
    table = table_of(tiny_bert(), file) if setting is None else timed_here(file, tiny_bert(), **setting)
    speed = {"target_speedup": [1.1], "latency_table": str(table)}
    with quickly_timed():
        trainer, _ = run(tmp_path / "run", speed, bf16=True, compute_metrics=None)
    family = Family.load(tmp_path / "run")
    assert family is not None
    assert (family.dense, [member.folder for member in family.members]) == (1.0, ["speedup-1.1"])
    for member in family.members:
        facts = CardFacts.load(tmp_path / "run" / member.folder)
        assert member.predicted >= member.asked
        if protocol is None:
            assert (member.measured, facts.comparison) == (None, None)
        else:
            assert facts.comparison is not None
            assert member.measured == facts.comparison["latency_ratio"] > 0
            assert facts.comparison["protocol"].startswith(protocol)
            assert facts.comparison["model"]["parameters"] == member.parameters
        text = (tmp_path / "run" / member.folder / "README.md").read_text()
        assert f"| weights on disk | {megabytes(4 * member.parameters)} (" in text
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / member.folder)
        assert saved.dtype == torch.float32
    assert plain == ([] if protocol is None else [True])
    assert "_original_forward" in vars(trainer.model)  # else mixed precision was not there to be left out


def test_a_reused_classifier_is_that_of_the_step(tmp_path: Path) -> None:
    """Distillation sets it after each step of the optimizer, before a member is saved."""
    kind = partial(
        DistillationTrainer,
        teacher=tiny_bert(seed=5, **WIDE),
        distillation={"alpha_task": 0.0, "alpha_logits": 0.0, "alpha_simkd": 1.0},
    )
    after: dict[int, torch.Tensor] = {}

    class Logged(TrainerCallback):  # when all callbacks have seen the end of the step
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after[state.global_step] = kwargs["model"].classifier.weight.clone()

    run(tmp_path, {}, kind, compute_metrics=None, callbacks=[Logged()])
    for step, folder in ((6, "parameters-0.9"), (12, "parameters-0.8")):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert torch.equal(model.classifier.weight, after[step])
    assert not torch.equal(after[5], after[6])


def test_what_would_fail_at_the_first_member_fails_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config(target_parameters=[0.9, 0.8]))
    (tmp_path / "family.json").write_text("[]")
    with pytest.raises(ValueError, match=r"family\.json must hold a JSON object"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_in_a_wrapper_is_saved_as_its_trainer_saves_it(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny("bert", "bare").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    parts, losses = (pytest.importorskip(f"sentence_transformers.{name}") for name in ("models", "losses"))
    modules = [parts.Transformer(str(tmp_path / "dense"), max_seq_length=16), parts.Pooling(32)]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    rows = Dataset.from_list(
        [{"first": "a b c", "second": "b c d", "score": 0.5}, {"first": "c a", "second": "d", "score": 0.1}] * 24
    )
    settings = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", "max_steps": 12, "disable_tqdm": True}
    seen = AtStepEnd(6)
    sentence_transformers.SentenceTransformerTrainer(
        model,
        sentence_transformers.SentenceTransformerTrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[PruningCallback(config(target_parameters=[0.9, 0.8])), seen],
    ).train()
    family = Family.load(tmp_path / "run")
    assert family is not None
    member = family.members[0]
    saved = sentence_transformers.SentenceTransformer(str(tmp_path / "run" / member.folder), device="cpu")
    assert sum(parameter.numel() for parameter in saved.parameters()) == member.parameters == member.predicted
    assert "loss" in member.metrics
    np.testing.assert_allclose(saved.encode(["a b", "c"]), seen.models[6].encode(["a b", "c"]), rtol=0, atol=1e-5)


def test_a_model_with_adapters_makes_no_family(tmp_path: Path) -> None:
    """Also where what is pruned has none."""
    model: Any = get_peft_model(tiny_bert(), LoraConfig(target_modules=["pooler.dense"]))
    trainer = trainer_for(tmp_path, config(target_parameters=[0.9, 0.8]), model)
    with pytest.raises(ConfigError, match=r"target_parameters=\[0\.9, 0\.8\]: is a family, and of a model with adapters"):
        trainer.train()


def test_trials_of_a_search_make_no_families(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    trainer = trainer_for(tmp_path, config(target_parameters=[0.9, 0.8]))
    with pytest.raises(ConfigError, match=r"target_parameters=\[0\.9, 0\.8\]: is a family, of which each trial"):
        trainer.train(trial=optuna.trial.FixedTrial({}))
    assert trainer.state.global_step == 0


class Overflow(TrainerCallback):
    """Lets gradients overflow at a step, under a scaler of gradients if one is given; without one, takes both back."""

    def __init__(self, step: int, scaler: torch.amp.GradScaler | None = None) -> None:
        self.step, self.scaler = step, scaler

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            kwargs["optimizer"].scaler = self.scaler
            kwargs["model"].classifier.weight.grad.fill_(0.0 if self.scaler is None else torch.inf)


def test_a_step_that_is_skipped_where_a_stage_ends_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruning = PruningCallback(config(target_parameters=[0.9, 0.8], cooldown_steps=0))
    around = [Overflow(6, torch.amp.GradScaler("cpu")), pruning, Overflow(6)]
    trainer = Trainer(tiny_bert(), arguments(tmp_path, num_train_epochs=2), train_dataset=ROWS, callbacks=around)
    with caplog.at_level(logging.WARNING, "hf_prune.training.family"):
        trainer.train()
    assert "parameters-0.9 misses its target: the optimizer skipped the step of the last mask update." in caplog.text
    family = Family.load(tmp_path)
    assert family is not None
    assert family.members[0].predicted > 0.9 * family.dense > 0.8 * family.dense >= family.members[1].predicted


def test_a_script_prints_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:16]))
    task = Task(AutoModelForSequenceClassification.from_pretrained, tokenizer(), data, default_data_collator)
    args = arguments(tmp_path, num_train_epochs=2, do_train=True, do_eval=True)
    metrics = run_stage(task, tiny_bert(), args, config(target_parameters=[0.9, 0.8]))
    family = Family.load(tmp_path)
    assert family is not None
    assert str(family) in capsys.readouterr().out
    assert family.members[-1].metrics["loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert {"model.safetensors", "condensed", "parameters-0.9", "parameters-0.8"} <= {path.name for path in tmp_path.iterdir()}
    assert not {"family.json", "parameters-0.9"} & {path.name for path in (tmp_path / "condensed").iterdir()}
