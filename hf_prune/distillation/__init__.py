"""Knowledge distillation in the Trainer, with an online teacher or its cached logits."""

from .arguments import DistillationArguments
from .cache import TeacherLogitsCollator, add_teacher_logits
from .config import DistillationConfig
from .losses import attention_loss, hidden_loss, logits_loss
from .trainer import DistillationTrainer

__all__ = [
    "DistillationArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "TeacherLogitsCollator",
    "add_teacher_logits",
    "attention_loss",
    "hidden_loss",
    "logits_loss",
]
