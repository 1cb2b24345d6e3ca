"""The pruning loop: a config matched to a model (`rules`), its three moments (`engine`), and what will happen (`plan`)."""

from .engine import Pruner
from .plan import PruningPlan

__all__ = ["Pruner", "PruningPlan"]
