"""The losses of distillation and their weights. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..settings.checks import check_at_least_zero, check_positive, dataclass_from_dict, fields_checked
from ..settings.errors import ConfigError, closest
from ..settings.fields import check_fields, documented, setting

#: Layer maps, by name; the functions are in `layers.py`.
LAYER_MAPS: tuple[str, ...] = ("uniform", "last", "dynamic")


@documented
@fields_checked
@dataclass
class DistillationConfig:
    """Weights of the losses. A loss of weight 0 is not computed; the task loss is always logged.

    Raises:
        ConfigError: a weight is negative, all are zero, the temperature is not positive, or the layer map is of another form.
    """

    temperature: float = setting(
        2.0, "Softens both distributions in the logits loss, which is multiplied by its square.", check_positive
    )
    alpha_task: float = setting(0.1, "Weight of the model's own loss.", check_at_least_zero)
    alpha_logits: float = setting(
        0.9, "Weight of KL(teacher ‖ student) on the logits (mean squared error for regression).", check_at_least_zero
    )
    alpha_hidden: float = setting(
        0.0,
        "Weight of the mean squared error between the last hidden states, padding left out.",
        check_at_least_zero,
    )
    alpha_hidden_layers: float = setting(
        0.0,
        "Weight of the mean squared error between the hidden states of the layers in layer_map.",
        check_at_least_zero,
    )
    alpha_attention: float = setting(
        0.0,
        "Weight of KL(teacher ‖ student) on the attention maps of the layers in layer_map.",
        check_at_least_zero,
    )
    alpha_simkd: float = setting(
        0.0,
        "Weight of the mean squared error between the inputs of the final classifiers. The student's classifier is replaced by the "
        "teacher's and frozen (SimKD); use it alone, with the other weights at 0.",
        check_at_least_zero,
    )
    layer_map: str | list[list[int]] = setting(
        "uniform",
        f"Which teacher layer a student layer learns from: {', '.join(LAYER_MAPS)}, or pairs of a student layer and a teacher "
        "layer, counted from 0, such as [[0, 1], [2, 5]].",
    )

    teacher_dtype: str | None = setting(
        None,
        "bfloat16 or float16: the teacher's forward runs under autocast in it, its weights and the student's stay as they are. By "
        "default it runs as the student's does. On a CPU with bfloat16 units it takes 0.11 instead of 0.28 of the rest of a step, "
        "and moves the loss on the logits by less than 1 % and those on hidden states by less than 0.2 % (MiniLM, half zero).",
        choices=("bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        weights = self.weights()
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
        """Whether a loss needs more than the teacher's logits."""
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
