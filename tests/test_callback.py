"""Real Trainer runs: what checkpoints, logs, resuming and the best model are worth while a model is pruned."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROWS, SCHEDULED, Gradients, assert_equal, pruner_of, snapshot, tiny_bert, trainer_for, with_dropout
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    default_data_collator,
)

from hf_prune import ConfigError, Pruner, PruningCallback, PruningConfig, condense, print_sparsity, sparsity_report
from hf_prune.training.checkpoints import STATE_NAME

#: Pattern → ends of the names of the modules it is about, and target sparsity.
PATTERNS: dict[str, tuple[tuple[str, ...], float]] = {
    "1x1": (("dense", "query", "key", "value"), 0.7),
    "2:4": (("dense", "query", "key", "value"), 0.5),
    "4x1": (("dense", "query", "key", "value"), 0.7),
    "1xchannel": (("dense", "query", "key", "value"), 0.5),
    "head": (("query", "key", "value", "attention.output.dense"), 0.5),
    "neuron": (("intermediate.dense", "output.dense"), 0.5),
}


def logs_of(trainer: Trainer) -> dict[int, dict[str, float]]:
    """Step → the training log of that step."""
    return {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}


def targeted(model: nn.Module, pattern: str) -> dict[str, Tensor]:
    """The weights in the body that a pattern is about, found without hf_prune."""
    ends = PATTERNS[pattern][0]
    return {
        f"bert.{name}.weight": module.weight.detach()
        for name, module in model.bert.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends) and not (pattern == "neuron" and "attention" in name)
    }


def share_of_zeros(weights: dict[str, Tensor]) -> float:
    """Counted from the values."""
    return sum(int((weight == 0).sum()) for weight in weights.values()) / sum(weight.numel() for weight in weights.values())


def cubic(step: int, target: float, begin: int = 2, end: int = 10) -> float:
    """The schedule, written out: 0 in warm-up, then s − s·(1 − p)³."""
    if step < begin:
        return 0.0
    progress = min((step - begin) / (end - begin), 1.0)
    return target - target * (1 - progress) ** 3


# ----------------------------------------------------------------------------------------------------------- checkpoints and logs


@pytest.mark.core
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_checkpoint_holds_the_logged_share_of_zeros(pattern: str, tmp_path: Path) -> None:
    target = PATTERNS[pattern][1]
    config = PruningConfig(pattern=pattern, target_sparsity=target, **SCHEDULED)
    trainer = trainer_for(tmp_path, config, save_strategy="steps", save_steps=1)
    within = {"head": 1 / 12, "neuron": 1 / 120, "1xchannel": 40 / 20992, "4x1": 4 / 20992}.get(pattern, 1 / 20992)
    trainer.train()
    logs = logs_of(trainer)
    assert list(logs) == list(range(1, 13))
    gone: dict[str, Tensor] = {}
    for step, log in logs.items():
        model, info = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}", output_loading_info=True)
        assert not any(info.values())
        weights = targeted(model, pattern)
        assert log["reached_sparsity"] == share_of_zeros(weights)
        assert log["target_sparsity"] == pytest.approx(cubic(step, target), abs=1e-12)
        asked_for = cubic(step - step % 2, target) if step < 10 else target
        assert log["reached_sparsity"] == pytest.approx(asked_for, abs=within)
        for name, weight in weights.items():
            assert bool((weight == 0)[gone.get(name, torch.zeros_like(weight)).bool()].all()), f"{name} came back at {step}"
            gone[name] = weight == 0
    assert logs[12]["reached_sparsity"] > 0.9 * target
    assert_equal(load_file(tmp_path / "checkpoint-12" / "model.safetensors"), snapshot(trainer.model))


@pytest.mark.core
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_target_is_reached_exactly(scope: str, tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", target_sparsity=0.7, scope=scope, **SCHEDULED)
    trainer = trainer_for(tmp_path, config)
    trainer.train()
    weights = targeted(trainer.model, "1x1")
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    if scope == "local":
        assert zeros == sum(round(0.7 * weight.numel()) for weight in weights.values())
    else:
        assert zeros == round(0.7 * sum(weight.numel() for weight in weights.values()))


def test_checkpoints_load_where_hf_prune_is_not_installed(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, PruningConfig(pattern="1x1", **SCHEDULED), save_strategy="steps", save_steps=3)
    trainer.train()
    script = """
