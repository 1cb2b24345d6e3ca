"""What distillation reads off a student or teacher model: inputs, class, layers, classifier."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..compat import auto_classes, without_peft
from ..settings.errors import ConfigError

_TARGETS = ("labels", "start_positions", "end_positions")


def shifts_labels(model: nn.Module) -> bool:
    """Whether the task loss compares each position with the next label, as causal language models do."""
    return type(without_peft(model)).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the logits are over the vocabulary."""
    return model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]


def forward_arguments(model: nn.Module) -> set[str]:
    """The names of the arguments of a model's `forward`."""
    return set(inspect.signature(without_peft(model).forward).parameters)


def teacher_arguments(model: nn.Module) -> set[str]:
    """The inputs that a teacher needs to give logits. A decoder makes its inputs from the labels."""
    targets = () if without_peft(model).config.is_encoder_decoder else _TARGETS
    return forward_arguments(model) - set(targets)


def load_teacher(path: str | os.PathLike[str], student: nn.Module) -> PreTrainedModel:
    """Load a teacher for the student's task, through the Auto class that the student's class belongs to."""
    model = without_peft(student)
    for auto, classes in auto_classes(model.config.model_type):
        if auto != "AutoModelForPreTraining" and type(model).__name__ in classes:
            loaded: PreTrainedModel = getattr(modeling_auto, auto).from_pretrained(path)
            return loaded
    return type(model).from_pretrained(path)  # type: ignore[no-any-return]


def depths(config: PreTrainedConfig) -> dict[str, int]:
    """The number of layers of each stack: `layers`, or `encoder` and `decoder`."""
    if not config.is_encoder_decoder:
        return {"layers": config.num_hidden_layers}
    names = {"encoder": ("encoder_layers", "num_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}
    return {stack: next(getattr(config, name) for name in fields if hasattr(config, name)) for stack, fields in names.items()}


def final_classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that computes the logits: the last one outside of the base model with as many outputs as there are labels.

    Raises:
        ConfigError: there is none, or it is tied to embeddings, as in language models.
    """
    plain: PreTrainedModel = without_peft(model)
    prefix = f"{plain.base_model_prefix}."
    candidates = [
        module
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(prefix) and module.out_features == plain.config.num_labels
    ]
    if not candidates or is_language_model(plain):
        raise ConfigError("alpha_simkd", type(plain).__name__, "needs a model that ends in a linear classifier of its own.")
    return candidates[-1]


@contextmanager
def recorded_inputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """The inputs that a module is called with inside the context."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def select(inputs: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The inputs of these names."""
    return {name: value for name, value in inputs.items() if name in names}
