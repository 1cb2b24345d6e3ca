"""Distillation: the losses against slow references, accumulation, padding, evaluation, and what must not change."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LENGTH, VOCABULARY, Gradients, arguments, assert_equal, ragged_rows, snapshot, tiny_bert
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer

from hf_prune import DistillationConfig, DistillationTrainer
from hf_prune.distillation import hidden_loss, logits_loss

Rows = list[dict[str, Any]]

ALL_LOSSES = DistillationConfig(temperature=2.0, alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7)


# ----------------------------------------------------------------------------------------------------------------------- tasks


def sequence_task(seed: int, count: int) -> tuple[PreTrainedModel, Rows]:
    """Three classes."""
    rows = ragged_rows(count)
    return tiny_bert(seed=seed, num_labels=3), [row | {"labels": index % 3} for index, row in enumerate(rows)]


def regression_task(seed: int, count: int) -> tuple[PreTrainedModel, Rows]:
    """One output, labels that are floats."""
    rows = ragged_rows(count)
    return tiny_bert(seed=seed, num_labels=1), [row | {"labels": math.sin(index)} for index, row in enumerate(rows)]


def token_task(seed: int, count: int) -> tuple[PreTrainedModel, Rows]:
    """Three classes; padding and every third token are ignored, and the second row and the last two rows as a whole."""
    rows = ragged_rows(count)
    for index, row in enumerate(rows):
        ignored = index in (1, count - 2, count - 1)
        row["labels"] = [
            -100 if ignored or not real or position % 3 == 0 else token % 3
            for position, (token, real) in enumerate(zip(row["input_ids"], row["attention_mask"]))
        ]
    return tiny_bert("token-classification", seed=seed, num_labels=3), rows


def question_task(seed: int, count: int) -> tuple[PreTrainedModel, Rows]:
    """Answers within the row."""
    rows = ragged_rows(count)
    for index, row in enumerate(rows):
        del row["labels"]
        row |= {"start_positions": index % 3, "end_positions": 2 + index % 2}
    return tiny_bert("question-answering", seed=seed), rows


def causal_task(seed: int, count: int) -> tuple[PreTrainedModel, Rows]:
    """Next tokens; padding is ignored."""
    rows = ragged_rows(count)
    for row in rows:
        row["labels"] = [token if real else -100 for token, real in zip(row["input_ids"], row["attention_mask"])]
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), rows


TASKS = {
    "sequence": sequence_task,
    "regression": regression_task,
    "token": token_task,
    "question": question_task,
    "causal": causal_task,
}


# ------------------------------------------------------------------------------------------------------------------- references


def slow_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·Σ p·log(p/q) of one item, written out; squared error of a single output."""
    if student.numel() == 1:
        return (student - teacher).square().sum()
    p, q = (teacher / temperature).softmax(0), (student / temperature).softmax(0)
    return temperature**2 * sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(p)))


def slow_losses(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, temperature: float, smoothing: float = 0.0
) -> dict[str, Tensor]:
    """The three losses of one optimizer step, row by row and item by item."""
    task, logits, hidden = [], [], []
    for row in rows:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        ours = student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(**inputs, output_hidden_states=True)
        for position in range(LENGTH):
            if row["attention_mask"][position]:
                difference = ours.hidden_states[-1][0, position] - theirs.hidden_states[-1][0, position]
                hidden.append(difference.square().mean())
        if "labels" not in row:
            for name in ("start", "end"):
                mine, its = ours[f"{name}_logits"][0], theirs[f"{name}_logits"][0]
                task.append(F.cross_entropy(mine, torch.tensor(row[f"{name}_positions"])))
                size = sum(row["attention_mask"])
                logits.append(slow_divergence(mine[:size], its[:size], temperature))
            continue
        labels, mine, its = row["labels"], ours.logits[0], theirs.logits[0]
        if not isinstance(labels, list):
            items = [(labels, mine, its)]
        elif isinstance(student, GPT2LMHeadModel):
            items = list(zip(labels[1:], mine, its))
        else:
            items = list(zip(labels, mine, its))
        for label, one, other in items:
            if label == -100:
                continue
            if isinstance(label, float):
                task.append((one - label).square().sum())
            else:
                task.append(F.cross_entropy(one, torch.tensor(label), label_smoothing=smoothing))
            logits.append(slow_divergence(one, other, temperature))
    return {name: torch.stack(values).mean() for name, values in (("task", task), ("logits", logits), ("hidden", hidden))}


def train(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    settings: DistillationConfig = ALL_LOSSES,
    **overrides: Any,
) -> tuple[DistillationTrainer, list[dict[str, Tensor]]]:
    """Train in the order of the rows. Returns the trainer and the gradients of each step."""
    gradients = Gradients()
    trainer = DistillationTrainer(
        student,
        arguments(folder, train_sampling_strategy="sequential", max_grad_norm=0.0, **overrides),
        train_dataset=rows,
        callbacks=[gradients],
        teacher=teacher,
        distillation=settings,
    )
    trainer.train()
    return trainer, gradients.steps


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    """The log of each optimizer step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


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


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing_and_all_is_as_the_reference_says(task: str, tmp_path: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=21)
    reference = TASKS[task](seed=0, count=21)[0]
    runs = {}
    for size in (16, 8, 4):
        student = copy.deepcopy(reference)
        # Nothing moves at a learning rate of 0, so both steps can be compared.
        runs[size] = train(
            tmp_path,
            student,
            teacher,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            learning_rate=0.0,
        )
    reference.train()
    for step, batch in enumerate((rows[:16], rows[16:])):
        losses = slow_losses(reference, teacher, batch, temperature=2.0)
        total = 0.3 * losses["task"] + 0.5 * losses["logits"] + 0.7 * losses["hidden"]
        reference.zero_grad()
        total.backward()
        expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
        for size, (trainer, gradients) in runs.items():
            assert len(gradients) == 2
            assert gradients[step].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[step][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}, batch {size}")
            log = training_logs(trainer)[step]
            assert log["loss"] == pytest.approx(total.item(), rel=1e-5)
            for name, value in losses.items():
                assert log[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5)
    for step in (0, 1):
        for name, gradient in runs[16][1][step].items():
            for size in (8, 4):
                torch.testing.assert_close(runs[size][1][step][name], gradient, rtol=1e-5, atol=1e-6)


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
            {"hidden_size": 16, "num_attention_heads": 2},
            ALL_LOSSES,
            "alpha_hidden=0.7: the teacher's hidden_size=16 must equal the student's 32.",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(overrides: dict[str, int], settings: DistillationConfig, message: str, tmp_path: Path) -> None:
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
            "alpha_task, alpha_logits, alpha_hidden=(0.0, 0.0, 0.0): at least one must be greater than 0.",
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
