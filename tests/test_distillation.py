"""Distillation: the losses against slow references, accumulation, padding, evaluation, and what must not change."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_cases import (
    ALL_LOSSES,
    EVERY_LOSS,
    LAYERED,
    TASKS,
    WIDE,
    distiller,
    in_float64,
    sequence_task,
    slow_attention,
    slow_closest,
    slow_divergence,
    slow_losses,
    token_task,
    train,
    training_logs,
)
from helpers import LENGTH, Gradients, arguments, assert_equal, ragged_rows, snapshot, tiny_bert
from models import prune_randomly, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer, TrainerCallback

from hf_prune import ConfigError, DistillationConfig, DistillationTrainer, condense
from hf_prune.distillation.layers import closest_layers, layer_pairs
from hf_prune.distillation.losses import attention_loss, hidden_loss, logits_loss

# ----------------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logits_loss_equals_its_formula(classes: int, temperature: float) -> None:
    torch.manual_seed(classes)
    student, teacher = torch.randn(3, 4, classes), torch.randn(3, 4, classes)
    mask = torch.rand(3, 4) > 0.4
    expected = sum(slow_divergence(student[i, j], teacher[i, j], temperature) for i, j in mask.nonzero().tolist())
    torch.testing.assert_close(logits_loss(student, teacher, mask, temperature), expected)
    assert logits_loss(student, student, mask, temperature) == pytest.approx(0, abs=1e-6)


def test_hidden_loss_leaves_padding_out() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    loss = hidden_loss(student, teacher, mask)
    expected = sum((student[i, j] - teacher[i, j]).square().mean() for i, j in mask.nonzero().tolist())
    torch.testing.assert_close(loss, expected)
    teacher[~mask] += 100
    assert torch.equal(hidden_loss(student, teacher, mask), loss)
    teacher[0, 0] += 1
    assert not torch.equal(hidden_loss(student, teacher, mask), loss)


#: Settings and what the teacher's config changes, by name; each with the task it is tried on in the fast tests.
LOSSES: dict[str, tuple[DistillationConfig, dict[str, Any]]] = {
    "task, logits, hidden": (ALL_LOSSES, {}),
    "hidden, wider": (DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_hidden=0.7), WIDE),
    "layers, uniform": (DistillationConfig(alpha_hidden_layers=0.7), WIDE),
    "layers, last": (DistillationConfig(alpha_hidden_layers=0.7, layer_map="last"), {}),
    "layers, pairs": (DistillationConfig(alpha_hidden_layers=0.7, alpha_attention=0.3, layer_map=[[0, 2], [2, 0]]), {}),
    "layers, dynamic": (DistillationConfig(alpha_hidden_layers=0.7, alpha_attention=0.3, layer_map="dynamic"), WIDE),
    "attention": (DistillationConfig(alpha_attention=5.0), {}),
    "attention, more heads": (DistillationConfig(alpha_attention=5.0), WIDE),
    "simkd": (DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_simkd=3.0), {}),
    "every loss, wider": (EVERY_LOSS, WIDE),
}


def check_accumulation(task: str, settings: DistillationConfig, changes: dict[str, Any], folder: Path, seed: int = 1) -> None:
    """Batches of 1×16, 2×8 and 4×4, and a ragged one of 5, give the losses and gradients of the reference in float64."""
    teacher, rows = TASKS[task](seed=seed, count=21, **changes)
    reference = TASKS[task](seed=0, count=21)[0]
    runs = {}
    for size in (16, 8, 4):
        # Nothing moves at a learning rate of 0, so both steps can be compared.
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        runs[size] = train(folder, copy.deepcopy(reference), teacher, rows, settings, learning_rate=0.0, **accumulation)
    trainer = runs[16][0]
    projections = {
        name.removesuffix(".weight"): weight.detach().double().requires_grad_()
        for name, weight in trainer.projections.named_parameters()
    }
    student, teacher = in_float64(reference).train(), in_float64(teacher).eval()
    if settings.alpha_simkd:
        take_classifier(student, teacher, projections)
    depths = {stack: [len(part) for part in parts] for stack, parts in layer_lists(student, teacher).items()}
    pairs = {stack: layer_pairs(settings.layer_map, *each) for stack, each in depths.items()}
    for step, batch in enumerate((rows[:16], rows[16:])):
        losses = slow_losses(student, teacher, batch, settings, pairs, projections)
        total = sum(weight * losses[name] for name, weight in settings.weights().items() if weight)
        student.zero_grad()
        for weight in projections.values():
            weight.grad = None
        total.backward()
        expected = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
        expected |= {f"projections.{name}.weight": weight.grad for name, weight in projections.items()}
        for size, (trainer, gradients) in runs.items():
            assert len(gradients) == 2
            assert expected.keys() <= gradients[step].keys()
            for name, gradient in gradients[step].items():
                wanted = expected.get(name, torch.zeros_like(gradient)).float()
                torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6, msg=lambda text: f"{name}, {size}: {text}")  # noqa: B023
                torch.testing.assert_close(gradient, runs[16][1][step][name], rtol=1e-5, atol=1e-6)
            log = training_logs(trainer)[step]
            assert log["loss"] == pytest.approx(total.item(), rel=1e-5)
            for name in {"task"} | {name for name, weight in settings.weights().items() if weight}:
                assert log[f"{name}_loss"] == pytest.approx(losses[name].item(), rel=1e-5)
        if settings.layer_map == "dynamic":
            pairs = slow_closest(student, teacher, batch, projections)


def take_classifier(student: nn.Module, teacher: nn.Module, projections: dict[str, Tensor]) -> None:
    weight = teacher.classifier.weight.detach()
    weight = weight @ projections["simkd"].detach() if "simkd" in projections else weight
    student.classifier.load_state_dict({"weight": weight, "bias": teacher.classifier.bias})
    student.classifier.requires_grad_(False)


def layer_lists(*trained: nn.Module) -> dict[str, list[Any]]:
    """The layers of each stack of BERT, GPT-2 and T5."""
    if hasattr(trained[0], "bert"):
        return {"layers": [model.bert.encoder.layer for model in trained]}
    if hasattr(trained[0], "transformer"):
        return {"layers": [model.transformer.h for model in trained]}
    return {name: [getattr(model, name).block for model in trained] for name in ("encoder", "decoder")}


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing_and_all_is_as_the_reference_says(task: str, tmp_path: Path) -> None:
    check_accumulation(task, ALL_LOSSES, {}, tmp_path)


@pytest.mark.parametrize("losses", list(LOSSES)[1:])
def test_every_loss_is_as_the_reference_says(losses: str, tmp_path: Path) -> None:
    check_accumulation("sequence", *LOSSES[losses], tmp_path)


def test_micro_batches_share_a_dynamic_map(tmp_path: Path) -> None:
    """Here the last four or eight rows alone would choose another map than all 16."""
    check_accumulation("sequence", LOSSES["layers, dynamic"][0], {"num_hidden_layers": 6}, tmp_path, seed=19)


@pytest.mark.parametrize("task", ["token", "causal", "translation"])
def test_losses_by_layer_on_tokens(task: str, tmp_path: Path) -> None:
    check_accumulation(task, LAYERED, {"num_layers" if task == "translation" else "num_hidden_layers": 4}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("task", TASKS)
def test_every_loss_on_every_task(task: str, losses: str, tmp_path: Path) -> None:
    settings, changes = LOSSES[losses]
    if settings.alpha_simkd and task not in ("sequence", "multi-label", "regression", "token", "question"):
        pytest.skip("a language model has no classifier of its own")
    if task == "question" and settings.alpha_simkd:
        pytest.skip("the reference knows only classifiers by that name")
    renamed = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    changes = {renamed[name] if task == "translation" else name: value for name, value in changes.items()}
    check_accumulation(task, settings, changes, tmp_path)


def test_logs_are_means_over_the_steps_since_the_last_log(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=40)
    logs = {}
    for every in (1, 2):
        student = sequence_task(seed=0, count=40)[0]
        trainer, _ = train(tmp_path, student, teacher, rows, logging_steps=every)
        logs[every] = training_logs(trainer)
    assert (len(logs[1]), len(logs[2])) == (5, 2)
    for name in ("loss", "task_loss", "logits_loss", "hidden_loss"):
        assert logs[2][1][name] == pytest.approx((logs[1][2][name] + logs[1][3][name]) / 2, rel=1e-5)


def test_a_second_run_logs_afresh(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=16)
    student = sequence_task(seed=0, count=16)[0]
    trainer, _ = train(tmp_path, student, teacher, rows, learning_rate=0.0)
    first = training_logs(trainer)
    trainer.train()
    assert [entry["task_loss"] for entry in training_logs(trainer)] == [entry["task_loss"] for entry in first]


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        (DistillationConfig(alpha_task=1.0, alpha_logits=0.0), {"task_loss"}),
        (DistillationConfig(), {"task_loss", "logits_loss"}),
        (DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_hidden=5.0), {"task_loss", "hidden_loss"}),
    ],
)
def test_a_loss_without_weight_is_not_computed(settings: DistillationConfig, logged: set[str], tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=8)
    student = sequence_task(seed=0, count=8)[0]
    trainer, _ = train(tmp_path, student, teacher, rows, settings)
    (log,) = training_logs(trainer)
    assert {name for name in log if name.endswith("_loss")} == logged
    weights = {"task_loss": settings.alpha_task, "logits_loss": settings.alpha_logits, "hidden_loss": settings.alpha_hidden}
    assert log["loss"] == pytest.approx(sum(weights[name] * log[name] for name in logged), rel=1e-5)


def test_hidden_loss_alone_leaves_the_classifier_alone(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=8)
    student = sequence_task(seed=0, count=8)[0]
    before = snapshot(student)
    settings = DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_hidden=5.0)
    train(tmp_path, student, teacher, rows, settings, weight_decay=0.0)
    assert torch.equal(student.classifier.weight, before["classifier.weight"])
    assert not torch.equal(student.bert.encoder.layer[2].output.dense.weight, before["bert.encoder.layer.2.output.dense.weight"])


def test_tokens_at_padded_positions_change_nothing(tmp_path: Path) -> None:
    teacher, rows = token_task(seed=1, count=16)
    other = [
        row | {"input_ids": [token if real else 7 for token, real in zip(row["input_ids"], row["attention_mask"])]} for row in rows
    ]
    (left,), (right,) = (
        train(tmp_path, token_task(seed=0, count=16)[0], teacher, data, per_device_train_batch_size=16)[1] for data in (rows, other)
    )
    embeddings = "bert.embeddings.word_embeddings.weight"
    for name in left.keys() - {embeddings}:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(left[embeddings][1:], right[embeddings][1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["sequence", "token", "causal", "masked"])
def test_label_smoothing(task: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=12)
    student = TASKS[task](seed=0, count=12)[0]
    losses = slow_losses(in_float64(student), in_float64(teacher), rows, ALL_LOSSES, smoothing=0.1)
    for size in (12, 4):
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size}
        trainer, _ = train(tmp_path, copy.deepcopy(student), teacher, rows, label_smoothing_factor=0.1, **accumulation)
        (log,) = training_logs(trainer)
        for name, value in losses.items():
            assert log[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5)


def test_compute_loss_func_is_the_task_loss(tmp_path: Path) -> None:
    """As in the plain Trainer, accumulation and ignored labels included."""

    def doubled(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        loss = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
        return 2 * loss / num_items_in_batch

    teacher, rows = token_task(seed=1, count=12)
    gradients = []
    for distils in (True, False):
        student, seen = token_task(seed=0, count=12)[0], Gradients()
        settings: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
        plain = {"args": arguments(tmp_path, per_device_train_batch_size=4, learning_rate=0.0, **settings), "train_dataset": rows}
        plain |= {"callbacks": [seen], "compute_loss_func": doubled}
        losses = DistillationConfig(alpha_task=1.0, alpha_logits=0.0)
        (
            DistillationTrainer(student, teacher=teacher, distillation=losses, **plain) if distils else Trainer(student, **plain)
        ).train()
        gradients.append(seen.steps)
    for ours, theirs in zip(*gradients):
        assert any(gradient.abs().max() > 0.01 for gradient in theirs.values())
        assert_equal(ours, theirs)


def test_a_step_without_any_label_is_harmless(tmp_path: Path) -> None:
    teacher, rows = token_task(seed=1, count=8)
    rows = [row | {"labels": [-100] * LENGTH} for row in rows]
    trainer, (gradients,) = train(tmp_path, token_task(seed=0, count=8)[0], teacher, rows)
    (log,) = training_logs(trainer)
    assert log["task_loss"] == log["logits_loss"] == 0
    assert log["hidden_loss"] > 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_images_have_no_padding(tmp_path: Path) -> None:
    """A row counts as one, whatever the number of its patches."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher, student = (tiny("vit", seed=seed, **dropout) for seed in (1, 0))
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 12, 12), "labels": index % 3} for index in range(8)]
    settings = DistillationConfig(alpha_hidden=0.5, alpha_hidden_layers=0.5, layer_map="last")
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        one, two = (model(pixels, output_hidden_states=True) for model in (student, teacher))
    trainer, _ = train(tmp_path, student, teacher, rows, settings, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    (log,) = training_logs(trainer)
    expected = float((one.hidden_states[-1] - two.hidden_states[-1]).square().mean())
    assert log["hidden_loss"] == pytest.approx(expected, rel=1e-5)
    assert log["hidden_layers_loss"] == pytest.approx(expected, rel=1e-5)
    items = [slow_divergence(mine, its, 2.0) for mine, its in zip(one.logits, two.logits)]
    assert log["logits_loss"] == pytest.approx(float(sum(items)) / 8, rel=1e-5)


def test_multiple_choice(tmp_path: Path) -> None:
    teacher, student = (tiny_bert("multiple-choice", seed=seed) for seed in (1, 0))
    single = ragged_rows(16)
    rows = [
        {name: [first[name], second[name]] for name in ("input_ids", "attention_mask")} | {"labels": index % 2}
        for index, (first, second) in enumerate(zip(single[::2], single[1::2]))
    ]
    trainer, _ = train(tmp_path, student, teacher, rows)
    assert all(math.isfinite(training_logs(trainer)[0][f"{name}_loss"]) for name in ("task", "logits", "hidden"))


# --------------------------------------------------------------------------------------------------------- teacher and evaluation


def test_evaluation_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=20)
    student = sequence_task(seed=0, count=20)[0]
    trainer, _ = train(tmp_path, student, teacher, rows)
    plain = Trainer(student, arguments(tmp_path))
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    assert (trainer.predict(rows).predictions == plain.predict(rows).predictions).all()


