"""Interrupted runs, resumed: equal to the uninterrupted one bit for bit, whenever it died and wherever it goes on from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROWS, SCHEDULED, arguments, assert_equal, pruner_of, snapshot, tiny_bert, trainer_for, with_dropout
from killed_runs import KINDS, TERMINATED, TERMINATED_AND_KILLED
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hf_prune import Pruner, PruningCallback, PruningConfig, last_complete_checkpoint
from hf_prune.settings.config import WHILE_TRAINING
from hf_prune.training.checkpoints import STATE_NAME, checksum

EVERY_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


# ------------------------------------------------------------------------------------------------------------------ killed runs


SETTINGS = ["snip_momentum", "movement", "distillation", "activations", "family"]
#: How often runs are killed in the fast tests: one in every way, the others once; a family while it writes the second member.
KILLS = {"snip_momentum": 4, "movement": 1, "distillation": 1, "family": 1}


def kill(settings: list[str], kills: int, folder: Path) -> list[dict[str, Any]]:
    """Kill that many runs of each setting, and say what each kill did. One process runs all: what takes long is importing."""
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(folder), str(kills), "0", *settings]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"setting"')]


Killed = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    return folder, [
        report
        for kills in sorted(set(KILLS.values()))
        for report in kill([name for name in KILLS if KILLS[name] == kills], kills, folder)
    ]


@pytest.fixture(scope="module")
def often_killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("often")
    return folder, kill(SETTINGS, 12, folder)


@pytest.mark.parametrize("setting", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(setting: str, killed: Killed) -> None:
    check_resumed(setting, killed, KILLS[setting])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_goes_on_wherever_it_was_killed(setting: str, often_killed: Killed) -> None:
    reports = check_resumed(setting, often_killed, 12)
    left = [report for report in reports if report["checkpoints"] and report["resumed_from"] != report["checkpoints"][-1]]
    assert left, "no kill left half a checkpoint behind"
    ended = [report for report in reports if report["kind"] == TERMINATED and report["signal"] == 0]
    assert any(report["resumed_from"] != "checkpoint-12" for report in ended), "no run ended upon the signal"


def check_resumed(setting: str, killed: Killed, kills: int) -> list[dict[str, Any]]:
    home, every = killed
    reports = [report for report in every if report["setting"] == setting]
    print("\n".join(str(report) for report in reports))
    assert [report["kind"] for report in reports] == [KINDS[number % 4] for number in range(kills)]
    assert setting != "family" or reports[0]["save"] in (4, 7), "no kill struck while a member was written"
    whole = home / setting / "results" / "whole"
    for number, report in enumerate(reports):
        folder = home / setting / "results" / str(number)
        for name in ("model.safetensors", "pruner.safetensors"):
            assert_equal(load_file(folder / name), load_file(whole / name))
        assert files(folder) == files(whole)  # of a family
        ours, history = (json.loads((each / "metrics.json").read_text()) for each in (folder, whole))
        terminated = report["kind"] in (TERMINATED, TERMINATED_AND_KILLED)
        assert report["signal"] in ({0, signal.SIGTERM, signal.SIGKILL} if terminated else {signal.SIGKILL})
        assert ours == history
    return reports


def files(folder: Path) -> dict[str, bytes]:
    """What lies in the folders of the members of a family, unfinished ones too, and the record of them, without pictures."""
    found = [*folder.glob("*parameters*/*"), *folder.glob("family.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- exact resuming

#: Everything that has state of its own: score buffers, values that come back, activation sums, values to rewind to, locked zeros.
STATEFUL: dict[str, dict[str, Any]] = {
    "movement": {"pattern": "1x1", "criterion": "movement"},
    "derived timetable": {"pattern": "1x1", **dict.fromkeys(SCHEDULED)},
    "soft_movement": {
        "pattern": "head",
        "criterion": "soft_movement",
        "scope": "threshold",
        "threshold": 0.5,
        "regularization": 5.0,
    },
    "fisher": {"pattern": "neuron", "criterion": "fisher"},
    "wanda": {"pattern": "2:4", "criterion": "wanda", "scope": "local"},
    "apoz": {"pattern": "neuron", "criterion": "apoz"},
    "lottery": {"pattern": "1x1", "criterion": "magnitude", "schedule": "lottery"},
    "from_model": {"pattern": "4x1", "initial_sparsity": "from_model", "keep_zeros": True},
    "nested": {"pattern": "4x1", "criterion": "taylor", "rules": [{"pattern": "head"}]},
}


@pytest.mark.parametrize("step", [3, 4, 11])
@pytest.mark.parametrize("name", STATEFUL)
def test_every_criterion_resumes_exactly(name: str, step: int, tmp_path: Path) -> None:
    config = {**SCHEDULED, "frequency": 4, **STATEFUL[name]}
    whole = trainer_for(tmp_path / "whole", config, with_dropout(seed=0), save_strategy="steps", save_steps=step)
    whole.train()
    folder = shutil.move(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "moved away")
    trainer = trainer_for(tmp_path / "resumed", config, with_dropout(seed=9))
    trainer.train(resume_from_checkpoint=str(folder))
    assert_equal(snapshot(trainer.model), snapshot(whole.model))
    assert_equal(pruner_of(trainer).state_dict(), pruner_of(whole).state_dict())


@pytest.mark.parametrize(("delay", "evaluations"), [(0, [6, 12]), (2, [12])])
def test_a_checkpoint_at_the_end_of_an_epoch_comes_after_its_evaluation(delay: int, evaluations: list[int], tmp_path: Path) -> None:
    """An evaluation draws random numbers, which the resumed run would not."""
    config = {**STATEFUL["movement"], **SCHEDULED}
    given = {"eval_strategy": "epoch", "eval_delay": delay, "eval_dataset": ROWS[:8], "save_strategy": "steps", "save_steps": 6}
    whole = trainer_for(tmp_path / "whole", config, with_dropout(seed=0), **given)
    whole.train()
    assert [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry] == evaluations
    trainer = trainer_for(tmp_path / "resumed", config, with_dropout(seed=9), **given)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal(snapshot(trainer.model), snapshot(whole.model))
    assert_equal(pruner_of(trainer).state_dict(), pruner_of(whole).state_dict())
    losses = [[entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry] for each in (whole, trainer)]
    assert losses[0] == losses[1]


def test_a_new_process_resumes_exactly(tmp_path: Path) -> None:
    config = {**STATEFUL["movement"], **SCHEDULED}
    whole = trainer_for(tmp_path, config, with_dropout(seed=0), save_strategy="steps", save_steps=5)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-10")
    script = """
