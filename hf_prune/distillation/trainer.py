"""`DistillationTrainer`: a Trainer whose student also learns from an online teacher, or from cached teacher logits.

Each loss is a mean over its own items (see `items.py`), counted over the whole accumulated batch and all processes, so 1×16, 2×8
and 4×4 accumulation give the same gradients, ragged last batch included, and so do one process and two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..compat import without_peft
from ..settings.errors import ConfigError
from .cache import COLUMNS, INDICES, LOGITS, TeacherLogitsCollator
from .config import DistillationConfig
from .items import items_of
from .models import is_language_model, load_teacher, recorded_inputs, select, shifts_labels, teacher_arguments
from .objective import ANSWERS, Objective, Seen

STATE_NAME = "distillation.safetensors"


class DistillationTrainer(Trainer):
    """A Trainer whose student also learns from a teacher.

    Args:
        teacher: a model with the student's outputs, which is put in evaluation mode and whose parameters are frozen; a path, or an
            id on the Hub, of one for the student's task; or None, when the data has the column `teacher_logits`
            ([`add_teacher_logits`]). The column is ignored when there is a teacher.
        distillation: the weights of the losses, a [`DistillationConfig`] or a dictionary with its fields.
        args, kwargs: as for `Trainer`.

    Each loss is logged on its own (unweighted), such as `task_loss` and `logits_loss`. Evaluation reports the plain task loss.
    What is learned alongside the student is written into checkpoints, as `distillation.safetensors`, never into the model.

    Attention maps need eager attention, to which student and teacher are switched when `alpha_attention` is not 0.

    Raises:
        ConfigError, ValueError: the teacher does not fit the student or the losses.
    """

    #: compute_loss already divides by the items of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        distillation: DistillationConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        settings = distillation or DistillationConfig()
        self.distillation = settings if isinstance(settings, DistillationConfig) else DistillationConfig.from_dict(settings)
        student = self._student
        if isinstance(teacher, (str, os.PathLike)):
            teacher = load_teacher(teacher, student)
        self._objective = Objective(self.distillation, student, teacher)
        self.teacher: nn.Module | None = None
        if teacher is None:
            self._check_cached_logits()
            of_labels = student.config.is_encoder_decoder and is_language_model(student)
            self.data_collator = TeacherLogitsCollator(self.data_collator, "labels" if of_labels else "input_ids")
        else:
            self._objective.prepare(without_peft(teacher))
            self._teacher_arguments = teacher_arguments(teacher)
            self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False), evaluation_mode=True)
            self.teacher.to(self.args.device).eval()
        #: What is learned beside the student.
        self.projections: nn.Module = self._objective.projections.to(self.args.device)
        if list(self.projections.parameters()):
            self.projections = self._objective.projections = self.accelerator.prepare_model(self.projections)
        self._batch_items: dict[str, Tensor] | None = None
        self._loss_sums: dict[str, Tensor] = {}
        self._summed_steps = 0
        self.add_callback(_DistillationCallback(self))

    # ------------------------------------------------------------------------------------------------------- Trainer's methods

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; a checkpoint restores projections and layer map."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        if folder:
            self._load_state(Path(str(folder)) / STATE_NAME)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adds the projections to the optimizer, as a parameter group with the defaults; a reused classifier is frozen."""
        self._objective.prepare(self._student)
        classifier = self._objective.classifier_of(self._student)
        if classifier is not None:
            classifier.requires_grad_(False)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learned = [parameter for parameter in self.projections.parameters() if id(parameter) not in known]
        if learned:
            optimizer.add_param_group({"params": learned, "weight_decay": self.args.weight_decay})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; a checkpoint also gets what is learned alongside the student, before older ones are removed."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            self._save_state(Path(output_dir) / STATE_NAME)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also counts what each loss is a mean over, in all micro-batches and on all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.projections.zero_grad()  # The Trainer does so for the student.
            self._objective.refresh_layer_map(self._over_processes)
            counts = [items_of(batch, self._student).counts() for batch in batches]
            names = sorted(counts[0])
            totals = torch.stack([torch.stack([count[name] for count in counts]).sum() for name in names])
            self._batch_items = dict(zip(names, self._over_processes(totals.to(device))))
            self._summed_steps += 1
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the losses in training, the plain task loss in evaluation."""
        cached, inputs = select(inputs, set(COLUMNS)), _without_cache(inputs)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        objective, items = self._objective, items_of(inputs, self._student)
        counts = {name: count.to(self.args.device) for name, count in items.counts().items()}
        totals = self._batch_items or counts
        # Gradients are averaged over processes, the totals are sums over them.
        scales = {name: self.accelerator.num_processes / total.clamp(min=1) for name, total in totals.items()}
        extras = objective.forward_arguments
        with recorded_inputs(objective.classifier_of(self._student)) as features:
            if self.compute_loss_func is not None:
                task, outputs = super().compute_loss(model, {**inputs, **extras}, True, num_items_in_batch)
            else:
                task, outputs = self._task_loss(model, inputs, bool(counts["task"]), extras)
                task = task * counts["task"] * scales["task"]
        with recorded_inputs(objective.classifier_of(self.teacher)) as reference_features:
            reference = self._teacher_outputs(inputs, cached, extras)
        sums = objective.sums(Seen(outputs, features), Seen(reference, reference_features), items)
        means = {"task": task, **{name: value * scales[name] for name, value in sums.items()}}
        for name, value in means.items():
            self._loss_sums[f"{name}_loss"] = self._loss_sums.get(f"{name}_loss", 0) + value.detach()
        weights = self.distillation.weights()
        loss = torch.stack([weights[name] * value for name, value in means.items()]).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in `Trainer`, without the teacher's logits."""
        return super().prediction_step(model, _without_cache(inputs), prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last log."""
        if "loss" in logs and self._loss_sums:
            for name, value in self._loss_sums.items():
                logs[name] = float(self.accelerator.gather(value).mean()) / self._summed_steps
            self._loss_sums, self._summed_steps = {}, 0
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        """The shim that keeps the teacher's columns when the Trainer removes those that the student does not take."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: list[str] = self._signature_columns  # type: ignore[assignment]
            columns += [LOGITS, INDICES] if self.teacher is None else []

    # ------------------------------------------------------------------------------------------------- what the callback calls

    def reuse_classifier(self) -> None:
        """Bring a reused classifier up to date with its projection."""
        self._objective.reuse_classifier(self._student, self.teacher, self._plain_projections)

    def release_classifier(self) -> None:
        """Let the student's classifier be trained again."""
        classifier = self._objective.classifier_of(self._student)
        if classifier is not None:
            classifier.requires_grad_(True)

    # ------------------------------------------------------------------------------------------------------------- inner works

    @property
    def _student(self) -> PreTrainedModel:
        """The student, out of its wrappers."""
        model: PreTrainedModel = without_peft(self.accelerator.unwrap_model(self.model))
        return model

    @property
    def _plain_projections(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.projections)
        return module

    def _over_processes(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    def _check_cached_logits(self) -> None:
        columns = getattr(self.train_dataset, "column_names", None)
        if self.distillation.alpha_logits and columns is not None and LOGITS not in columns:
            allowed = f"must be given, or the data have the column {LOGITS!r} (add_teacher_logits); it has {', '.join(columns)}."
            raise ConfigError("teacher", None, allowed)

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], labelled: bool, extras: dict[str, bool]) -> tuple[Tensor, Any]:
        """The task loss as a mean over the items of this micro-batch, with label smoothing if the arguments ask for it."""
        smoother = self.label_smoother if "labels" in inputs else None
        outputs = model(**{name: value for name, value in inputs.items() if smoother is None or name != "labels"}, **extras)
        if not labelled:
            # The mean over no label at all is NaN.
            return torch.stack([outputs[name].sum() for name in ("logits", *ANSWERS) if name in outputs]).sum() * 0, outputs
        if smoother is not None:
            return smoother(outputs, inputs["labels"], shift_labels=shifts_labels(self._student)), outputs
        if "loss" not in outputs:
            raise ValueError(f"The model returned no loss for the inputs {', '.join(inputs)}; do they hold labels?")
        return outputs["loss"], outputs

    def _teacher_outputs(
        self, inputs: Mapping[str, Any], cached: Mapping[str, Tensor], extras: Mapping[str, bool]
    ) -> Mapping[str, Any]:
        """What the teacher says of a batch, or said when its logits were cached."""
        if not (self.distillation.alpha_logits or self.distillation.needs_teacher):
            return {}
        if self.teacher is not None:
            dtype = self.distillation.teacher_dtype
            lower = torch.autocast(self.args.device.type, getattr(torch, dtype)) if dtype else nullcontext()
            with torch.no_grad(), lower:
                outputs: Mapping[str, Any] = self.teacher(**select(inputs, self._teacher_arguments), **extras)
            return convert_to_fp32(outputs) if dtype else outputs
        if LOGITS not in cached:
            raise ConfigError("teacher", None, f"must be given, or every row have {LOGITS!r} (see add_teacher_logits).")
        answers = dict(zip(ANSWERS, cached[LOGITS].unbind(dim=-1))) if "start_positions" in inputs else {}
        return {"logits": cached[LOGITS], INDICES: cached.get(INDICES), **answers}

    def _save_state(self, path: Path) -> None:
        """Write what is learned beside the student, if anything is. All processes take part, the first writes."""
        self._objective.refresh_layer_map(self._over_processes)
        tensors = self._objective.state_dict(self._plain_projections)
        if tensors and self.is_world_process_zero():
            save_file(tensors, path)

    def _load_state(self, path: Path) -> None:
        if path.is_file():
            self._objective.load_state_dict(load_file(path), self._plain_projections)
        elif list(self.projections.parameters()):
            raise FileNotFoundError(f"{path.parent} holds no {path.name}: it was not written by a run with these losses.")


class _DistillationCallback(TrainerCallback):
    """What has to happen at the Trainer's events."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.reuse_classifier()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.reuse_classifier()  # before `on_step_end`, in which other callbacks may save

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.release_classifier()


def _without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in COLUMNS}
