"""The walk through a model's layers: statistics of one layer at a time, from streams of hidden states.

Two streams run beside each other: what the dense model has between two layers, and what the pruned one has. A layer is asked for
the statistics of one of its projections by running it on a stream up to that projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.blocks import has_bias, out_features
from ..pruning.reconstruction import Moments
from .layers import Batch, Call, Reached, Stream, Taps, run

#: Where sums of two tensors are looked for, they may differ by this, relative to the largest value.
_EQUAL = 1e-4


@dataclass(frozen=True)
class Rows:
    """The calibration rows.

    Attributes:
        batches: what the model's forward takes.
        held_out: for each batch bool `[rows]`: rows on which updates are judged and not computed.
    """

    batches: Sequence[Batch]
    held_out: Sequence[Tensor]

    @property
    def number(self) -> int:
        """How many rows there are."""
        return sum(len(part) for part in self.held_out)

    def some(self, number: int) -> Rows:
        """The first batches that hold at least `number` rows, all of them held out."""
        batches: list[Batch] = []
        held_out: list[Tensor] = []
        for batch, part in zip(self.batches, self.held_out):
            if sum(map(len, held_out)) < number:
                batches.append(batch)
                held_out.append(torch.ones_like(part))
        return Rows(batches, held_out)

    def tokens(self, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Which positions of an activation count, and which of them are held out. Returns two bool tensors of `shape`."""
        batch, held_out = self.batches[index], self.held_out[index]
        masks = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
        there = next((mask.bool() for mask in masks if mask is not None and mask.shape == shape), None)
        if there is None:
            there = torch.ones(shape, dtype=torch.bool, device=held_out.device)
        # Windows and patches of a row follow each other.
        held_out = held_out.repeat_interleave(max(shape[0] // len(held_out), 1))[: shape[0]]
        return there, there & held_out.view(-1, *[1] * (there.ndim - 1))


@dataclass(frozen=True)
class Site:
    """A projection whose weights change, and the place where what it gives joins the hidden stream.

    Attributes:
        module: the projection.
        joined: the module whose input is the stream with the projection's output added, the layer where it is what the layer
            returns; None where there is no such place.
    """

    module: nn.Module
    joined: nn.Module | None = None


@torch.no_grad()
def find_site(layer: nn.Module, module: nn.Module, hidden: Tensor, call: Call) -> Site:
    """Where the output of a projection joins the stream: what is exactly the sum of it and of a tensor that was there before.

    It is found by looking, not by name: a batch runs through the layer, and whatever goes into one of its modules after the
    projection, or comes out of the layer, is compared with the sum.
    """
    before: list[Tensor] = [hidden]
    after: list[tuple[nn.Module, Tensor]] = []
    found: list[Tensor] = []

    def into(one: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
            (after.append((one, args[0])) if found else before.append(args[0]))

    def out_of(one: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.shape == hidden.shape:
            if one is module:
                found.append(output)
            elif not found:
                before.append(output)

    handles = [one.register_forward_pre_hook(into) for one in layer.modules() if one is not layer]
    handles += [one.register_forward_hook(out_of) for one in layer.modules() if one is not layer]
    try:
        after.append((layer, run(layer, hidden, call)))
    finally:
        for handle in handles:
            handle.remove()
    for place, candidate in after if found else ():
        if any(_close(candidate, found[0] + other) for other in before):
            return Site(module, place)
    return Site(module)


@torch.no_grad()
def same_inputs(layer: nn.Module, modules: Sequence[nn.Module], hidden: Tensor, call: Call) -> dict[nn.Module, int]:
    """Module → the number of the tensor that it is given: the same where several are given one, as query, key and value are."""
    tensors: list[tuple[Tensor, int]] = []
    found: dict[nn.Module, int] = {}

    def into(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tensor, version = args[0], args[0]._version  # a tensor that was changed in place is another
        number = next((place for place, (other, then) in enumerate(tensors) if other is tensor and then == version), len(tensors))
        if number == len(tensors):
            tensors.append((tensor, version))
        found[module] = number

    handles = [module.register_forward_pre_hook(into) for module in modules]
    try:
        run(layer, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _close(left: Tensor, right: Tensor) -> bool:
    return float((left - right).abs().max()) <= _EQUAL * float(left.abs().max())


@torch.no_grad()
def advance(layer: nn.Module, stream: Stream, calls: Sequence[Call], sites: Sequence[Site] = ()) -> list[list[Tensor]]:
    """Take a stream from before a layer to behind it.

    Returns:
        For each site, what the stream is there, batch by batch: with the output of the site's projection, or that alone where it
        does not join the stream.
    """
    at: list[list[Tensor]] = [[] for _ in sites]
    inside = [site.joined for site in sites if site.joined not in (None, layer)]
    for index, call in enumerate(calls):
        with Taps(inside, [site.module for site in sites]) as taps:
            hidden = run(layer, stream[index], call)
        stream.replace(index, hidden)
        for site, kept in zip(sites, at):
            kept.append(_at(site, layer, taps, hidden))
    return at


@torch.no_grad()
def moments_at(
    site: Site,
    layer: nn.Module,
    stream: Stream,
    calls: Sequence[Call],
    rows: Rows,
    dense: Sequence[Tensor] | None = None,
    importance: Sequence[Tensor] | None = None,
) -> tuple[Moments, Moments]:
    """The moments of a projection's inputs, of the rows that count and of those held out.

    Inputs have a constant 1 as the last where the projection has a bias, which is a weight like others then.

    Args:
        site: the projection.
        layer: its layer.
        stream: before the layer.
        calls: of the layer.
        rows: which tokens count.
        dense: what the stream shall be at the site. The target is what the projection has to give for that, beside what the stream
            brings along; by default what it gives now.
        importance: of each batch's tokens, `[rows, tokens]`; by default 1.
    """
    found = _no_moments(site), _no_moments(site)
    joined = [] if dense is None or site.joined in (None, layer) else [site.joined]
    last = layer if dense is not None and site.joined is layer else (joined or [site.module])[0]
    for index, call in enumerate(calls):
        with Taps([*joined, site.module], [site.module], last) as taps:
            try:
                hidden = run(layer, stream[index], call)
            except Reached:
                hidden = None
        target = taps.outputs[site.module]
        if dense is not None:
            target = target + (dense[index] - _at(site, layer, taps, hidden))
        _add(found, site, index, taps.inputs[site.module], target, rows, importance)
    return found


@torch.no_grad()
def moments_during(
    forward: Callable[[int], object], sites: Sequence[Site], rows: Rows, importance: Sequence[Sequence[Tensor] | None]
) -> list[tuple[Moments, Moments]]:
    """The moments of several projections, of which none changes, with what they give as the target; see [`moments_at`].

    Args:
        forward: runs whatever they are in on the batch of a number.
        sites: the projections.
        rows: which tokens count.
        importance: for each site, see [`moments_at`].
    """
    found = [(_no_moments(site), _no_moments(site)) for site in sites]
    modules = [site.module for site in sites]
    for index in range(len(rows.batches)):
        with Taps(modules, modules) as taps:
            forward(index)
        for each, site, weights in zip(found, sites, importance):
            _add(each, site, index, taps.inputs[site.module], taps.outputs[site.module], rows, weights)
    return found


def _no_moments(site: Site) -> Moments:
    weight, outputs = site.module.get_parameter("weight"), out_features(site.module)
    return Moments.zeros(outputs, weight.numel() // outputs + has_bias(site.module), weight.device)


def _add(
    found: tuple[Moments, Moments],
    site: Site,
    index: int,
    given: Tensor,
    target: Tensor,
    rows: Rows,
    importance: Sequence[Tensor] | None,
) -> None:
    """Count a batch's tokens, those held out apart."""
    there, held_out = rows.tokens(index, given.shape[:-1])
    if has_bias(site.module):
        given = torch.cat([given, given.new_ones(*given.shape[:-1], 1)], dim=-1)
    for moments, counted in zip(found, (there & ~held_out, held_out)):
        weights = None if importance is None else importance[index][counted]
        moments.add(given[counted].float(), target[counted].float(), weights)


def _at(site: Site, layer: nn.Module, taps: Taps, hidden: Tensor | None) -> Tensor:
    """What the stream is at a site."""
    if site.joined is None:
        return taps.outputs[site.module]
    if site.joined is layer:
        assert hidden is not None
        return hidden
    return taps.inputs[site.joined]