import sys, torch
from helpers import snapshot, trainer_for, with_dropout
from safetensors.torch import save_file
torch.set_num_threads(1)
trainer = trainer_for(sys.argv[1], eval(sys.argv[2]), with_dropout(seed=9))
trainer.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-5")
save_file(snapshot(trainer.model), sys.argv[1] + "/resumed.safetensors")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path), repr(config)], env=environment, check=True, capture_output=True)
    assert_equal(load_file(tmp_path / "resumed.safetensors"), snapshot(whole.model))


@pytest.mark.core
def test_a_plain_loop_resumes_exactly() -> None:
    config = PruningConfig(**STATEFUL["movement"], **SCHEDULED)

    def run(stop: int | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = tiny_bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = Pruner(model, config, total_steps=12)
        for step in range(12):
            if step == stop:
                saved = snapshot(model), pruner.state_dict(), optimizer.state_dict()
                model = tiny_bert(seed=9)
                model.load_state_dict(saved[0])
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                optimizer.load_state_dict(saved[2])
                pruner = Pruner(model, config, total_steps=12)
                pruner.load_state_dict(saved[1])
            batch = {key: torch.tensor([row[key] for row in ROWS[step * 4 : step * 4 + 4]]) for key in ROWS[0]}
            model(**batch).loss.backward()
            pruner.observe()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        return snapshot(model), pruner.state_dict()

    for left, right in zip(run(stop=5), run(stop=None)):
        assert_equal(left, right)


# ------------------------------------------------------------------------------------------------- checkpoints upon a signal


class Terminated(TrainerCallback):
    """Gets SIGTERM at an event of a step, or in its forward pass, and goes on when the Trainer has taken note of it."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.terminate)

    def of(self, trainer: Trainer) -> Trainer:
        (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, JITCheckpointCallback))
        self.manager: CheckpointManager = callback.jit_manager
        self.manager.kill_wait = 0
        trainer.model.register_forward_pre_hook(lambda *_: self.on_forward(None, trainer.state, None))
        trainer.add_callback(self)
        return trainer

    def on_forward(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def terminate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.manager.is_checkpoint_requested:
                time.sleep(0.001)


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module", params=[("movement", EVALUATED), ("wanda", {"eval_strategy": "epoch"})], ids=["movement", "wanda"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Trainer]:
    """The arguments of a run, and one that came to its end."""
    name, evaluated = request.param
    given = {"config": {**STATEFUL[name], **SCHEDULED, "frequency": 4}, "eval_dataset": ROWS[:8], **evaluated}
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), model=with_dropout(seed=0), **given)
    trainer.train()
    return given, trainer


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("on_train_begin", 0, 1),
        ("on_forward", 3, 4),
        ("on_pre_optimizer_step", 4, 5),
        ("on_optimizer_step", 5, 6),
        ("on_step_end", 4, 4),
        ("on_step_end", 6, 6),
        ("on_epoch_end", 6, 6),
        ("on_epoch_begin", 6, 7),
        ("on_forward", 11, 12),
    ],
)
def test_a_run_that_saves_when_it_is_terminated_goes_on_exactly(
    event: str, step: int, saved: int, uninterrupted: tuple[dict[str, Any], Trainer], tmp_path: Path
) -> None:
    given, whole = uninterrupted
    ended = Terminated(event, step).of(trainer_for(tmp_path, model=with_dropout(seed=0), enable_jit_checkpoint=True, **given))
    ended.train()
    assert ended.state.global_step == min(saved + 1, 12)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{saved}")
    trainer = trainer_for(tmp_path, model=with_dropout(seed=9), **given)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert_equal(snapshot(trainer.model), snapshot(whole.model))
    assert_equal(pruner_of(trainer).state_dict(), pruner_of(whole).state_dict())


def test_a_checkpoint_that_is_there_is_not_written_again_upon_the_signal(tmp_path: Path) -> None:
    saving = {"enable_jit_checkpoint": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED}, with_dropout(seed=0), **saving)
    saved: list[int] = []
    saves = type(
        "Saves", (TrainerCallback,), {"on_save": lambda self, args, state, control, **kwargs: saved.append(state.global_step)}
    )
    trainer.add_callback(saves)
    Terminated("on_save", 4).of(trainer).train()
    assert (saved, trainer.state.global_step) == ([2, 4], 5)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_run_without_pruning_saves_when_it_always_did(tmp_path: Path) -> None:
    plain = Trainer(tiny_bert(), arguments(tmp_path, enable_jit_checkpoint=True), train_dataset=ROWS)
    Terminated("on_forward", 4).of(plain).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# ---------------------------------------------------------------------------------------------- other checkpoints, other configs


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of every step of a run with 4x1 blocks."""
    folder = tmp_path_factory.mktemp("pruned")
    trainer_for(folder, {"pattern": "4x1", **SCHEDULED}, with_dropout(seed=0), **EVERY_STEP).train()
    return folder


@pytest.mark.parametrize("restore", [False, True])
def test_another_config_is_an_error_that_lists_the_fields(restore: bool, pruned_run: Path, tmp_path: Path) -> None:
    config = {"pattern": "4x1", **SCHEDULED, "target_sparsity": 0.8, "frequency": 1}
    trainer = trainer_for(tmp_path, config, restore_callback_states_from_checkpoint=restore)
    message = r"checkpoint-4 was .* a different config: target_sparsity was 0\.5, is 0\.8; frequency was 2, is 1\. .*allow_config"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(pruned_run / "checkpoint-4"))
    Pruner(trainer.model, PruningConfig(pattern="4x1"), total_steps=1)  # nothing stays attached


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    "change", [{"target_sparsity": 0.8}, {"pattern": "1x1", "criterion": "magnitude"}, {"criterion": "movement"}]
)
def test_another_config_goes_on_where_it_is_allowed(
    change: dict[str, Any], restore: bool, pruned_run: Path, tmp_path: Path
) -> None:
    config = PruningConfig.from_dict({"pattern": "4x1", **SCHEDULED, **change})
    callback = PruningCallback(config, allow_config_change=True)
    trainer = trainer_for(
        tmp_path,
        callback,
        with_dropout(seed=9),
        restore_callback_states_from_checkpoint=restore,
        save_strategy="steps",
        save_steps=5,
    )
    trainer.train(resume_from_checkpoint=str(pruned_run / "checkpoint-4"))
    pruner = pruner_of(trainer)
    assert pruner.config == config.filled(**WHILE_TRAINING)
    assert pruner.reached_sparsity() == pytest.approx(config.sparsity, abs=4 / 20992)
    if config.criterion != "movement":  # which lets weights come back
        for name, weight in load_file(pruned_run / "checkpoint-4" / "model.safetensors").items():
            if weight.ndim == 2 and "encoder" in name:
                assert not bool(trainer.model.state_dict()[name][weight == 0].any()), f"{name} came back"
    # What it writes belongs to the new config, so it resumes without more ado.
    again = trainer_for(tmp_path, config, with_dropout(seed=9))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(snapshot(again.model), snapshot(trainer.model))


