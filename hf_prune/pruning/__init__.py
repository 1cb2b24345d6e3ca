"""The core: what is seen (`statistics`), unit scores (`criteria`), who goes (`budget`, `allocation`), what the others do
(`updates`), and when (`schedules`). `rules` match a config to a model, `pruner` runs the loop, `state` is the rest it holds,
`plan` says what will happen, and `recover` what comes back afterwards."""

from .plan import PruningPlan
from .pruner import Pruner
from .recover import recover

__all__ = ["Pruner", "PruningPlan", "recover"]
