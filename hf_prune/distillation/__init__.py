"""Knowledge distillation in the Trainer, with an online teacher or its cached logits."""

from .cache import TeacherLogitsCollator, add_teacher_logits
from .config import DistillationConfig
from .losses import attention_loss, hidden_loss, logits_loss
from .trainer import DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "TeacherLogitsCollator",
    "add_teacher_logits",
    "attention_loss",
    "hidden_loss",
    "logits_loss",
]
