"""hf_prune: pruning of Hugging Face transformers inside the Trainer.

Importing the package also lets `AutoModel….from_pretrained` load condensed models, whose layers differ in size. The import is fast:
what a name needs, such as torch or the Trainer, is imported when the name is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .hooks import install_reload_hook
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .condense import CondensePlan, condense, condense_plan
    from .condense.infer import infer_architecture
    from .condense.legacy import convert_v4_pruned_heads
    from .condense.prove import ArchitectureError, prove_architecture
    from .distillation import (
        DistillationArguments,
        DistillationConfig,
        DistillationTrainer,
        TeacherLogitsCollator,
        add_teacher_logits,
    )
    from .export import ExportReport, export_model
    from .hub import CardFacts, ModelCardCallback, model_card, push_to_hub
    from .measure.latency_table import LatencyTable, latency_table
    from .measure.sparse import to_sparse
    from .measure.sparsity import SparsityReport, print_sparsity, sparsity_report
    from .oneshot import PruneReport, prune
    from .pruning import Pruner
    from .settings.arguments import PruningArguments
    from .settings.config import PruningConfig, PruningRule
    from .settings.errors import ConfigError
    from .shrink.depth import shrink_depth
    from .shrink.expert_neurons import shrink_expert_neurons
    from .shrink.experts import shrink_experts
    from .shrink.hidden import shrink_hidden
    from .shrink.vocabulary import prune_vocabulary
    from .shrink.vocabulary_report import VocabularyReport, vocabulary_report
    from .training.callback import PruningCallback
    from .training.checkpoints import last_complete_checkpoint


__all__ = [
    "ArchitectureError",
    "CardFacts",
    "CondensePlan",
    "ConfigError",
    "DistillationArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "ExportReport",
    "LatencyTable",
    "ModelCardCallback",
    "PruneReport",
    "Pruner",
    "PruningArguments",
    "PruningCallback",
    "PruningConfig",
    "PruningRule",
    "SparsityReport",
    "TeacherLogitsCollator",
    "VocabularyReport",
    "add_teacher_logits",
    "condense",
    "condense_plan",
    "convert_v4_pruned_heads",
    "export_model",
    "infer_architecture",
    "last_complete_checkpoint",
    "latency_table",
    "model_card",
    "print_sparsity",
    "prove_architecture",
    "prune",
    "prune_vocabulary",
    "push_to_hub",
    "shrink_depth",
    "shrink_expert_neurons",
    "shrink_experts",
    "shrink_hidden",
    "sparsity_report",
    "to_sparse",
    "vocabulary_report",
]

#: Module → the public names that the package exports from it.
_HOMES = {
    "condense": (
        "CondensePlan",
        "condense",
        "condense_plan",
    ),
    "condense.infer": ("infer_architecture",),
    "condense.legacy": ("convert_v4_pruned_heads",),
    "condense.prove": ("ArchitectureError", "prove_architecture"),
    "distillation": (
        "DistillationArguments",
        "DistillationConfig",
        "DistillationTrainer",
        "TeacherLogitsCollator",
        "add_teacher_logits",
    ),
    "export": ("ExportReport", "export_model"),
    "hub": (
        "CardFacts",
        "ModelCardCallback",
        "model_card",
        "push_to_hub",
    ),
    "measure.latency_table": ("LatencyTable", "latency_table"),
    "measure.sparse": ("to_sparse",),
    "measure.sparsity": (
        "SparsityReport",
        "print_sparsity",
        "sparsity_report",
    ),
    "oneshot": ("PruneReport", "prune"),
    "pruning": ("Pruner",),
    "settings.arguments": ("PruningArguments",),
    "settings.config": (
        "PruningConfig",
        "PruningRule",
    ),
    "settings.errors": ("ConfigError",),
    "shrink.depth": ("shrink_depth",),
    "shrink.expert_neurons": ("shrink_expert_neurons",),
    "shrink.experts": ("shrink_experts",),
    "shrink.hidden": ("shrink_hidden",),
    "shrink.vocabulary": ("prune_vocabulary",),
    "shrink.vocabulary_report": ("VocabularyReport", "vocabulary_report"),
    "training.callback": ("PruningCallback",),
    "training.checkpoints": ("last_complete_checkpoint",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


class _Face(ModuleType):
    """The package as a module whose public names are imported on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):  # `condense` is a function, also after its module was imported
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Face
install_reload_hook()