@pytest.mark.parametrize("task", ["token", "multi-label", "translation"])
def test_evaluation_reports_the_plain_loss_whatever_the_losses(task: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=8)
    student = TASKS[task](seed=0, count=8)[0]
    trainer, _ = train(tmp_path, student, teacher, rows, LAYERED)
    assert trainer.evaluate(rows)["eval_loss"] == Trainer(student, arguments(tmp_path)).evaluate(rows)["eval_loss"]


def test_a_student_made_by_model_init(tmp_path: Path) -> None:
    """`train` makes another model than `__init__` did."""
    teacher, rows = sequence_task(seed=1, count=16, **WIDE)
    trainer = DistillationTrainer(
        model_init=lambda: sequence_task(seed=0, count=1)[0],
        args=arguments(tmp_path),
        train_dataset=rows,
        teacher=teacher,
        distillation=EVERY_LOSS,
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert training_logs(trainer)[0].keys() >= {f"{name}_loss" for name in EVERY_LOSS.weights()}
    torch.testing.assert_close(
        trainer.model.classifier.weight, teacher.classifier.weight @ trainer.projections["simkd"].weight, rtol=0, atol=0
    )


def test_the_teacher_is_frozen_in_evaluation_mode_and_unchanged(tmp_path: Path) -> None:
    rows = ragged_rows(16)
    teacher = tiny_bert(seed=1, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    student = tiny_bert(seed=0)
    before, start = snapshot(teacher), snapshot(student)
    trainer, _ = train(tmp_path, student, teacher, rows)
    assert_equal(snapshot(teacher), before)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert any(not torch.equal(start[name], value) for name, value in student.state_dict().items())
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_a_teacher_by_path_is_loaded_for_the_task_of_the_student(tmp_path: Path) -> None:
    """Also one of another family, and with PEFT around the student."""
    teacher = tiny("distilbert", "sequence-classification", seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    logs = []
    for given in (teacher, str(tmp_path / "teacher"), tmp_path / "teacher"):
        trainer, _ = train(tmp_path, tiny_bert(), given, ragged_rows(8), DistillationConfig())
        assert type(trainer.accelerator.unwrap_model(trainer.teacher)) is type(teacher)
        logs.append(training_logs(trainer)[0]["logits_loss"])
    assert logs[0] == logs[1] == logs[2]


def test_a_student_in_peft_learns_as_its_base_model_would(tmp_path: Path) -> None:
    """A fresh adapter changes nothing, so the losses are those of the base model: shifted labels, hidden states, attention."""
    teacher, rows = TASKS["causal"](seed=1, count=8)
    logs = []
    for adapts in (False, True):
        student = TASKS["causal"](seed=0, count=8)[0]
        if adapts:
            student = get_peft_model(student, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
        trainer, _ = train(tmp_path, student, teacher, rows, LAYERED)
        logs.append(training_logs(trainer)[0])
    for name in ("loss", "task_loss", "logits_loss", "hidden_loss", "hidden_layers_loss", "attention_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


@pytest.mark.core
def test_a_condensed_student_is_just_another_student(tmp_path: Path) -> None:
    """Narrower by different numbers of heads and neurons in each layer, one without any head."""
    teacher, rows = sequence_task(seed=1, count=8)
    student = sequence_task(seed=0, count=8)[0]
    left = prune_randomly(student)
    condense(student)
    assert 0 in left.values()
    settings = DistillationConfig(alpha_hidden=0.5, alpha_hidden_layers=0.5, alpha_attention=5.0)
    pairs = {"layers": [(0, 0), (1, 1), (2, 2)]}
    losses = slow_losses(in_float64(student), in_float64(teacher), rows, settings, pairs)
    trainer, _ = train(tmp_path, student, teacher, rows, settings, num_train_epochs=3)
    logs = training_logs(trainer)
    for name, value in losses.items():
        assert logs[0][f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5)
    assert logs[0]["attention_loss"] > 0.01
    assert logs[-1]["loss"] < logs[0]["loss"]


# ------------------------------------------------------------------------------------------- projections, layer maps, classifier


def test_layer_maps() -> None:
    assert layer_pairs("uniform", 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs("uniform", 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert layer_pairs("uniform", 4, 6) == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert layer_pairs("uniform", 3, 2) == [(0, 0), (1, 1), (2, 1)]
    assert layer_pairs("last", 3, 12) == [(2, 11)]
    assert layer_pairs([[1, 0], [0, 5]], 2, 6) == [(1, 0), (0, 5)]
    assert layer_pairs("dynamic", 3, 6) == layer_pairs("uniform", 3, 6)


def test_the_dynamic_map_never_goes_down() -> None:
    distances = torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.0, 3.0, 2.0, 5.0], [0.0, 0.0, 1.0, 1.0]])
    assert closest_layers(distances) == [(0, 1), (1, 2), (2, 2)]


def test_the_dynamic_map_is_found_in_the_batch_before(tmp_path: Path) -> None:
    """A student that is the teacher without its last layer."""
    teacher, rows = sequence_task(seed=1, count=24, num_hidden_layers=4)
    student = copy.deepcopy(teacher)
    del student.bert.encoder.layer[3]
    student.config.num_hidden_layers = 3
    settings = DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_hidden_layers=1.0, layer_map="dynamic")
    trainer, _ = train(tmp_path, student, teacher, rows, settings, learning_rate=0.0)
    first, second, _ = (log["hidden_layers_loss"] for log in training_logs(trainer))
    # The first step maps uniformly: 0, 1, 2 → 1, 2, 3.
    uniform = slow_losses(in_float64(student), in_float64(teacher), rows[:8], settings, {"layers": [(0, 1), (1, 2), (2, 3)]})
    assert first == pytest.approx(uniform["hidden_layers"].item(), rel=1e-5)
    # It then finds itself.
    assert first > 0.1
    assert second == pytest.approx(0, abs=1e-9)


class StopAt(TrainerCallback):
    """Ends training after some steps, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_projections_are_trained_saved_and_resumed_and_the_student_stays_plain(tmp_path: Path) -> None:
    settings = DistillationConfig(
        alpha_task=0.1, alpha_hidden=1.0, alpha_hidden_layers=1.0, alpha_simkd=1.0, alpha_attention=0.5, layer_map="dynamic"
    )
    teacher, rows = sequence_task(seed=1, count=32, **WIDE)
    ends = {}
    for name in ("straight", "resumed"):
        kept = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1, "optim": "adamw_torch", "weight_decay": 0.1}
        student = sequence_task(seed=0, count=32)[0]
        trainer = distiller(tmp_path / name, student, teacher, rows, settings, [StopAt(1)] if name == "resumed" else [], **kept)
        start = snapshot(trainer.projections)
        assert start.keys() == {"hidden.weight", "hidden_layers_layers.weight", "simkd.weight"}
        trainer.train()
        if name == "resumed":
            torch.manual_seed(123)
            trainer = distiller(tmp_path / name, sequence_task(seed=5, count=32)[0], teacher, rows, settings, [], **kept)
            with torch.no_grad():
                for parameter in trainer.projections.parameters():
                    parameter.zero_()
            trainer.train(resume_from_checkpoint=True)
        ends[name] = snapshot(trainer.model), snapshot(trainer.projections), training_logs(trainer)[1:]
    assert not any(torch.equal(start[name], ends["straight"][1][name]) for name in start)
    assert_equal(ends["straight"][0], ends["resumed"][0])
    assert_equal(ends["straight"][1], ends["resumed"][1])
    for one, other in zip(ends["straight"][2], ends["resumed"][2]):
        assert {name: one[name] for name in one if name.endswith("loss")} == {
            name: other[name] for name in one if name.endswith("loss")
        }
    folder = tmp_path / "straight" / "checkpoint-4"
    assert load_file(folder / "model.safetensors").keys() == student.state_dict().keys()
    assert_equal(snapshot(AutoModelForSequenceClassification.from_pretrained(folder)), ends["straight"][0])


class FailsAfterSaving(TrainerCallback):
    """Ends the run right after the Trainer has written a checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_checkpoint_has_the_projections_before_older_ones_go(tmp_path: Path) -> None:
    """They are there when the folder is rotated and when callbacks hear of it; the model that is saved in the end has none."""
    settings = DistillationConfig(alpha_hidden=1.0)
    teacher, rows = sequence_task(seed=1, count=16, **WIDE)
    kept = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = distiller(tmp_path, sequence_task(seed=0, count=16)[0], teacher, rows, settings, [FailsAfterSaving()], **kept)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "distillation.safetensors").is_file()
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / "model.safetensors").is_file()
    assert not (tmp_path / "end" / "distillation.safetensors").exists()


def test_a_checkpoint_without_the_projections_is_refused(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=16)
    kept = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, sequence_task(seed=0, count=16)[0], teacher, rows, ALL_LOSSES, **kept)
    wide = sequence_task(seed=1, count=16, **WIDE)[0]
    trainer = distiller(tmp_path, sequence_task(seed=0, count=16)[0], wide, rows, ALL_LOSSES, **kept)
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-2 holds no distillation.safetensors: it was not written by a run with"
    ):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("changes", [{}, WIDE], ids=["equal", "wider"])
