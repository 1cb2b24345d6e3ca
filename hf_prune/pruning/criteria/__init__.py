"""How units are scored; see `base.py` for what a criterion is, and for how to add one."""

from ..statistics import gradient, weight
from .base import Criterion
from .registry import CRITERIA, register_criterion

__all__ = ["CRITERIA", "Criterion", "gradient", "register_criterion", "weight"]
