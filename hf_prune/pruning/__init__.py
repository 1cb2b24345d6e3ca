"""The core: `statistics`, unit scores (`criteria`), which units are removed (`budget`, `allocation`), how the remaining weights are
updated (`updates`), and when (`schedules`). `rules` match a config to a model, `pruner` runs the loop, `state` is the rest of its
state, `plan` reports what will happen, and `recover` restores whole heads and neurons afterwards."""

from .plan import PruningPlan
from .pruner import Pruner
from .recover import recover

__all__ = ["Pruner", "PruningPlan", "recover"]
