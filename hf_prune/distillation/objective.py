"""The distillation losses of a micro-batch, and the state that they keep during a run.

Sources: see `losses.py` and `layers.py`; the reused classifier is SimKD, Chen et al. 2022, https://arxiv.org/abs/2203.14001. The
student's projected features are the input of the teacher's classifier. Projection and classifier are linear, so their product is an
ordinary classifier: the student's own, which is set to it after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import without_peft
from ..settings.errors import ConfigError
from .cache import INDICES
from .config import DistillationConfig
from .items import Items
from .layers import Pairs, closest_layers, layer_pairs
from .losses import attention_loss, distances, hidden_loss, logits_loss, pooled_weights, token_weights, without_padding
from .models import depths, final_classifier, is_language_model

ANSWERS = ("start_logits", "end_logits")


class Seen(NamedTuple):
    """What a model returned for a micro-batch: its outputs, and the inputs of its final classifier."""

    outputs: Mapping[str, Any]
    features: list[Tensor]


class Projections(nn.ModuleDict):
    """A linear map without bias for each loss that compares hidden states of different widths, shared by the layers of a stack.

    They are trained with the student but are not part of it.

    Args:
        widths: student's and teacher's width, by the name of the loss. Equal widths need no map.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__({name: nn.Linear(*pair, bias=False) for name, pair in widths.items() if pair[0] != pair[1]})

    def forward(self, states: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Map the hidden states of each loss."""
        return {name: [self[name](each) for each in given] if name in self else given for name, given in states.items()}


class Objective:
    """The losses between a student and a teacher.

    Args:
        settings: their weights.
        student: the model that learns.
        teacher: the model that it learns from, or None when only cached logits are used.

    Attributes:
        projections: what is trained alongside the student; a trainer may wrap it.
        pairs: by stack, the layers that are compared.
        forward_arguments: what both models have to be called with, besides the inputs.

    Raises:
        ConfigError: a loss needs what the models do not have.
        ValueError: the teacher does not fit the student.
    """

    def __init__(self, settings: DistillationConfig, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.settings = settings
        self.pairs: dict[str, Pairs] = {}
        self.forward_arguments: dict[str, bool] = {}
        self._distances: dict[str, Tensor] = {}
        if teacher is None:
            self._check_no_teacher()
            self.projections: nn.Module = Projections({})
            return
        _check_teacher(student, teacher)
        own, other = student.config, without_peft(teacher).config
        if settings.alpha_hidden_layers or settings.alpha_attention:
            self.pairs = _mapped_layers(settings, depths(own), depths(other))
        names = [f"hidden_layers_{stack}" for stack in self.pairs] if settings.alpha_hidden_layers else []
        names += ["hidden"] if settings.alpha_hidden else []
        widths = dict.fromkeys(names, (own.hidden_size, other.hidden_size)) if names else {}
        if settings.alpha_simkd:
            widths["simkd"] = (final_classifier(student).in_features, final_classifier(teacher).in_features)
        self.projections = Projections(widths)
        self.forward_arguments |= {"output_hidden_states": True} if names else {}
        self.forward_arguments |= {"output_attentions": True} if settings.alpha_attention else {}

    def _check_no_teacher(self) -> None:
        for name, weight in self.settings.weights().items():
            if weight and name not in ("task", "logits"):
                allowed = f"must be given for alpha_{name}={weight}; cached logits serve alpha_logits alone."
                raise ConfigError("teacher", None, allowed)

    # ------------------------------------------------------------------------------------------------------------- the losses

    def sums(self, student: Seen, teacher: Seen, items: Items) -> dict[str, Tensor]:
        """Each loss but the task's that has a weight, summed over its items of the micro-batch."""
        sums = self._feature_sums(student, teacher, items) if self.settings.needs_teacher else {}
        if self.settings.alpha_logits:
            sums["logits"] = self._logits_sum(student.outputs, teacher.outputs, items)
        return sums

    def _logits_sum(self, student: Mapping[str, Any], teacher: Mapping[str, Any], items: Items) -> Tensor:
        temperature = self.settings.temperature
        if "start_logits" in student:
            own, other = ([without_padding(each[name], items.last_tokens) for name in ANSWERS] for each in (student, teacher))
            return torch.stack([logits_loss(*pair, items.labelled, temperature, "spans") for pair in zip(own, other)]).mean()
        logits, reference, indices = student["logits"], teacher["logits"], teacher.get(INDICES)
        if indices is None and logits.shape != reference.shape:
            raise ValueError(
                f"teacher: gives logits {list(reference.shape)}, the student {list(logits.shape)}; they must be equal."
            )
        if items.shifted:
            logits, reference, indices = (None if each is None else each[:, :-1] for each in (logits, reference, indices))
        problem_type = items.problem_type if logits.dim() == 2 else None
        return logits_loss(logits, reference, items.labelled, temperature, problem_type, indices)

    def _feature_sums(self, student: Seen, teacher: Seen, items: Items) -> dict[str, Tensor]:
        """The losses on hidden states, attention maps and the classifier's inputs."""
        settings = self.settings
        by_layer = {f"hidden_layers_{stack}": stack for stack in self.pairs if settings.alpha_hidden_layers}
        states = {name: _of_stack(student.outputs, stack, "hidden_states")[1:] for name, stack in by_layer.items()}
        states |= {"hidden": _last_states(student.outputs)[-1:]} if settings.alpha_hidden else {}
        states |= {"simkd": student.features} if settings.alpha_simkd else {}
        # One call, as wrappers that synchronise gradients expect.
        states = self.projections(states)
        sums: dict[str, Tensor] = {}
        if settings.alpha_hidden:
            (own,), other = states["hidden"], _last_states(teacher.outputs)[-1]
            sums["hidden"] = hidden_loss(own, other, token_weights(items.last_tokens, own.shape[1]))
        if settings.alpha_simkd:
            (own,), (other,) = states["simkd"], teacher.features
            pooled = pooled_weights(items.last_tokens)
            sums["simkd"] = hidden_loss(
                own, other, token_weights(pooled, own.shape[1]) if own.dim() == 3 else own.new_ones(len(own))
            )
        if by_layer:
            layers = {
                stack: (states[name], _of_stack(teacher.outputs, stack, "hidden_states")[1:]) for name, stack in by_layer.items()
            }
            sums["hidden_layers"] = self._sum_over_stacks(layers, items, hidden_loss)
            if settings.layer_map == "dynamic":
                self._measure(layers, items)
        if settings.alpha_attention:
            maps = {
                stack: tuple(_of_stack(seen.outputs, stack, "attentions") for seen in (student, teacher)) for stack in self.pairs
            }
            sums["attention"] = self._sum_over_stacks(maps, items, attention_loss)
        return sums

    def _sum_over_stacks(self, layers: Mapping[str, Any], items: Items, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The loss of each stack, mean over its mapped layers.

        A layer that has lost all its heads has nothing to learn from a map.
        """
        total = torch.zeros((), device=items.labelled.device)
        for stack, (own, other) in layers.items():
            pairs = [(own[one], other[two]) for one, two in self.pairs[stack] if own[one].numel() and other[two].numel()]
            losses = [loss(one, two, token_weights(items.tokens[stack], one.shape[-2])) for one, two in pairs]
            total = total + (torch.stack(losses).mean() if losses else 0)
        return total

    # ---------------------------------------------------------------------------------------------------------- the layer map

    def _measure(self, layers: Mapping[str, Any], items: Items) -> None:
        for stack, (own, other) in layers.items():
            seen = distances(own, other, token_weights(items.tokens[stack], own[0].shape[1]))
            self._distances[stack] = self._distances.get(stack, 0) + seen

    def refresh_layer_map(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Choose the dynamic map by the distances measured since the last time.

        All micro-batches of an optimizer step share a map, that of the step before, so accumulation changes nothing.

        Args:
            reduce: sums a tensor over all processes.
        """
        self.pairs |= {stack: closest_layers(reduce(seen)) for stack, seen in self._distances.items()}
        self._distances = {}

    # --------------------------------------------------------------------------------------------------------- the classifier

    def classifier_of(self, model: nn.Module | None) -> nn.Linear | None:
        """The final classifier of student or teacher if it is reused."""
        return final_classifier(model) if self.settings.alpha_simkd and model is not None else None

    def prepare(self, *models: PreTrainedModel) -> None:
        """Switch models to eager attention, the only one that returns its maps, if maps are compared."""
        for model in models:
            if self.settings.alpha_attention and model.config._attn_implementation != "eager":
                model.set_attn_implementation("eager")

    def reuse_classifier(self, student: nn.Module, teacher: nn.Module | None, projections: nn.Module) -> None:
        """Make the student's classifier the teacher's, after the projection if there is one.

        Args:
            projections: those of this objective, unwrapped.
        """
        own, other = self.classifier_of(student), self.classifier_of(teacher)
        if own is None or other is None:
            return
        maps = projections.state_dict()
        with torch.no_grad():
            own.weight.copy_(other.weight @ maps["simkd.weight"].to(other.weight.dtype) if "simkd.weight" in maps else other.weight)
            if own.bias is not None:
                own.bias.copy_(torch.zeros_like(own.bias) if other.bias is None else other.bias)

    # -------------------------------------------------------------------------------------------------------------- its state

    def state_dict(self, projections: nn.Module) -> dict[str, Tensor]:
        """The projections (unwrapped) and the dynamic layer map."""
        tensors = {f"projections.{name}": tensor.cpu().contiguous() for name, tensor in projections.state_dict().items()}
        if self.settings.layer_map == "dynamic":
            tensors |= {f"layer_map.{stack}": torch.tensor(pairs) for stack, pairs in self.pairs.items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], projections: nn.Module) -> None:
        """Restore what `state_dict` returned."""
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("projections.")}
        projections.load_state_dict({name.removeprefix("projections."): tensor for name, tensor in own.items()})
        self._distances = {}
        for stack in self.pairs:
            if f"layer_map.{stack}" in tensors:
                self.pairs[stack] = [(int(one), int(two)) for one, two in tensors[f"layer_map.{stack}"]]