class Begun(Exception):
    """A run was resumed, and is not needed further."""


class Ending(TrainerCallback):
    """Ends a run before its first step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise Begun


@pytest.mark.parametrize(
    ("change", "kept"), [({"target_sparsity": 0.8}, True), ({"criterion": "snip"}, False), ({"pattern": "1x4"}, False)]
)
def test_scores_go_on_where_the_rule_is_scored_as_before(
    change: dict[str, Any], kept: bool, pruned_run: Path, tmp_path: Path
) -> None:
    state = load_file(pruned_run / "checkpoint-3" / STATE_NAME)
    callback = PruningCallback({"pattern": "4x1", **SCHEDULED, **change}, allow_config_change=True)
    trainer = trainer_for(tmp_path, callback, with_dropout(seed=9), callbacks=[Ending()])
    with pytest.raises(Begun):
        trainer.train(resume_from_checkpoint=str(pruned_run / "checkpoint-3"))
    scores = {key for key in pruner_of(trainer).state_dict() if "/criterion/" in key}
    assert scores == ({key for key in state if "/criterion/" in key} if kept else set())


@pytest.mark.parametrize("schedule", ["cubic", "constant", "lottery"])
@pytest.mark.parametrize("restore", [False, True])
def test_pruning_starts_from_a_checkpoint_without_it(
    restore: bool, schedule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Trainer(tiny_bert(), arguments(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=2), train_dataset=ROWS)
    plain.train()
    config = PruningConfig(pattern="1x1", schedule=schedule, criterion="magnitude", **SCHEDULED)
    trainer = trainer_for(tmp_path, config, restore_callback_states_from_checkpoint=restore, **EVERY_STEP)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    at = {"cubic": 0.4375, "constant": 0.5, "lottery": 1 - 0.5**0.5}[schedule]
    last = 2 if schedule == "constant" else 10
    (message,) = [record.getMessage() for record in caplog.records if record.name == "hf_prune.training.callback"]
    assert message.endswith(
        f"checkpoint-6 was written without PruningCallback: pruning starts at step 6, where the schedule requests sparsity "
        f"{at:.4f}; the last mask update is at step {last}."
    )
    logged = {entry["step"]: entry["reached_sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    assert logged[7] == pytest.approx(at, abs=1e-4)
    assert logged[12] == pytest.approx(0.5, abs=1e-4)
    again = trainer_for(tmp_path, config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal(snapshot(again.model), snapshot(trainer.model))


def test_a_run_without_pruning_between_two_with_it(pruned_run: Path, tmp_path: Path) -> None:
    # The Trainer carries the entry of a callback that is gone from checkpoint to checkpoint.
    plain = Trainer(with_dropout(seed=9), arguments(tmp_path, num_train_epochs=2, **EVERY_STEP), train_dataset=ROWS)
    plain.train(resume_from_checkpoint=str(pruned_run / "checkpoint-4"))
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert pruner_of(trainer).reached_sparsity() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("before", ["without pruning", "with another config"])
def test_the_best_model_of_an_earlier_run(before: str, tmp_path: Path) -> None:
    saving: dict[str, Any] = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "eval_dataset": ROWS[:8],
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    scores = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    settings = saving | {"compute_metrics": lambda _: {"score": next(scores)}}
    if before == "without pruning":
        first = trainer_for(tmp_path, {"pattern": "1x1"}, **settings)
        first.remove_callback(PruningCallback)
    else:
        first = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED, "cooldown_steps": 8}, **settings)
    first.train()
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    config = PruningConfig.from_dict({"pattern": "1x1", **SCHEDULED, "cooldown_steps": 8})
    trainer = trainer_for(tmp_path, PruningCallback(config, allow_config_change=True), **settings)
    trainer.train(resume_from_checkpoint=True)
    # An unpruned model does not compete; one that was pruned to the target by other settings does, with its own masks.
    best = {"without pruning": 10, "with another config": 4}[before]
    assert trainer.state.best_global_step == best
    assert_equal(snapshot(trainer.model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert pruner_of(trainer).reached_sparsity() == pytest.approx(0.5, abs=1e-3)


class Elsewhere(Trainer):
    """Puts checkpoints where no other Trainer does."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / "elsewhere")


