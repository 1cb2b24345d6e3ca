"""Criteria that read the activations of a layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...model.targets import Target
from ...model.units import UnitGroup, View
from ...settings.config import PruningConfig
from ..reconstruction import damping, elimination, inverse, sequential
from ..selection import candidates, lowest_units
from ..statistics import weight
from ..updates import DAMPING
from .base import Criterion
from .registry import register_criterion

#: Columns whose weights compete with each other where they are chosen in order, as in SparseGPT.
_TOGETHER = 128


@register_criterion("apoz")
class APoZ(Criterion):
    """1 − the average share of zeros in an output: how often it is positive, so a ReLU would let it pass (Hu et al. 2016,
    https://arxiv.org/abs/1607.03250, eq. 1)."""

    scores_rows = True
    activations = ("positive_outputs",)

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return tuple(view for view in group.weights if view.owns_rows)

    def scores(self, group: UnitGroup) -> Tensor:
        (name,) = self.activations
        return group.reduce(lambda target: self.seen.mean(name, target)[:, None], self.reduction, self.watched(group))


@register_criterion("mean_activation")
class MeanActivation(APoZ):
    """The mean absolute activation of an output (after Molchanov et al. 2017, https://arxiv.org/abs/1611.06440)."""

    activations = ("absolute_outputs",)


@register_criterion("wanda")
class Wanda(Criterion):
    """|w|·‖x‖₂, with ‖x‖₂ over the tokens of an input (Sun et al. 2024, https://arxiv.org/abs/2306.11695, eq. 1).

    A unit that leaves through columns of a weight (a head, a group, a neuron) is scored by these alone, as in FLAP's Wanda-sp.
    """

    activations = ("squared_inputs",)

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return group.compensated or group.weights

    def scores(self, group: UnitGroup) -> Tensor:
        def elements(target: Target) -> Tensor:
            matrix, norms = weight(target).abs(), self.seen.mean("squared_inputs", target).sqrt()
            repeats = matrix.shape[1] // norms.numel()
            # A convolution's columns are inputs times kernel positions.
            return matrix * (norms.repeat(repeats) if target.kernel_first else norms.repeat_interleave(repeats))

        return group.reduce(elements, self.reduction, self.watched(group))


@register_criterion("flap")
class Fluctuation(Criterion):
    """Var(xⱼ)·‖Wⱼ‖² over the columns j of a weight, standardized in each module: what a constant in the bias cannot repair (FLAP,
    An et al. 2024, https://arxiv.org/abs/2312.11983, section 3.2).

    A head scores the mean of the squares of its inputs' scores, as in the authors' code. Meant for `update="bias"`; `reduction` is
    not used.
    """

    scores_inputs = True
    scores_columns = True
    activations = ("inputs", "squared_inputs")

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "mean"  # a standardized score is no cost, so units of every size rank by it as it is

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return group.compensated

    def scores(self, group: UnitGroup) -> Tensor:
        (view,) = group.compensated
        means, squares = (self.seen.mean(name, view.target).double() for name in self.activations)
        columns = (squares - means.square()) * weight(view.target).double().square().sum(dim=0)
        units = columns[view.columns]
        found = units[:, 0] if view.width == 1 else units.square().mean(dim=1)
        spread = found.std() if len(found) > 1 else torch.zeros(())
        return ((found - found.mean()) / spread.clamp_min(torch.finfo(torch.float32).tiny)).float()


@register_criterion("block_influence")
class BlockInfluence(Criterion):
    """1 − the mean cosine of what goes into a layer and what comes out, over tokens: how much the layer turns the hidden stream
    (ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853, eq. 1)."""

    scores_layers = True
    activations = ("cosines",)

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "sum"  # it is of the layer as it is, whatever its size

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        view = group.weights[0]
        before, _, _ = view.target.module_name.partition(f"{group.name}.")
        layer = before + group.name
        return (replace(view, target=replace(view.target, name=layer, module_name=layer)),)

    def scores(self, group: UnitGroup) -> Tensor:
        (layer,) = self.watched(group)
        return 1 - self.seen.mean("cosines", layer.target)[None]


@register_criterion("obs")
class OBS(Criterion):
    """The rise of the squared error of a layer's output when a unit goes and all others make up for it: Optimal Brain Surgeon.

    Units that leave through whole columns (heads, groups, neurons) are taken away one by one, each time the one that costs least by
    then, and score what they cost (ZipLM, Kurtić et al. 2023, https://arxiv.org/abs/2302.04089, eq. 2). Others score the sum of
    w² / [(XXᵀ + λI)⁻¹]ⱼⱼ over their weights (Hassibi and Stork 1993, eq. 5), each by itself. `reduction` has no say.
    """

    scores_inputs = True
    scores_remainders = True
    activations = ("second_moments",)

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.reduction = "sum"

    def watched(self, group: UnitGroup) -> tuple[View, ...]:
        return group.compensated

    def scores(self, group: UnitGroup) -> Tensor:
        if group.name in self.state:
            return self.state[group.name]
        (view,) = group.compensated
        matrix = weight(view.target).double()
        return removal_costs(view, matrix, self.seen.mean("second_moments", view.target).double())


def removal_costs(view: View, matrix: Tensor, moments: Tensor) -> Tensor:
    """What it costs to take away each unit of a view; see [`OBS`].

    Args:
        view: the units' columns, or blocks, of a weight.
        matrix: that weight, `[out, in]`, with other columns that stay behind them or without.
        moments: Σ x·xᵀ of its inputs, `[in, in]`.

    Returns:
        `[units]`, float32.
    """
    left = inverse(moments, damping(moments, DAMPING))
    if not view.owns_columns:
        single = matrix.square() / left.diagonal()
        return view.gather(single[:, : view.target.shape[1]]).sum(dim=(1, 3)).flatten().float()
    order, costs = elimination(matrix, left, view.columns, len(view.columns))
    # A unit that is cheap only after another one went cannot go before it.
    return torch.empty_like(costs).scatter_(0, order, costs.cummax(dim=0).values).float()


def kept_in_order(
    view: View, n_of_m: tuple[int, int] | None, matrix: Tensor, inverted: Tensor, number: int, others: Tensor
) -> Tensor:
    """Choose blocks of a weight from left to right, each after what is to its left has gone and the rest made up for it (SparseGPT,
    Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, section 3.2).

    What goes is shared evenly among stretches of 128 columns, for N:M of m, in each of which the blocks with the least sum of
    w²/U_jj² go; see `reconstruction.sequential`.

    Args:
        view: the blocks of a weight.
        n_of_m: see `UnitGroup`.
        matrix: that weight, `[out, in]`, with other columns that stay behind them or without.
        inverted: (Σ x·xᵀ + λI)⁻¹ of its inputs, `[in, in]`.
        number: how many blocks go.
        others: what goes of the weight anyway, bool `[out, in]`.

    Returns:
        The blocks that stay, bool `[units]`.
    """
    rows, height, columns, width = view.grid
    kept = torch.ones(rows, columns, dtype=torch.bool, device=matrix.device)
    step = n_of_m[1] if n_of_m else max(_TOGETHER // width, 1) * width

    def choose(part: slice, weight: Tensor, diagonal: Tensor) -> Tensor:
        gone, stretch = others[:, part].clone(), slice(part.start // width, min(part.stop // width, columns))
        inside = (stretch.stop - stretch.start) * width
        costs = (weight / diagonal).square().masked_fill_(gone, 0)[:, :inside]
        costs = costs.reshape(rows, height, -1, width).sum(dim=(1, 3)).flatten()
        share = round(number * stretch.stop / columns) - round(number * stretch.start / columns)
        allowed = None if n_of_m is None else candidates(costs, n_of_m)
        (goes,) = lowest_units([costs], [torch.zeros_like(costs, dtype=torch.bool)], [allowed], share)
        kept[:, stretch] = ~goes.view(rows, -1)
        gone[:, :inside] |= goes.view(rows, 1, -1, 1).expand(-1, height, -1, width).reshape(len(gone), inside)
        return gone

    sequential(matrix, inverted, choose, step)
    return kept.flatten()
