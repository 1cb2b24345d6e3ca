"""The pruning loop: a config matched to a model (`rules`), its three moments (`engine`), what will happen (`plan`), and what comes
back afterwards (`recover`)."""

from .engine import Pruner
from .plan import PruningPlan
from .recover import recover

__all__ = ["Pruner", "PruningPlan", "recover"]
