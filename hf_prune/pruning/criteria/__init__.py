"""How units are scored; see `base.py` for what a criterion is, and for how to add one."""

from ..statistics import gradient, weight
from . import absences, activations, gradients, movement, weights  # noqa: F401  (they register their criteria)
from .base import Criterion
from .registry import CRITERIA, register_criterion

__all__ = ["CRITERIA", "Criterion", "gradient", "register_criterion", "weight"]
