"""hf_prune: pruning of Hugging Face transformers inside the Trainer.

Importing the package also lets `AutoModel….from_pretrained` load condensed models, whose layers differ in size.
"""

from .callback import PruningCallback, install_log_hook
from .checkpoints import last_complete_checkpoint, remember_folders
from .condense import CondensePlan, condense, condense_plan
from .config import PruningArguments, PruningConfig, PruningConfigError, PruningRule
from .distillation import DistillationConfig, DistillationTrainer, TeacherLogitsCollator, add_teacher_logits
from .hub import CardFacts, ModelCardCallback, install_card_hook, install_reload_hook, model_card, push_to_hub
from .legacy import convert_v4_pruned_heads
from .pruner import Pruner
from .report import SparsityReport, sparsity_report
from .sparse import to_sparse

__version__ = "0.1.0"

__all__ = [
    "CardFacts",
    "CondensePlan",
    "DistillationConfig",
    "DistillationTrainer",
    "ModelCardCallback",
    "Pruner",
    "PruningArguments",
    "PruningCallback",
    "PruningConfig",
    "PruningConfigError",
    "PruningRule",
    "SparsityReport",
    "TeacherLogitsCollator",
    "add_teacher_logits",
    "condense",
    "condense_plan",
    "convert_v4_pruned_heads",
    "last_complete_checkpoint",
    "model_card",
    "push_to_hub",
    "sparsity_report",
    "to_sparse",
]

install_card_hook()
install_log_hook()
install_reload_hook()
remember_folders()