def test_the_reused_classifier_is_the_teachers_in_a_plain_student(changes: dict[str, int], tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=16, **changes)
    student = sequence_task(seed=0, count=16)[0]
    settings = DistillationConfig(alpha_task=0.0, alpha_logits=0.0, alpha_simkd=1.0)
    trainer, _ = train(tmp_path, student, teacher, rows, settings, num_train_epochs=20, weight_decay=0.1)
    logs = training_logs(trainer)
    assert logs[-1]["simkd_loss"] < 0.5 * logs[0]["simkd_loss"]
    weight = teacher.classifier.weight
    weight = weight @ trainer.projections["simkd"].weight if changes else weight
    torch.testing.assert_close(student.classifier.weight, weight, rtol=0, atol=0)
    assert torch.equal(student.classifier.bias, teacher.classifier.bias)
    assert student.classifier.weight.requires_grad
    # Logits are the teacher's classifier of the projected features, in any plain copy.
    trainer.save_model(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors", "training_args.bin"]
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    inputs = {name: torch.tensor([rows[0][name]]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = student.eval().bert(**inputs).pooler_output
        features = trainer.projections["simkd"](features) if changes else features
        torch.testing.assert_close(loaded(**inputs).logits, teacher.classifier(features))


def test_attention_maps_switch_to_eager_attention(tmp_path: Path) -> None:
    teacher, rows = sequence_task(seed=1, count=8)
    student = sequence_task(seed=0, count=8)[0]
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    trainer, _ = train(tmp_path, student, teacher, rows, DistillationConfig(alpha_attention=1.0))
    assert student.config._attn_implementation == teacher.config._attn_implementation == "eager"
    assert training_logs(trainer)[0]["attention_loss"] > 0.01


def test_attention_loss_equals_its_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    student[..., 4:], teacher[..., 4:] = -math.inf, -math.inf  # a key that is padding
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    weights = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    for heads in (3, 2):
        expected = sum(slow_attention(student[i, :, j], teacher[i, :heads, j]) for i, j in weights.nonzero().tolist())
        torch.testing.assert_close(attention_loss(student, teacher[:, :heads], weights), expected)
    assert attention_loss(student, student, weights) == pytest.approx(0, abs=1e-6)
    # Keys that are dropped out are left out.
    dropped = student.clone()
    dropped[..., 1] = 0
    kept = [0, 2, 3, 4]
    expected = sum(slow_attention(student[i, :, j][:, kept], teacher[i, :, j][:, kept]) for i, j in weights.nonzero().tolist())
    torch.testing.assert_close(attention_loss(dropped, teacher, weights), expected)


def test_attention_dropout_leaves_the_gradient_right_on_average() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 1, 6, requires_grad=True)
    teacher, weights = torch.randn(1, 1, 1, 6).softmax(-1), torch.ones(1, 1)
    attention = scores.softmax(-1)
    (plain,) = torch.autograd.grad(attention_loss(attention, teacher, weights), attention, retain_graph=True)
    drawn = torch.stack([F.dropout(attention, 0.25) for _ in range(8000)], dim=1)[0]
    loss = attention_loss(drawn, teacher.expand(8000, -1, -1, -1), weights.expand(8000, -1))
    (dropped,) = torch.autograd.grad(loss, attention)
    torch.testing.assert_close(dropped / 8000 / 0.75, plain, rtol=0.03, atol=0)


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ({"num_labels": 3}, DistillationConfig(), "teacher: has num_labels=3, the student 2; they must be equal."),
        (
            {"id2label": {0: "LABEL_1", 1: "LABEL_0"}, "label2id": {"LABEL_1": 0, "LABEL_0": 1}},
            DistillationConfig(),
            "teacher: has label2id={'LABEL_1': 0, 'LABEL_0': 1}, the student {'LABEL_0': 0, 'LABEL_1': 1}; "
            "their order must be equal.",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(overrides: dict[str, Any], settings: DistillationConfig, message: str, tmp_path: Path) -> None:
    student, teacher = tiny_bert(), tiny_bert(seed=1, **overrides)
    with pytest.raises(ValueError, match=r"must (be )?equal") as error:
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, distillation=settings)
    assert str(error.value) == message
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
def test_a_teacher_that_reads_other_ids(head: str, tmp_path: Path) -> None:
    """The vocabulary of one of them was cut; larger vocabularies that only have more rows are no error."""
    entry = {"version": 1, "layers": {}, "original": {"vocab_size": 120}}
    with pytest.raises(ValueError, match=r"teacher: has 120 tokens, the student 99, and one vocabulary was cut"):
        DistillationTrainer(tiny_bert(head, hf_prune=entry), arguments(tmp_path), teacher=tiny_bert(head, 1, vocab_size=120))
    DistillationTrainer(tiny_bert(), arguments(tmp_path), teacher=tiny_bert(seed=1, vocab_size=120))
    DistillationTrainer(tiny_bert(hf_prune=entry), arguments(tmp_path), teacher=tiny_bert(seed=1, hf_prune=entry))


def test_the_student_cannot_be_its_own_teacher(tmp_path: Path) -> None:
    student = tiny_bert()
    with pytest.raises(ValueError, match=r"teacher: must be another model than the student; pass a copy"):
        DistillationTrainer(student, arguments(tmp_path), teacher=student)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be greater than 0."),
        ({"temperature": math.nan}, "temperature=nan: must be greater than 0."),
        ({"alpha_task": -1.0}, "alpha_task=-1.0: must be 0 or more."),
        ({"alpha_hidden": math.nan}, "alpha_hidden=nan: must be 0 or more."),
        (
            {"alpha_task": 0.0, "alpha_logits": 0.0},
            "alpha_task, alpha_logits, alpha_hidden, alpha_hidden_layers, alpha_attention, alpha_simkd="
            "(0.0, 0.0, 0.0, 0.0, 0.0, 0.0): at least one must be greater than 0.",
        ),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=r"must be") as error:
        DistillationConfig(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"alpha_logit": 0.5}, "alpha_logit=0.5: is not a field of DistillationConfig; .* Did you mean 'alpha_logits'"),
        ({"layer_map": "unifrom"}, "layer_map='unifrom': must be 'uniform', 'last', 'dynamic' or .* Did you mean 'uniform'"),
        ({"layer_map": [[0]]}, r"layer_map=\[\[0\]\]: must be"),
        ({"layer_map": [[0, -1]]}, r"layer_map=\[\[0, -1\]\]: must be"),
        ({"layer_map": []}, r"layer_map=\[\]: must be"),
        ({"alpha_task": "much"}, "alpha_task='much': must be 0 or more"),
        ({"alpha_simkd": math.inf}, "alpha_simkd=inf: must be 0 or more"),
        ({"alpha_attention": 1.0, "layer_map": "dynamic"}, "layer_map='dynamic': needs alpha_hidden_layers greater than 0"),
    ],
)
def test_bad_plain_data(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationConfig.from_dict(data)


def test_the_config_survives_json() -> None:
    for settings in (DistillationConfig(), EVERY_LOSS, DistillationConfig(alpha_hidden_layers=1.0, layer_map=[(0, 1), (2, 3)])):
        assert DistillationConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("sequence", {"alpha_hidden_layers": 1.0, "layer_map": [[0, 3]]}, "the teacher has layers 0 to 2, so no layer 3"),
        ("sequence", {"alpha_attention": 1.0, "layer_map": [[4, 0]]}, "the student has layers 0 to 2, so no layer 4"),
        (
            "causal",
            {"alpha_simkd": 1.0},
            "alpha_simkd='GPT2LMHeadModel': needs a model that ends in a linear classifier of its own",
        ),
    ],
)
def test_losses_that_the_models_cannot_have(task: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=8)
    student = TASKS[task](seed=0, count=8)[0]
    with pytest.raises(ConfigError, match=message):
        distiller(tmp_path, student, teacher, rows, DistillationConfig(**settings))
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_of_another_vocabulary(tmp_path: Path) -> None:
    teacher, rows = TASKS["causal"](seed=1, count=8, vocab_size=70)
    with pytest.raises(ValueError, match=r"teacher: gives logits \[8, 12, 70\], the student \[8, 12, 99\]; they must be equal"):
        train(tmp_path, TASKS["causal"](seed=0, count=8)[0], teacher, rows, DistillationConfig())