# ------------------------------------------------------------------------------------------------------------------ inner works


def _check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if without_peft(teacher) is student:
        raise ValueError("teacher: must be another model than the student; pass a copy (copy.deepcopy(model)).")
    own, other = student.config, without_peft(teacher).config
    ours, theirs = (getattr(config.get_text_config(), "vocab_size", None) for config in (own, other))
    if ours != theirs and (_lacks_tokens(own) or _lacks_tokens(other)):
        raise ValueError(
            f"teacher: has {theirs} tokens, the student {ours}, and one vocabulary was cut, so they would read other ids; "
            "cut both with the same texts (prune_vocabulary)."
        )
    if is_language_model(student):
        return
    if own.num_labels != other.num_labels:
        raise ValueError(f"teacher: has num_labels={other.num_labels}, the student {own.num_labels}; they must be equal.")
    labels, others = own.label2id or {}, other.label2id or {}
    if labels != others and labels.keys() == others.keys():
        raise ValueError(f"teacher: has label2id={others}, the student {labels}; their order must be equal.")


def _lacks_tokens(config: Any) -> bool:
    """Whether the vocabulary of a model was cut."""
    return "vocab_size" in ((getattr(config, "hf_prune", None) or {}).get("original") or {})


def _mapped_layers(settings: DistillationConfig, student: dict[str, int], teacher: dict[str, int]) -> dict[str, Pairs]:
    if student.keys() != teacher.keys():
        raise ValueError("teacher: must be an encoder-decoder if and only if the student is one, for losses by layer.")
    return {stack: layer_pairs(settings.layer_map, student[stack], teacher[stack]) for stack in student}


def _of_stack(outputs: Mapping[str, Any], stack: str, name: str) -> list[Tensor]:
    """The hidden states or attention maps of a stack."""
    return list(outputs[name if stack == "layers" else f"{stack}_{name}"])


def _last_states(outputs: Mapping[str, Any]) -> list[Tensor]:
    """The hidden states of the decoder, or of the only stack."""
    return _of_stack(outputs, "decoder" if "decoder_hidden_states" in outputs else "layers", "hidden_states")
