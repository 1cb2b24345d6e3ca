"""`DistillationTrainer`: a Trainer whose student also learns from a teacher, or from logits that a teacher left in the data.

Each loss is a mean over its own items, counted over the whole accumulated batch and all processes, so 1×16, 2×8 and 4×4
accumulation give the same gradients, ragged last batch included, and so do one process and two:

| loss | a mean over |
| --- | --- |
| `task`, `logits` | rows, or tokens whose label is not ignored |
| `hidden` | tokens that are no padding, of the decoder where there is one |
| `hidden_layers`, `attention` | tokens that are no padding, of encoder and decoder; each the mean over its mapped layers |
| `simkd` | sequences; where a token has an input of its own, each the mean over its tokens |

Images and sound have no padding that is known beforehand: there, hidden states count a sequence as one item.

Sources: see `losses.py` and `layers.py`; the reused classifier is SimKD, Chen et al. 2022, https://arxiv.org/abs/2203.14001.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..config import PruningConfigError
from .cache import COLUMNS, INDICES, LOGITS, TeacherLogitsCollator
from .config import DistillationConfig
from .layers import Pairs, closest_layers, layer_pairs
from .losses import attention_loss, distances, hidden_loss, logits_loss, pooled_weights, token_weights, without_padding
from .modules import Projections
from .teacher import (
    base_model,
    depths,
    final_classifier,
    is_language_model,
    load_teacher,
    recorded_inputs,
    select,
    shifts_labels,
    teacher_arguments,
)

STATE_NAME = "distillation.safetensors"
_ANSWERS = ("start_logits", "end_logits")


class DistillationTrainer(Trainer):
    """A Trainer whose student also learns from a teacher.

    Args:
        teacher: a model with the student's outputs, which is put in evaluation mode and whose parameters are frozen; a path, or an
            id on the Hub, of one for the student's task; or None, when the data has the column `teacher_logits`
            ([`add_teacher_logits`]). The column is ignored when there is a teacher.
        distillation: the weights of the losses, a [`DistillationConfig`] or a dictionary with its fields.
        args, kwargs: as for `Trainer`.

    Each loss is logged on its own (unweighted), such as `task_loss` and `logits_loss`. Evaluation reports the plain task loss.
    Attention maps need eager attention, to which student and teacher are switched when `alpha_attention` is not 0.

    Raises:
        PruningConfigError: the teacher does not fit the student or the losses.
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
        student = self._plain_student
        if teacher is None:
            self._check_cached_logits()
            of_labels = student.config.is_encoder_decoder and is_language_model(student)
            self.data_collator = TeacherLogitsCollator(self.data_collator, "labels" if of_labels else "input_ids")
        else:
            teacher = load_teacher(teacher, student) if isinstance(teacher, (str, os.PathLike)) else teacher
            self._check_teacher(student, teacher)
        self._pairs: dict[str, Pairs] = {}
        self._prepare_teacher(student, teacher)
        self._distances: dict[str, Tensor] = {}
        self._batch_items: dict[str, Tensor] | None = None
        self._loss_sums: dict[str, Tensor] = {}
        self._summed_steps = 0
        self.add_callback(_DistillationCallback(self))

    # ---------------------------------------------------------------------------------------------------------- Trainer's hooks

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; a checkpoint brings its projections and layer map back."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        self._distances = {}
        if folder:
            self._load_state(Path(str(folder)) / STATE_NAME)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adds the projections to the optimizer, as a group with its defaults, and freezes a reused classifier."""
        if self._classifiers[0] is not None:
            self._classifiers[0].requires_grad_(False)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learned = [parameter for parameter in self.projections.parameters() if id(parameter) not in known]
        if learned:
            optimizer.add_param_group({"params": learned, "weight_decay": self.args.weight_decay})
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also counts what each loss is a mean over, in all micro-batches and on all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.projections.zero_grad()  # The Trainer does so for the student.
            self.refresh_layer_map()
            counts = [self._items(batch).counts() for batch in batches]
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
        cached, inputs = select(inputs, set(COLUMNS)), _without_cache(inputs)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = self._items(inputs)
        counts = {name: count.to(self.args.device) for name, count in items.counts().items()}
        totals = self._batch_items or counts
        # Gradients are averaged over processes, the totals are sums over them.
        scales = {name: self.accelerator.num_processes / total.clamp(min=1) for name, total in totals.items()}
        with recorded_inputs(self._classifiers[0]) as features:
            if self.compute_loss_func is not None:
                task, outputs = super().compute_loss(model, {**inputs, **self._extras}, True, num_items_in_batch)
            else:
                task, outputs = self._task_loss(model, inputs, bool(counts["task"]))
                task = task * counts["task"] * scales["task"]
        with recorded_inputs(self._classifiers[1]) as reference_features:
            reference = self._teacher_outputs(inputs, cached)
        sums = self._feature_losses(outputs, reference, items, features, reference_features)
        if self.distillation.alpha_logits:
            sums["logits"] = self._logits_loss(outputs, reference, inputs, items)
        means = {"task": task, **{name: value * scales[name] for name, value in sums.items()}}
        for name, value in means.items():
            self._loss_sums[f"{name}_loss"] = self._loss_sums.get(f"{name}_loss", 0) + value.detach()
        weights = self.distillation.weights()
        loss = sum((weights[name] * value for name, value in means.items()), torch.zeros_like(task))
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

    def refresh_layer_map(self) -> None:
        """Decide the dynamic layer map by the distances seen since the last time, on all processes."""
        for stack, seen in self._distances.items():
            self._pairs[stack] = closest_layers(self.accelerator.reduce(seen, reduction="sum"))
        self._distances = {}

    def reuse_classifier(self) -> None:
        """Make the student's classifier the teacher's, after the projection if there is one: a single linear map again."""
        own, other = self._classifiers
        if own is None or other is None:
            return
        plain = self.accelerator.unwrap_model(self.projections)
        weight = other.weight @ plain["simkd"].weight.to(other.weight.dtype) if "simkd" in plain else other.weight
        with torch.no_grad():
            own.weight.copy_(weight)
            if own.bias is not None:
                own.bias.copy_(torch.zeros_like(own.bias) if other.bias is None else other.bias)

    def release_classifier(self) -> None:
        """Let the student's classifier be trained again."""
        if self._classifiers[0] is not None:
            self._classifiers[0].requires_grad_(True)

    def save_state_tensors(self, path: Path) -> None:
        """Write the projections and the layer map, if there is something to write."""
        plain = self.accelerator.unwrap_model(self.projections)
        tensors = {f"projections.{name}": tensor.cpu().contiguous() for name, tensor in plain.state_dict().items()}
        if self.distillation.layer_map == "dynamic":
            tensors |= {f"layer_map.{stack}": torch.tensor(pairs) for stack, pairs in self._pairs.items()}
        if tensors:
            save_file(tensors, path)

    # --------------------------------------------------------------------------------------------------------------- setting up

    @property
    def _plain_student(self) -> PreTrainedModel:
        """The student, out of its wrappers."""
        model: PreTrainedModel = base_model(self.accelerator.unwrap_model(self.model))
        return model

    def _check_cached_logits(self) -> None:
        weights = self.distillation.weights()
        for name in ("hidden", "hidden_layers", "attention", "simkd"):
            if weights[name]:
                allowed = f"must be given for alpha_{name}={weights[name]}; cached logits serve alpha_logits alone."
                raise PruningConfigError("teacher", None, allowed)
        columns = getattr(self.train_dataset, "column_names", None)
        if weights["logits"] and columns is not None and LOGITS not in columns:
            allowed = f"must be given, or the data have the column {LOGITS!r} (add_teacher_logits); it has {', '.join(columns)}."
            raise PruningConfigError("teacher", None, allowed)

    def _check_teacher(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        if teacher is self.model or base_model(teacher) is student:
            raise ValueError("teacher: must be another model than the student; pass a copy (copy.deepcopy(model)).")
        own, other = student.config, base_model(teacher).config
        if not is_language_model(student):
            if own.num_labels != other.num_labels:
                raise ValueError(f"teacher: has num_labels={other.num_labels}, the student {own.num_labels}; they must be equal.")
            ours, theirs = own.label2id or {}, other.label2id or {}
            if ours != theirs and ours.keys() == theirs.keys():
                raise ValueError(f"teacher: has label2id={theirs}, the student {ours}; their order must be equal.")
        if depths(own).keys() != depths(other).keys() and (
            self.distillation.alpha_hidden_layers or self.distillation.alpha_attention
        ):
            raise ValueError("teacher: must be an encoder-decoder if and only if the student is one, for losses by layer.")

    def _prepare_teacher(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Everything that depends on the teacher: projections, classifiers, layer maps, what both must return."""
        settings = self.distillation
        self.teacher: nn.Module | None = None
        self.projections: nn.Module = Projections({})
        self._classifiers: tuple[nn.Linear | None, nn.Linear | None] = (None, None)
        self._extras: dict[str, bool] = {}
        if teacher is None:
            return
        widths: dict[str, tuple[int, int]] = {}
        own, other = student.config, base_model(teacher).config
        by_layer = settings.alpha_hidden_layers > 0 or settings.alpha_attention > 0
        if by_layer:
            self._pairs = {
                stack: layer_pairs(settings.layer_map, size, depths(other)[stack]) for stack, size in depths(own).items()
            }
        if settings.alpha_hidden:
            widths["hidden"] = (own.hidden_size, other.hidden_size)
        if settings.alpha_hidden_layers:
            widths |= {f"hidden_layers_{stack}": (own.hidden_size, other.hidden_size) for stack in self._pairs}
        if widths:
            self._extras["output_hidden_states"] = True
        if settings.alpha_attention:
            self._extras["output_attentions"] = True
        if settings.alpha_simkd:
            one, two = final_classifier(student), final_classifier(teacher)
            self._classifiers = (one, two)
            widths["simkd"] = (one.in_features, two.in_features)
        if settings.alpha_attention:
            for model in (student, base_model(teacher)):
                model.set_attn_implementation("eager")
        self._teacher_arguments = teacher_arguments(teacher)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False), evaluation_mode=True)
        self.teacher.to(self.args.device).eval()
        projections = Projections(widths).to(self.args.device)
        self.projections = self.accelerator.prepare_model(projections) if len(projections) else projections

    def _load_state(self, path: Path) -> None:
        plain = self.accelerator.unwrap_model(self.projections)
        if not path.is_file():
            if len(plain):
                raise FileNotFoundError(f"{path.parent} holds no {path.name}: it was not written by a run with these losses.")
            return
        tensors = load_file(path)
        plain.load_state_dict(
            {name.removeprefix("projections."): tensors[name] for name in tensors if name.startswith("projections.")}
        )
        for stack in self._pairs:
            if f"layer_map.{stack}" in tensors:
                self._pairs[stack] = [(int(one), int(two)) for one, two in tensors[f"layer_map.{stack}"]]

    # --------------------------------------------------------------------------------------------------------------- the losses

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], labelled: bool) -> tuple[Tensor, Any]:
        """The task loss as a mean over the items of this micro-batch, with label smoothing if the arguments ask for it."""
        smooth = self.label_smoother is not None and "labels" in inputs
        outputs = model(**{name: value for name, value in inputs.items() if not (smooth and name == "labels")}, **self._extras)
        if not labelled:
            # The mean over no label at all is NaN.
            return torch.stack([outputs[name].sum() for name in ("logits", *_ANSWERS) if name in outputs]).sum() * 0, outputs
        if smooth:
            shift = shifts_labels(self._plain_student)
            return self.label_smoother(outputs, inputs["labels"], shift_labels=shift), outputs  # type: ignore[misc]
        if "loss" not in outputs:
            raise ValueError(f"The model returned no loss for the inputs {', '.join(inputs)}; do they hold labels?")
        return outputs["loss"], outputs

    def _teacher_outputs(self, inputs: Mapping[str, Any], cached: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """What the teacher says of a batch, or said when its logits were cached."""
        if not (self.distillation.alpha_logits or self._extras or self._classifiers[1]):
            return {}
        if self.teacher is not None:
            with torch.no_grad():
                outputs: Mapping[str, Any] = self.teacher(**select(inputs, self._teacher_arguments), **self._extras)
                return outputs
        if LOGITS not in cached:
            raise PruningConfigError("teacher", None, f"must be given, or every row have {LOGITS!r} (see add_teacher_logits).")
        answers = dict(zip(_ANSWERS, cached[LOGITS].unbind(dim=-1)))
        return {"logits": cached[LOGITS], INDICES: cached.get(INDICES), **(answers if "start_positions" in inputs else {})}

    def _logits_loss(
        self, outputs: Mapping[str, Any], reference: Mapping[str, Any], inputs: Mapping[str, Any], items: _Items
    ) -> Tensor:
        temperature, indices = self.distillation.temperature, reference.get(INDICES)
        if "start_logits" in outputs:
            own, other = ([without_padding(each[name], items.last_tokens) for name in _ANSWERS] for each in (outputs, reference))
            return torch.stack([logits_loss(*pair, items.labelled, temperature, "spans") for pair in zip(own, other)]).mean()
        student, teacher = outputs["logits"], reference["logits"]
        if indices is None and student.shape != teacher.shape:
            raise ValueError(f"teacher: gives logits {list(teacher.shape)}, the student {list(student.shape)}; they must be equal.")
        if self._shifts(inputs):
            student, teacher = student[:, :-1], teacher[:, :-1]
            indices = None if indices is None else indices[:, :-1]
        return logits_loss(student, teacher, items.labelled, temperature, self._problem_type(inputs, student), indices)

    def _feature_losses(
        self,
        outputs: Mapping[str, Any],
        reference: Mapping[str, Any],
        items: _Items,
        features: list[Tensor],
        reference_features: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses on hidden states, attention maps and the classifier's inputs."""
        settings = self.distillation
        states: dict[str, list[Tensor]] = {"simkd": features} if self._classifiers[0] else {}
        if settings.alpha_hidden:
            states["hidden"] = [_last_stack(outputs)[-1]]
        if settings.alpha_hidden_layers:
            states |= {f"hidden_layers_{stack}": _of_stack(outputs, stack, "hidden_states")[1:] for stack in self._pairs}
        states = self.projections(states)
        sums: dict[str, Tensor] = {}
        if settings.alpha_hidden:
            (own,), other = states["hidden"], _last_stack(reference)[-1]
            sums["hidden"] = hidden_loss(own, other, token_weights(items.last_tokens, own.shape[1]))
        if self._classifiers[0]:
            (own,), (other,) = states["simkd"], reference_features
            weights = token_weights(pooled_weights(items.last_tokens), own.shape[1]) if own.dim() == 3 else own.new_ones(len(own))
            sums["simkd"] = hidden_loss(own, other, weights)
        for stack, pairs in self._pairs.items():
            if settings.alpha_hidden_layers:
                own_layers, other_layers = states[f"hidden_layers_{stack}"], _of_stack(reference, stack, "hidden_states")[1:]
                weights = token_weights(items.tokens[stack], own_layers[0].shape[1])
                if settings.layer_map == "dynamic":
                    seen = distances(own_layers, other_layers, weights)
                    self._distances[stack] = self._distances.get(stack, 0) + seen
                losses = [hidden_loss(own_layers[one], other_layers[two], weights) for one, two in pairs]
                sums["hidden_layers"] = sums.get("hidden_layers", 0) + torch.stack(losses).mean()
            if settings.alpha_attention:
                own_maps, other_maps = (_of_stack(each, stack, "attentions") for each in (outputs, reference))
                weights = token_weights(items.tokens[stack], own_maps[0].shape[2])
                sums["attention"] = sums.get("attention", 0) + _mean_attention_loss(own_maps, other_maps, weights, pairs)
        return sums

    def _shifts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a position's logits are compared with the next label, rather than with the one at the same place."""
        return "shift_labels" not in inputs and shifts_labels(self._plain_student)

    def _problem_type(self, inputs: Mapping[str, Any], logits: Tensor) -> str | None:
        """The `problem_type` that transformers' models give to these labels."""
        if logits.dim() > 2:
            return None
        labels, named = inputs.get("labels"), self._plain_student.config.problem_type
        several = torch.is_tensor(labels) and labels.is_floating_point() and logits.shape[-1] > 1
        return named or ("multi_label_classification" if several else None)

    def _items(self, inputs: Mapping[str, Any]) -> _Items:
        """What counts in one micro-batch, by its inputs alone."""
        tokens, labels = _padding_mask(inputs), inputs.get("shift_labels", inputs.get("labels"))
        positions = inputs.get("start_positions")
        stacks = {"layers": tokens}
        if torch.is_tensor(labels) and not labels.is_floating_point():
            labelled = (labels[:, 1:] if self._shifts(inputs) else labels) != -100
        elif torch.is_tensor(positions):
            labelled = positions.reshape(-1) < tokens.shape[1]  # Models ignore answers beyond the end.
        else:
            labelled = torch.ones(_rows(inputs), dtype=torch.bool, device=tokens.device)
        if self._plain_student.config.is_encoder_decoder:
            given = inputs.get("decoder_attention_mask")
            sequences = labelled if labelled.dim() == 2 else tokens
            stacks = {"encoder": tokens, "decoder": given.bool() if torch.is_tensor(given) else sequences}
        return _Items(labelled, stacks)


@dataclass(frozen=True)
class _Items:
    """What the losses are means over, in one micro-batch.

    Attributes:
        labelled: bool `[rows]` or `[rows, tokens]`, what has a label that is not ignored.
        tokens: by stack, bool `[sequences, tokens]`, what is no padding.
    """

    labelled: Tensor
    tokens: dict[str, Tensor]

    @property
    def last_tokens(self) -> Tensor:
        """The tokens of the decoder, or of the only stack."""
        return list(self.tokens.values())[-1]

    def counts(self) -> dict[str, Tensor]:
        """The denominator of each loss."""
        labelled, every = self.labelled.sum(), torch.stack([tokens.sum() for tokens in self.tokens.values()]).sum()
        sequences = every.new_tensor(len(self.last_tokens))
        return {
            "task": labelled,
            "logits": labelled,
            "hidden": self.last_tokens.sum(),
            "hidden_layers": every,
            "attention": every,
            "simkd": sequences,
        }


class _DistillationCallback(TrainerCallback):
    """What has to happen at the Trainer's events."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.reuse_classifier()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.reuse_classifier()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.release_classifier()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.refresh_layer_map()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.trainer.save_state_tensors(folder / STATE_NAME)


# ------------------------------------------------------------------------------------------------------------------ inner works


def _without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in COLUMNS}


def _of_stack(outputs: Mapping[str, Any], stack: str, name: str) -> list[Tensor]:
    """The hidden states or attention maps of a stack."""
    return list(outputs[name if stack == "layers" else f"{stack}_{name}"])


def _last_stack(outputs: Mapping[str, Any]) -> list[Tensor]:
    """The hidden states of the decoder, or of the only stack."""
    return _of_stack(outputs, "decoder" if "decoder_hidden_states" in outputs else "layers", "hidden_states")


def _mean_attention_loss(student: list[Tensor], teacher: list[Tensor], weights: Tensor, pairs: Pairs) -> Tensor:
    """Mean over the mapped layers; a layer that has lost all its heads has nothing to learn from a map."""
    mapped = [(student[one], teacher[two]) for one, two in pairs if student[one].shape[1] and teacher[two].shape[1]]
    losses = [attention_loss(one, two, weights) for one, two in mapped]
    return torch.stack(losses).mean() if losses else weights.new_zeros(())


def _rows(inputs: Mapping[str, Any]) -> int:
    return len(next(value for value in inputs.values() if torch.is_tensor(value)))


def _padding_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Bool `[sequences, tokens]`: which tokens are no padding; `[rows, 1]` for inputs that are no tokens.

    Multiple choice has as many sequences as there are choices.
    """
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if torch.is_tensor(inputs.get(name))), None)
    if tokens is None:
        return torch.ones(_rows(inputs), 1, dtype=torch.bool, device=next(v for v in inputs.values() if torch.is_tensor(v)).device)
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    mask = inputs.get("attention_mask")
    if not (torch.is_tensor(mask) and mask.shape == shape):
        mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    return mask.reshape(-1, shape[-1]).bool()