import json, sys
sys.modules["hf_prune"] = None
from transformers import AutoModelForSequenceClassification
shares = {}
for folder in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    weights = [weight for name, weight in model.bert.named_parameters() if weight.ndim == 2 and "embeddings" not in name]
    shares[folder] = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
print(json.dumps(shares))
"""
    folders = {step: str(tmp_path / f"checkpoint-{step}") for step in (3, 6, 9, 12)}
    result = subprocess.run([sys.executable, "-c", script, *folders.values()], capture_output=True, text=True, check=True)
    shares = json.loads(result.stdout.splitlines()[-1])
    assert {step: shares[folder] for step, folder in folders.items()} == {
        step: logs_of(trainer)[step]["reached_sparsity"] for step in folders
    }


def test_other_weights_are_never_zeroed_and_keep_training(tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", target_modules=["intermediate.dense"], target_sparsity=0.9, **SCHEDULED)
    trainer = trainer_for(tmp_path, config, save_strategy="steps", save_steps=1)
    before = snapshot(trainer.model)
    trainer.train()
    for step in range(1, 13):
        after = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for name, weight in after.items():
            if "intermediate.dense.weight" in name:
                alive = weight != 0
                assert not torch.equal(weight[alive], before[name][alive]), f"{name} stands still at {step}"
            else:
                assert torch.equal(weight == 0, before[name] == 0), f"{name} was pruned"
                assert not torch.equal(weight, before[name]), f"{name} stands still at {step}"
        before = after


def test_masked_weights_receive_no_gradient(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, PruningConfig(pattern="1x1", **SCHEDULED), save_strategy="steps", save_steps=1)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    for step in range(3, 12):
        before = load_file(tmp_path / f"checkpoint-{step - 1}" / "model.safetensors")
        for name in targeted(trainer.model, "1x1"):
            gradient = gradients.steps[step - 1][name]
            assert not bool(gradient[before[name] == 0].any())
            assert bool(gradient[before[name] != 0].any())


@pytest.mark.parametrize("criterion", ["snip_momentum", "taylor", "magnitude"])
def test_gradient_accumulation_counts_optimizer_steps(criterion: str, tmp_path: Path) -> None:
    config = PruningConfig(pattern="4x1", criterion=criterion, **SCHEDULED)
    runs = {}
    for size in (8, 4):
        # Nothing moves at a learning rate of 0, so the scores differ by a factor at most.
        trainer = trainer_for(
            tmp_path, config, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=0.0
        )
        trainer.train()
        assert pruner_of(trainer).steps == trainer.state.global_step == 12
        runs[size] = trainer
    keys = ("reached_sparsity", "target_sparsity")
    assert [[log[key] for key in keys] for log in logs_of(runs[8]).values()] == [
        [log[key] for key in keys] for log in logs_of(runs[4]).values()
    ]
    assert_equal(snapshot(runs[8].model), snapshot(runs[4].model))


def test_epochs_are_those_of_the_trainer(tmp_path: Path) -> None:
    # Two epochs of 12 batches, 5 to a step and 2 in the last one: 3 steps an epoch.
    config = PruningConfig(pattern="1x1", warmup_epochs=1, cooldown_epochs=0.34, frequency=1)
    trainer = trainer_for(tmp_path, config, per_device_train_batch_size=4, gradient_accumulation_steps=5)
    trainer.train()
    asked_for = [log["target_sparsity"] for log in logs_of(trainer).values()]
    assert asked_for == pytest.approx([0, 0, 0, cubic(4, 0.5, 3, 5), 0.5, 0.5])


def test_evaluation_logs_carry_sparsity_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, PruningConfig(pattern="1x1", **SCHEDULED), eval_dataset=ROWS, eval_strategy="epoch")
    untouched = trainer.evaluate()
    assert "sparsity" not in untouched
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"]]
    assert [entry["reached_sparsity"] for entry in evaluations] == [logs_of(trainer)[step]["reached_sparsity"] for step in (6, 12)]


class Recorder(TrainerCallback):
    """Keeps what `on_log` is given, as a logger would."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


