"""Criteria that ask what the model loses without a unit; `prune()` tries it out."""

from __future__ import annotations

from torch import Tensor

from ...model.units import UnitGroup
from ...settings.config import PruningConfig
from .base import Criterion
from .registry import register_criterion


@register_criterion("removal")
class Removal(Criterion):
    """The divergence of the model's predictions from the dense model's, in nats, when the unit alone is zero: what ShortGPT's block
    influence estimates (Men et al. 2024, https://arxiv.org/abs/2403.03853), and what Michel et al. (2019,
    https://arxiv.org/abs/1905.10650, section 3) measure of heads. `reduction` has no say."""

    scores_absences = True

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "sum"  # it is of the whole unit, whatever its size

    def scores(self, group: UnitGroup) -> Tensor:
        return self.state[group.name]


@register_criterion("greedy_removal")
class GreedyRemoval(Removal):
    """The same when units go one after the other, each time the one without which the model loses least (SLEB, Song et al. 2024,
    https://arxiv.org/abs/2402.09025, algorithm 1): neighbours that are one another's spare do not both go."""

    in_turn = True
