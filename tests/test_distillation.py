"""Distillation: the losses against slow references, accumulation, padding, evaluation, and what must not change."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_cases import (
    ALL_LOSSES,
    EVERY_LOSS,
    TASKS,
    WIDE,
    in_float64,
    sequence_task,
    slow_closest,
    slow_divergence,
    slow_losses,
    token_task,
    train,
    training_logs,
)
from helpers import LENGTH, arguments, assert_equal, ragged_rows, snapshot, tiny_bert
from torch import Tensor, nn
from transformers import Trainer

from hf_prune import DistillationConfig, DistillationTrainer
from hf_prune.distillation.layers import layer_pairs
from hf_prune.distillation.losses import hidden_loss, logits_loss

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
LAYERED = DistillationConfig(
    alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7, alpha_hidden_layers=0.2, alpha_attention=0.4, layer_map="dynamic"
)


def check_accumulation(task: str, settings: DistillationConfig, changes: dict[str, Any], folder: Path) -> None:
    """Batches of 1×16, 2×8 and 4×4, and a ragged one of 5, give the losses and gradients of the reference in float64."""
    teacher, rows = TASKS[task](seed=1, count=21, **changes)
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


@pytest.mark.parametrize("task", ["sequence", "token", "causal"])
def test_label_smoothing(task: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=12)
    reference = TASKS[task](seed=0, count=12)[0].train()
    losses = slow_losses(reference, teacher, rows, temperature=2.0, smoothing=0.1)
    for size in (12, 4):
        trainer, _ = train(
            tmp_path,
            copy.deepcopy(reference),
            teacher,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=12 // size,
            label_smoothing_factor=0.1,
        )
        (log,) = training_logs(trainer)
        for name, value in losses.items():
            assert log[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5)


def test_a_step_without_any_label_is_harmless(tmp_path: Path) -> None:
    teacher, rows = token_task(seed=1, count=8)
    rows = [row | {"labels": [-100] * LENGTH} for row in rows]
    trainer, (gradients,) = train(tmp_path, token_task(seed=0, count=8)[0], teacher, rows)
    (log,) = training_logs(trainer)
    assert log["task_loss"] == log["logits_loss"] == 0
    assert log["hidden_loss"] > 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


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


def test_a_teacher_of_another_width_may_teach_logits(tmp_path: Path) -> None:
    teacher = tiny_bert(seed=1, hidden_size=16, num_attention_heads=2)
    trainer, _ = train(tmp_path, tiny_bert(seed=0), teacher, ragged_rows(8), DistillationConfig())
    assert training_logs(trainer)[0]["logits_loss"] > 0


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ({"num_labels": 3}, DistillationConfig(), "teacher: has num_labels=3, the student 2; they must be equal."),
        (
            {"id2label": {0: "LABEL_1", 1: "LABEL_0"}, "label2id": {"LABEL_1": 0, "LABEL_0": 1}},
            DistillationConfig(),
            "teacher: has label2id={'LABEL_1': 0, 'LABEL_0': 1}, the student {'LABEL_0': 0, 'LABEL_1': 1}; their order must be equal.",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(overrides: dict[str, Any], settings: DistillationConfig, message: str, tmp_path: Path) -> None:
    student, teacher = tiny_bert(), tiny_bert(seed=1, **overrides)
    with pytest.raises(ValueError, match=r"must (be )?equal") as error:
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, distillation=settings)
    assert str(error.value) == message
    assert all(parameter.requires_grad for parameter in teacher.parameters())


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


def test_rows_without_labels_are_an_error_that_says_so(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in ragged_rows(8)]
    with pytest.raises(ValueError, match=r"no loss for the inputs input_ids, attention_mask; do they hold labels\?"):
        train(tmp_path, tiny_bert(), tiny_bert(seed=1), rows)


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_bf16_trains_and_stays_close(task: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=16)
    logs = []
    for bf16 in (False, True):
        student = TASKS[task](seed=0, count=16)[0]
        trainer, _ = train(tmp_path, student, teacher, rows, bf16=bf16, gradient_accumulation_steps=2)
        assert student.dtype == torch.float32
        logs.append(training_logs(trainer)[0])
    for name in ("loss", "task_loss", "logits_loss", "hidden_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)
        assert logs[1][name] != logs[0][name]