#: How a callback reaches a Trainer.
WAYS = ("callbacks", "add_callback")


def trained_with_loggers(way: str, folder: Path, **overrides: Any) -> tuple[Trainer, Recorder]:
    """A Trainer that has trained, whose first callback is a logger, where those of `report_to` are."""
    trainer = trainer_for(folder, PruningConfig(pattern="1x1", **SCHEDULED), **overrides)
    if way == "add_callback":
        trainer.add_callback(trainer.pop_callback(PruningCallback))
    recorder = Recorder()
    trainer.callback_handler.callbacks.insert(0, recorder)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("way", WAYS)
def test_loggers_and_console_get_sparsity_wherever_the_callback_stands(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, recorder = trained_with_loggers(way, tmp_path)
    known = {step: log["sparsity"] for step, log in logs_of(trainer).items()}
    assert known[12] == pytest.approx(0.5, abs=1e-4)
    assert [log["sparsity"] for log in recorder.logs] == [*known.values(), known[12]]  # the last says how long training took
    assert [{**log, "step": entry["step"]} for log, entry in zip(recorder.logs, trainer.state.log_history)] == (
        trainer.state.log_history
    )
    assert sum("'sparsity'" in line for line in capsys.readouterr().out.splitlines()) == 13


@pytest.mark.parametrize("way", WAYS)
def test_tensorboard_gets_sparsity(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer, _ = trained_with_loggers(way, tmp_path / "out", report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    written = {event.step: event.value for event in events.Scalars("train/sparsity")}
    assert written == pytest.approx({step: log["sparsity"] for step, log in logs_of(trainer).items()})


def test_the_log_says_when_pruning_starts_and_with_what_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        trainer_for(tmp_path, PruningConfig(pattern="1x1", **SCHEDULED)).train()
    assert [record.getMessage() for record in caplog.records if record.name == "hf_prune.training.callback"] == [
        "Pruning starts at step 0 of 12: 1x1 50.00%, from step 4 to 10 in 4 updates.",
        "Pruning ended at step 12: sparsity 0.5000, reached_sparsity 0.5000, target_sparsity 0.5000.",
    ]


@pytest.mark.parametrize("way", ["steps", "epochs"])
def test_a_config_without_a_timetable_prunes_gradually_and_leaves_steps_to_recover(way: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"max_steps": 75} if way == "steps" else {"num_train_epochs": 12.5}
    trainer = trainer_for(tmp_path, PruningConfig(pattern="neuron"), **overrides)
    trainer.train()
    sparsity = [log["reached_sparsity"] for log in logs_of(trainer).values()]
    assert len(sparsity) == 75
    rises = [step for step, (before, after) in enumerate(zip([0.0, *sparsity], sparsity), start=1) if after > before]
    assert len(rises) >= 10
    assert (rises[0] > 7, rises[-1] <= 53) == (True, True)
    assert max(after - before for before, after in itertools.pairwise(sparsity)) < 0.15
    assert sparsity[-1] == pytest.approx(0.5, abs=0.01)


def test_sparsity_means_the_same_in_logs_report_plan_and_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of heads a part of the body's weights is pruned: the share of the body and that of the heads have two names."""
    trainer = trainer_for(tmp_path, PruningConfig(pattern="head", scope="local", **SCHEDULED))
    trainer.train()
    log, report = trainer.state.log_history[-1], sparsity_report(trainer.model)
    zeros = sum(module.zeros for module in report.modules)
    assert log["reached_sparsity"] == log["target_sparsity"] == 0.5
    assert 0 < log["sparsity"] < 0.5
    assert log["sparsity"] == report.sparsity == pruner_of(trainer).sparsity()
    assert pruner_of(trainer).plan().sparsity == pytest.approx(report.sparsity)
    assert f"{report.sparsity:.2%} of the body's weights" in str(pruner_of(trainer).plan())
    capsys.readouterr()
    print_sparsity(trainer.model)
    weights = sum(module.parameters for module in report.modules)
    assert capsys.readouterr().out == (
        f"zero weights: {zeros:,} || body weights: {weights:,} || sparsity%: {100 * zeros / weights:.4f}\n"
    )
    condense(trainer.model)
    assert pruner_of(trainer).sparsity() == sparsity_report(trainer.model).sparsity == 0


# --------------------------------------------------------------------------------------------------------------- loops and resuming


@pytest.mark.core
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("pattern", ["1x1", "head"])
def test_a_plain_loop_equals_the_trainer(optimizer: str, pattern: str, tmp_path: Path) -> None:
    config = PruningConfig(pattern=pattern, **SCHEDULED)
    trainer = trainer_for(tmp_path, config, optim=optimizer, train_sampling_strategy="sequential", max_grad_norm=0.0)
    trainer.train()

    model = tiny_bert().train()
    steps = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optimizer](model.parameters(), lr=1e-3, weight_decay=0.0)
    loader = DataLoader(ROWS, batch_size=8, collate_fn=default_data_collator)
    pruner = Pruner(model, config, total_steps=12)
    logged = []
    for _ in range(2):
        for batch in loader:
            model(**batch).loss.backward()
            pruner.observe()
            steps.step()
            pruner.step()
            steps.zero_grad()
            logged.append((pruner.reached_sparsity(), pruner.target_sparsity()))
    pruner.finish()
    assert_equal(snapshot(model), snapshot(trainer.model))
    assert logged == [(log["reached_sparsity"], log["target_sparsity"]) for log in logs_of(trainer).values()]


@pytest.fixture(scope="module", params=["snip_momentum", "taylor"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PruningConfig, Path, Trainer]:
    """A run with shuffled rows and dropout that saved a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rules = [{"pattern": "head", "criterion": request.param}]
    config = PruningConfig(pattern="4x1", criterion=request.param, rules=rules, **SCHEDULED)
    trainer = trainer_for(folder, config, with_dropout(seed=0), save_strategy="steps", save_steps=1)
    trainer.train()
    return config, folder, trainer


@pytest.mark.core
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_resumed_run_equals_the_uninterrupted_one(
    step: int, restore: bool, uninterrupted: tuple[PruningConfig, Path, Trainer], tmp_path: Path
) -> None:
    config, folder, whole = uninterrupted
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer = trainer_for(
        tmp_path,
        config,
        with_dropout(seed=9),
        save_strategy="steps",
        save_steps=4,
        restore_callback_states_from_checkpoint=restore,
    )
    trainer.train(resume_from_checkpoint=True)
    assert_equal(snapshot(trainer.model), snapshot(whole.model))
    assert_equal(pruner_of(trainer).state_dict(), pruner_of(whole).state_dict())
    for name in ("model.safetensors", STATE_NAME):
        saved = (load_file(path / "checkpoint-12" / name) for path in (tmp_path, folder))
        assert_equal(*saved)
    keys = ("loss", "sparsity", "reached_sparsity", "target_sparsity")
    resumed, expected = ({at: [log[key] for key in keys] for at, log in logs_of(run).items()} for run in (trainer, whole))
    assert resumed == expected


# --------------------------------------------------------------------------------------------------------------------- best model


def scripted(*scores: float) -> Any:
    """Metrics that go the way a test wants."""
    upcoming: Iterator[float] = iter(scores)
    return lambda _: {"score": next(upcoming)}


#: Evaluated and saved after every second step.
BEST: dict[str, Any] = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "eval_dataset": ROWS[:8],
}


def test_the_best_model_is_one_of_the_final_sparsity(tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", cooldown_steps=6, frequency=2)
    trainer = trainer_for(tmp_path, config, compute_metrics=scripted(10, 9, 5, 7, 6, 6.5), **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 8
    assert trainer.state.best_metric == 7
    assert_equal(snapshot(trainer.model), load_file(tmp_path / "checkpoint-8" / "model.safetensors"))
    assert share_of_zeros(targeted(trainer.model, "1x1")) == pytest.approx(0.5, abs=1e-4)


class StopAfter(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.core
def test_the_best_model_brings_its_own_masks(tmp_path: Path) -> None:
    # Evaluated at step 4 and stopped after step 6: the best model is less sparse than the last one.
    config = PruningConfig(pattern="1x1", frequency=1)
    trainer = trainer_for(tmp_path, config, compute_metrics=scripted(1.0), **BEST | {"save_steps": 4, "eval_steps": 4})
    trainer.add_callback(StopAfter(6))
    trainer.train()
    logs = logs_of(trainer)
    assert trainer.state.best_global_step == 4
    assert logs[4]["reached_sparsity"] < logs[6]["reached_sparsity"]
    assert_equal(snapshot(trainer.model), load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert pruner_of(trainer).reached_sparsity() == logs[4]["reached_sparsity"]
    assert_equal(pruner_of(trainer).state_dict(), load_file(tmp_path / "checkpoint-4" / STATE_NAME))


@pytest.mark.parametrize("restore", [False, True])
def test_the_best_model_survives_resuming(restore: bool, tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", cooldown_steps=6, frequency=2)
    whole = trainer_for(tmp_path, config, compute_metrics=scripted(10, 9, 5, 7, 6, 6.5), **BEST)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    trainer = trainer_for(tmp_path, config, compute_metrics=scripted(6.5), restore_callback_states_from_checkpoint=restore, **BEST)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_global_step == 8
    assert_equal(snapshot(trainer.model), snapshot(whole.model))


def test_a_best_model_from_before_resuming_that_was_not_sparse_enough_is_forgotten(tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", cooldown_steps=6, frequency=2)
    whole = trainer_for(tmp_path, config, compute_metrics=scripted(10, 9, 5, 7, 6, 6.5), **BEST)
    whole.train()
    for step in (6, 8, 10, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    trainer = trainer_for(tmp_path, config, compute_metrics=scripted(5, 7, 6, 6.5), **BEST)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_global_step == 8


# -------------------------------------------------------------------------------------------------------------------------- errors


def test_a_config_that_does_not_fit_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "1x1", "warmup_steps": 10, "cooldown_steps": 2})
    before = snapshot(trainer.model)
    with pytest.raises(ConfigError, match=r"warmup_steps=10: .* 12 steps"):
        trainer.train()
    assert_equal(snapshot(trainer.model), before)


def test_training_can_start_again_after_an_interruption(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, PruningConfig(pattern="1x1", **SCHEDULED))
    whole, trainer.train_dataset = trainer.train_dataset, [*ROWS[:47], {"input_ids": [1]}]
    with pytest.raises((KeyError, ValueError)):
        trainer.train()
    trainer.train_dataset = whole
    trainer.train()
    assert share_of_zeros(targeted(trainer.model, "1x1")) == pytest.approx(0.5, abs=1e-4)


def test_a_trainer_that_was_never_started_says_so(tmp_path: Path) -> None:
    callback = PruningCallback({"pattern": "1x1"})
    trainer = trainer_for(tmp_path, PruningConfig(pattern="1x1"))
    with pytest.raises(RuntimeError, match="on_train_begin was not called"):
        callback.on_optimizer_step(trainer.args, trainer.state, trainer.control)