def test_rows_without_labels_are_an_error_that_says_so(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in ragged_rows(8)]
    with pytest.raises(ValueError, match=r"no loss for the inputs input_ids, attention_mask; do they hold labels\?"):
        train(tmp_path, tiny_bert(), tiny_bert(seed=1), rows)


@pytest.mark.parametrize(
    ("task", "settings", "changes"),
    [("sequence", EVERY_LOSS, WIDE), ("token", ALL_LOSSES, {}), ("multi-label", ALL_LOSSES, {}), ("question", ALL_LOSSES, {})],
)
def test_bf16_trains_and_stays_close(task: str, settings: DistillationConfig, changes: dict[str, int], tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=16, **changes)
    logs = []
    for bf16 in (False, True):
        student = TASKS[task](seed=0, count=16)[0]
        trainer, _ = train(tmp_path, student, teacher, rows, settings, bf16=bf16, gradient_accumulation_steps=2)
        assert student.dtype == torch.float32
        logs.append(training_logs(trainer)[0])
    for name in (name for name in logs[0] if name.endswith("loss")):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)
        assert logs[1][name] != logs[0][name]


@pytest.mark.parametrize("task", ["sequence", "token", "question"])
def test_the_teacher_alone_runs_in_bf16(task: str, tmp_path: Path) -> None:
    settings, changes = (EVERY_LOSS, WIDE) if task == "sequence" else (ALL_LOSSES, {})
    teacher, rows = TASKS[task](seed=1, count=16, **changes)
    logs = []
    for dtype in (None, "bfloat16"):
        student, seen = TASKS[task](seed=0, count=16)[0], []
        handle = teacher.get_submodule(teacher.base_model_prefix).register_forward_hook(
            lambda module, inputs, output: seen.append((torch.is_autocast_enabled("cpu"), output[0].dtype))  # noqa: B023
        )
        trainer, gradients = train(tmp_path, student, teacher, rows, dataclasses.replace(settings, teacher_dtype=dtype))
        handle.remove()
        assert {enabled for enabled, _ in seen} == {dtype is not None}
        assert {parameter.dtype for parameter in (*student.parameters(), *teacher.parameters())} == {torch.float32}
        assert all(gradient.dtype == torch.float32 for gradient in gradients[0].values())
        logs.append(training_logs(trainer)[0])
    assert logs[1]["task_loss"] == logs[0]["task_loss"]
    for name in (name for name in logs[0] if name.endswith("_loss") and name != "task_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)
        assert logs[1][name] != logs[0][name]


def test_a_type_that_the_teacher_cannot_run_in() -> None:
    with pytest.raises(ConfigError, match=r"teacher_dtype='bf16'"):
        DistillationConfig(teacher_dtype="bf16")
