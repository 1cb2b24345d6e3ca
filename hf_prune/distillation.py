"""Knowledge distillation in the Trainer: task loss, KL on logits, MSE on the last hidden state.

Each loss is a mean over its own items (rows, labelled tokens, unpadded tokens), counted over the whole accumulated batch and all
processes, so 1×16, 2×8 and 4×4 accumulation give the same gradients, ragged last batch included.

Sources: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (logits, temperature); the hidden-state loss is that of Intel Neural
Compressor's recipes, which use it alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_LOGITS = ("logits", "start_logits", "end_logits")
_TARGETS = ("labels", "start_positions", "end_positions")


@dataclass
class DistillationConfig:
    """Weights of the losses. A loss whose weight is 0 is not computed.

    Args:
        temperature: softens both distributions in the logits loss, which is multiplied by its square.
        alpha_task: weight of the model's own loss.
        alpha_logits: weight of KL(teacher ‖ student) on the logits (mean squared error for regression).
        alpha_hidden: weight of the mean squared error between the last hidden states, padding left out.

    Raises:
        ValueError: a weight is negative, all are zero, or the temperature is not positive.
    """

    temperature: float = field(default=2.0, metadata={"help": "Temperature of the logits loss."})
    alpha_task: float = field(default=0.1, metadata={"help": "Weight of the task loss."})
    alpha_logits: float = field(default=0.9, metadata={"help": "Weight of the loss on the logits."})
    alpha_hidden: float = field(default=0.0, metadata={"help": "Weight of the loss on the last hidden state."})

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: must be greater than 0.")
        weights = {name: getattr(self, name) for name in ("alpha_task", "alpha_logits", "alpha_hidden")}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: must be 0 or more.")
        if not any(weights.values()):
            raise ValueError(
                f"alpha_task, alpha_logits, alpha_hidden={tuple(weights.values())}: at least one must be greater than 0."
            )


# ------------------------------------------------------------------------------------------------------------ losses on tensors


def logits_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), summed over the items of `mask`; squared error when there is one output.

    Args:
        student, teacher: `[..., classes]`.
        mask: bool `[...]`, the items that count.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return ((student - teacher).square().squeeze(-1) * mask).sum()
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    )
    return (divergence.sum(dim=-1) * mask).sum() * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error, mean over hidden size, sum over the tokens of `mask`. `[batch, tokens, hidden]`, bool `[batch, tokens]`."""
    return ((student.float() - teacher.float()).square().mean(dim=-1) * mask).sum()


# --------------------------------------------------------------------------------------------------------------------- trainer


