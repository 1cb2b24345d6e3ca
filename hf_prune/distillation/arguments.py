"""Distillation settings as flat command line arguments."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from ..settings.arguments import FlatArguments
from ..settings.errors import ConfigError
from .config import DistillationConfig

_FLAT = FlatArguments(DistillationConfig, prefix="distill_")


@_FLAT
class DistillationArguments:
    """[`DistillationConfig`] as flat command line arguments beside `TrainingArguments`; giving any of them turns distillation on.

    Each setting is an argument of its name with the prefix `distill_`; pairs of layers are given as JSON, such as
    `[[0, 1], [2, 5]]`.
    """

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher; by default a frozen copy of the model that training starts from."}
    )
    distill_loss_weight: float | None = field(
        default=None,
        metadata={"help": "As in Intel Neural Compressor: learn the last hidden state alone, with this weight, and no task loss."},
    )
    if TYPE_CHECKING:  # the settings, which are derived

        def __init__(self, teacher_model_name_or_path: str | None = None, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def to_config(self) -> DistillationConfig | None:
        """The config these arguments describe, or None when none was given.

        Raises:
            ConfigError: a value cannot be used, or weights were given in both ways.
        """
        given, weight = _FLAT.given(self), self.distill_loss_weight
        if weight is not None:
            if alphas := [_FLAT.name(name) for name in given if name.startswith("alpha_")]:
                raise ConfigError("distill_loss_weight", weight, f"must not be given with {min(alphas)}.")
            given |= {"alpha_task": 0.0, "alpha_logits": 0.0, "alpha_hidden": weight}
        return DistillationConfig(**given) if given or self.teacher_model_name_or_path is not None else None