def test_a_checkpoint_without_the_state_of_the_pruner_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "4x1"}, kind=Elsewhere, **EVERY_STEP)
    with pytest.raises(RuntimeError, match=r"checkpoint of step 1 is not in .*, where the Trainer puts checkpoints"):
        trainer.train()


def test_a_longer_run_goes_on(pruned_run: Path, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED}, num_train_epochs=4)
    trainer.train(resume_from_checkpoint=str(pruned_run / "checkpoint-12"))
    logged = [entry["reached_sparsity"] for entry in trainer.state.log_history if entry["step"] >= 12 and "sparsity" in entry]
    assert logged == pytest.approx([0.5] * len(logged), abs=1e-3)


@pytest.mark.parametrize("config", [{"pattern": "4x1"}, {"pattern": "1x1", "criterion": "movement"}])
def test_a_second_train_keeps_the_masks(config: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {**config, **SCHEDULED})
    trainer.train()
    before = pruner_of(trainer).reached_sparsity()
    gone = {name: weight == 0 for name, weight in snapshot(trainer.model).items() if "encoder" in name and weight.ndim == 2}
    trainer.train()
    logged = [entry["reached_sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [before] * 12
    if config["pattern"] == "4x1":
        assert all(not bool(trainer.model.state_dict()[name][mask].any()) for name, mask in gone.items())


# --------------------------------------------------------------------------------------------------------- complete checkpoints


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", STATE_NAME)


@pytest.mark.parametrize("damage", ["missing", "cut short", "of another step"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(name: str, damage: str, pruned_run: Path, tmp_path: Path) -> None:
    for step in (7, 8):
        shutil.copytree(pruned_run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-9").write_text("a file")
    shutil.copytree(pruned_run / "checkpoint-9", tmp_path / "checkpoint-10-old")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    path = tmp_path / "checkpoint-8" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        shutil.copy(pruned_run / "checkpoint-6" / name, path)
    if (name, damage) != ("trainer_state.json", "of another step"):  # its record is of another step too
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")


def test_checkpoints_of_other_runs_are_judged_by_their_files(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    plain = Trainer(tiny_bert(), arguments(tmp_path, save_strategy="steps", save_steps=3), train_dataset=ROWS)
    plain.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    optimizer = tmp_path / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    model = tmp_path / "checkpoint-3" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    assert last_complete_checkpoint(tmp_path) is None


def test_resuming_from_half_a_checkpoint_is_an_error(pruned_run: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned_run / "checkpoint-8", tmp_path / "checkpoint-8")
    shutil.copy(pruned_run / "checkpoint-6" / STATE_NAME, tmp_path / "checkpoint-8" / STATE_NAME)
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED})
    with pytest.raises(ValueError, match=rf"checkpoint-8 is incomplete: {STATE_NAME} is missing or does not .* last_complete"):
        trainer.train(resume_from_checkpoint=True)


PRUNED, PLAIN = "with pruning", "without pruning"


@pytest.fixture(scope="module")
def runs(pruned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of a run that records what it writes, and of one that does not."""
    folder = tmp_path_factory.mktemp("plain")
    Trainer(tiny_bert(), arguments(folder, save_strategy="steps", save_steps=1, max_steps=8), train_dataset=ROWS).train()
    return {PRUNED: pruned_run, PLAIN: folder}


def overwritten(path: Path) -> None:
    """Other bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)


#: What happened to a checkpoint → the runs in which that can be seen, what is said about it, and how it is done.
DAMAGES: dict[str, tuple[tuple[str, ...], str, Callable[[Path], object]]] = {
    "weights overwritten": ((PRUNED,), r"was changed after .*model\.safetensors", lambda p: overwritten(p / "model.safetensors")),
    "optimizer overwritten": ((PRUNED, PLAIN), r"optimizer\.pt", lambda p: overwritten(p / "optimizer.pt")),
    "arguments overwritten": ((PRUNED, PLAIN), r"training_args\.bin", lambda p: overwritten(p / "training_args.bin")),
    "the random state of one process": (
        (PLAIN,),
        r"has no rng_state_1\.pth: not all processes",
        lambda p: (p / "rng_state.pth").rename(p / "rng_state_0.pth"),
    ),
    "no random state of one of four": (
        (PLAIN,),
        r"has no rng_state_2\.pth: not all processes",
        lambda p: [shutil.copy(p / "rng_state.pth", p / f"rng_state_{rank}.pth") for rank in (0, 1, 3)],
    ),
    **{
        f"a state that is {text[:30]}": (
            (PRUNED, PLAIN),
            rf"trainer_state\.json cannot be read \(.*{said}",
            lambda p, text=text: (p / "trainer_state.json").write_text(text),
        )
        for text, said in {
            "": "Expecting value",
            "null": "mapping, not NoneType",
            "[]": "mapping, not list",
            "8": "mapping, not int",
            '{"step": 8}': "unexpected keyword argument 'step'",
            '{"global_step": "8"}': "global_step is '8'",
            '{"global_step": 8.0}': "global_step is 8.0",
            '{"global_step": true}': "global_step is True",
            '{"global_step": 8, "log_history": {}}': "log_history is {}",
            '{"global_step": 8, "epoch": null}': "epoch is None",
            '{"global_step": 8, "best_metric": "high"}': "best_metric is 'high'",
            '{"global_step": 8, "stateful_callbacks": [1]}': "must inherit",
            '{"global_step": 8, "stateful_callbacks": 1}': "not iterable",
        }.items()
    },
}


@pytest.mark.parametrize(("damage", "run"), [(damage, run) for damage, (seen_in, _, _) in DAMAGES.items() for run in seen_in])
def test_what_is_skipped_and_why(
    damage: str, run: str, runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (7, 8):
        shutil.copytree(runs[run] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert not caplog.records
    _, said, harm = DAMAGES[damage]
    harm(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")
    (record,) = caplog.records
    assert re.match(rf"Skipped a checkpoint: {tmp_path}/checkpoint-8.*{said}", record.getMessage())


ENTRIES: list[Any] = [None, [], 8, {"attributes": None}, {"attributes": {"written": 8}}, {"attributes": {"written": {"step": 8}}}]


@pytest.mark.parametrize("entry", [*ENTRIES, {"attributes": {"written": {"step": 8, "crc32": ["model.safetensors"]}}}])
def test_a_checkpoint_with_an_entry_that_records_nothing_is_judged_by_its_files(
    entry: Any, pruned_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned_run / "checkpoint-8", tmp_path / "checkpoint-8")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"]["PruningCallback"] = entry
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert last_complete_checkpoint(tmp_path) == str(folder)
    overwritten(folder / "optimizer.pt")
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["._model.safetensors", ".DS_Store", ".cache/index.json"])
@pytest.mark.parametrize("run", [PRUNED, PLAIN])
def test_files_that_a_file_system_leaves_behind_do_not_matter(run: str, name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[run] / "checkpoint-8", tmp_path / "checkpoint-8")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\0\5\x16\7")
    assert last_complete_checkpoint(tmp_path) == str(folder)


def test_what_was_there_while_a_checkpoint_was_written_and_went_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / ".nfs01").write_text("")
    trainer_for(tmp_path, {"pattern": "4x1"}, max_steps=1, **EVERY_STEP).train()
    (tmp_path / "checkpoint-1" / ".nfs01").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("content", [b"", b"0", bytes(range(256)) * 12_288])
def test_checksums_are_those_of_the_whole_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert checksum(path) == f"{zlib.crc32(content):08x}"
