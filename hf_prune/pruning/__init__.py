"""The pruning loop: a config matched to a model (`rules`), its three moments (`engine`), what will happen (`plan`), and what comes
back afterwards (`recover`)."""

from .plan import PruningPlan
from .pruner import Pruner
from .recover import recover

__all__ = ["Pruner", "PruningPlan", "recover"]