class DistillationTrainer(Trainer):
    """A Trainer whose student also learns from a teacher.

    Args:
        teacher: a model with the student's outputs; it is put in evaluation mode and its parameters are frozen.
        distillation: the weights of the losses, a [`DistillationConfig`].
        args, kwargs: as for `Trainer`.

    Each loss is logged on its own: `task_loss`, `logits_loss`, `hidden_loss` (unweighted). Evaluation reports the plain task loss.
    """

    #: compute_loss already divides by the items of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, teacher: PreTrainedModel, distillation: DistillationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or DistillationConfig()
        if teacher is self.model:
            raise ValueError("teacher: must be another model than the student; pass a copy (copy.deepcopy(model)).")
        student, reference = self.accelerator.unwrap_model(self.model).config, teacher.config
        if student.num_labels != reference.num_labels:
            raise ValueError(
                f"teacher: has num_labels={reference.num_labels}, the student {student.num_labels}; they must be equal."
            )
        if self.distillation.alpha_hidden and reference.hidden_size != student.hidden_size:
            raise ValueError(
                f"alpha_hidden={self.distillation.alpha_hidden}: the teacher's hidden_size={reference.hidden_size} "
                f"must equal the student's {student.hidden_size}."
            )
        self._teacher_inputs = set(inspect.signature(teacher.forward).parameters) - set(_TARGETS)
        self.teacher: nn.Module = self.accelerator.prepare_model(teacher.requires_grad_(False), evaluation_mode=True)
        self.teacher.to(self.args.device).eval()
        self._batch_items: dict[str, Tensor] | None = None
        self._loss_sums: dict[str, Tensor] = {}
        self._summed_steps = 0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also counts what each loss is a mean over, in all micro-batches and on all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [self._count_items(batch) for batch in batches]
            totals = torch.stack([sum(count[name] for count in counts) for name in sorted(counts[0])]).to(device)  # type: ignore[misc]
            totals = self.accelerator.reduce(totals, reduction="sum")
            self._batch_items = dict(zip(sorted(counts[0]), totals))
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
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        settings = self.distillation
        counts = {name: count.to(self.args.device) for name, count in self._count_items(inputs).items()}
        totals = self._batch_items or counts
        hidden = settings.alpha_hidden > 0
        task, outputs = self._task_loss(model, inputs, output_hidden_states=hidden)
        names = [name for name in _LOGITS if name in outputs]
        if not counts["task"]:
            # The mean over no label at all is NaN.
            task = torch.stack([outputs[name].sum() for name in names]).sum() * 0
        sums = {"task": task * counts["task"]}
        if settings.alpha_logits or hidden:
            with torch.no_grad():
                teacher_inputs = {name: value for name, value in inputs.items() if name in self._teacher_inputs}
                reference = self.teacher(**teacher_inputs, output_hidden_states=hidden)
            if settings.alpha_logits:
                mask = self._label_mask(inputs)
                losses = [
                    logits_loss(self._aligned(outputs[name]), self._aligned(reference[name]), mask, settings.temperature)
                    for name in names
                ]
                sums["logits"] = torch.stack(losses).mean()
            if hidden:
                sums["hidden"] = hidden_loss(outputs.hidden_states[-1], reference.hidden_states[-1], _padding_mask(inputs))
        # Gradients are averaged over processes, the totals are sums over them.
        scale = self.accelerator.num_processes
        means = {name: value * scale / totals[name].clamp(min=1) for name, value in sums.items()}
        for name, value in means.items():
            self._loss_sums[f"{name}_loss"] = self._loss_sums.get(f"{name}_loss", 0) + value.detach()
        loss = sum((getattr(settings, f"alpha_{name}") * value for name, value in means.items()), torch.zeros_like(task))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last log."""
        if "loss" in logs and self._loss_sums:
            for name, value in self._loss_sums.items():
                logs[name] = float(self.accelerator.gather(value).mean()) / self._summed_steps
            self._loss_sums, self._summed_steps = {}, 0
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------------------------- inner works

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> tuple[Tensor, Any]:
        """The task loss as a mean over the items of this micro-batch, with label smoothing if the arguments ask for it."""
        if self.label_smoother is not None and "labels" in inputs:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, **kwargs)
            return self.label_smoother(outputs, inputs["labels"], shift_labels=self._shifts_labels), outputs
        outputs = model(**inputs, **kwargs)
        if "loss" not in outputs:
            raise ValueError(f"The model returned no loss for the inputs {', '.join(inputs)}; do they hold labels?")
        return outputs["loss"], outputs

    @property
    def _shifts_labels(self) -> bool:
        """Whether the task loss compares each position with the next label, as causal language models do."""
        name = type(self.accelerator.unwrap_model(self.model)).__name__
        return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _aligned(self, logits: Tensor) -> Tensor:
        return logits[:, :-1] if self._shifts_labels else logits

    def _label_mask(self, inputs: Mapping[str, Any]) -> Tensor:
        """The items of the logits: rows, or tokens, whose label is not ignored."""
        labels = inputs.get("labels")
        if torch.is_tensor(labels) and not labels.is_floating_point():
            return (labels[:, 1:] if self._shifts_labels else labels) != -100
        rows = next(value for value in inputs.values() if torch.is_tensor(value)).shape[0]
        return torch.ones(rows, dtype=torch.bool, device=self.args.device)

    def _count_items(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What each loss is a mean over, in one micro-batch."""
        labelled = self._label_mask(inputs).sum()
        return {"task": labelled, "logits": labelled, "hidden": _padding_mask(inputs).sum()}


def _padding_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Bool `[sequences, tokens]`: which tokens are no padding. Multiple choice has as many sequences as there are choices."""
    tokens = next(value for name, value in inputs.items() if name in ("input_ids", "inputs_embeds") and torch.is_tensor(value))
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    mask = inputs.get("attention_mask")
    if not (torch.is_tensor(mask) and mask.shape == shape):
        mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    return mask.reshape(-1, shape[-1]).bool()
