"""Criteria that read the weights alone, or nothing at all."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ...model.targets import Target
from ...model.units import UnitGroup
from ..statistics import weight
from .base import Criterion
from .registry import register_criterion


@register_criterion("magnitude")
class Magnitude(Criterion):
    """|w| (Han et al. 2015, https://arxiv.org/abs/1506.02626): the L1 norm, or with `reduction="l2"` the L2 norm."""

    def scores(self, group: UnitGroup) -> Tensor:
        return self.reduce(group, lambda target: weight(target).abs())


@register_criterion("random")
class Random(Criterion):
    """A number drawn once for each unit, from its group's name: a baseline that needs no seed to be the same everywhere."""

    def scores(self, group: UnitGroup) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
        return torch.rand(group.num_units, generator=generator).to(group.device)


@register_criterion("fpgm")
class FPGM(Criterion):
    """Σ_j ‖w_i − w_j‖₂ over the rows of a matrix: rows near the geometric median are removed (He et al. 2019,
    https://arxiv.org/abs/1811.00250)."""

    scores_rows = True

    def scores(self, group: UnitGroup) -> Tensor:
        def distances(target: Target) -> Tensor:
            rows = weight(target).float()
            return torch.cdist(rows, rows).sum(dim=1, keepdim=True)

        return group.reduce(distances, self.reduction, [view for view in group.weights if view.owns_rows])
