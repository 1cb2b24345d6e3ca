"""What a student learns from its teacher, and how much each part of it weighs. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..settings.checks import dataclass_from_dict, is_number
from ..settings.errors import ConfigError, closest

#: Layer maps, by name; the functions are in `layers.py`.
LAYER_MAPS: tuple[str, ...] = ("uniform", "last", "dynamic")


@dataclass
class DistillationConfig:
    """Weights of the losses. A loss whose weight is 0 is not computed; the task loss is always logged.

    Args:
        temperature: softens both distributions in the logits loss, which is multiplied by its square.
        alpha_task: weight of the model's own loss.
        alpha_logits: weight of KL(teacher ‖ student) on the logits (mean squared error for regression).
        alpha_hidden: weight of the mean squared error between the last hidden states, padding left out.
        alpha_hidden_layers: weight of the mean squared error between the hidden states of the layers in `layer_map`.
        alpha_attention: weight of KL(teacher ‖ student) on the attention maps of the layers in `layer_map`.
        alpha_simkd: weight of the mean squared error between the inputs of the final classifiers. The student's classifier is
            replaced by the teacher's and frozen (SimKD); use it alone, with the other weights at 0.
        layer_map: which teacher layer a student layer learns from: `"uniform"`, `"last"`, `"dynamic"`, or pairs of a student layer
            and a teacher layer, counted from 0, such as `[[0, 1], [2, 5]]`.

    Raises:
        ConfigError: a weight is negative, all are zero, the temperature is not positive, or the layer map has no such form.
    """

    temperature: float = field(default=2.0, metadata={"help": "Temperature of the logits loss."})
    alpha_task: float = field(default=0.1, metadata={"help": "Weight of the task loss."})
    alpha_logits: float = field(default=0.9, metadata={"help": "Weight of the loss on the logits."})
    alpha_hidden: float = field(default=0.0, metadata={"help": "Weight of the loss on the last hidden state."})
    alpha_hidden_layers: float = field(default=0.0, metadata={"help": "Weight of the loss on the hidden states of mapped layers."})
    alpha_attention: float = field(default=0.0, metadata={"help": "Weight of the loss on the attention maps of mapped layers."})
    alpha_simkd: float = field(default=0.0, metadata={"help": "Weight of the loss on the inputs of the reused classifier."})
    layer_map: str | list[list[int]] = field(
        default="uniform", metadata={"help": "uniform, last, dynamic, or pairs of student and teacher layers."}
    )

    def __post_init__(self) -> None:
        if not _at_least_zero(self.temperature) or self.temperature == 0:
            raise ConfigError("temperature", self.temperature, "must be greater than 0.")
        weights = self.weights()
        for name, value in weights.items():
            if not _at_least_zero(value):
                raise ConfigError(f"alpha_{name}", value, "must be 0 or more.")
        if not any(weights.values()):
            raise ConfigError(
                ", ".join(f"alpha_{name}" for name in weights), tuple(weights.values()), "at least one must be greater than 0."
            )
        self._check_layer_map()

    def weights(self) -> dict[str, float]:
        """The weight of each loss, by the loss's name."""
        return {name.removeprefix("alpha_"): value for name, value in vars(self).items() if name.startswith("alpha_")}

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss needs more of the teacher than its logits."""
        return any(weight for name, weight in self.weights().items() if name not in ("task", "logits"))

    def _check_layer_map(self) -> None:
        names = ", ".join(repr(name) for name in LAYER_MAPS)
        allowed = f"must be {names} or a list of pairs [student layer, teacher layer], counted from 0."
        if isinstance(self.layer_map, str):
            if self.layer_map not in LAYER_MAPS:
                raise ConfigError("layer_map", self.layer_map, allowed, closest(self.layer_map, LAYER_MAPS))
            if self.layer_map == "dynamic" and self.alpha_attention and not self.alpha_hidden_layers:
                allowed = "needs alpha_hidden_layers greater than 0, the loss whose distances decide it."
                raise ConfigError("layer_map", self.layer_map, allowed)
        elif not (
            isinstance(self.layer_map, (list, tuple))
            and self.layer_map
            and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in self.layer_map)
            and all(type(layer) is int and layer >= 0 for pair in self.layer_map for layer in pair)
        ):
            raise ConfigError("layer_map", self.layer_map, allowed)
        else:
            self.layer_map = [list(pair) for pair in self.layer_map]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillationConfig:
        """Build from plain data; unknown keys are errors."""
        return dataclass_from_dict(cls, data)


def _at_least_zero(value: object) -> bool:
    """Whether it is a finite number of 0 or more."""
    return is_number(value) and value >= 0  # type: ignore[operator]
