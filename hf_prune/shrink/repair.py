"""Repairing a narrowed model: what stays makes up for what went, module by module, in the order in which they run.

Both models run beside each other on calibration data, layer by layer, so that each module is solved for with what the already
repaired part gives it. All is linear least squares on second moments (`pruning/reconstruction.py`), pulled to what is there:

- what reads the stream takes W·A, where A is the best linear guess of what the dense model is given there from what the narrow one
  is (the channels that are gone, from those that stay), with a bias where there is one;
- what writes the stream in a layer is solved for so that the stream is what it should be, errors of earlier layers included;
- a norm whose output is the stream, or goes into a tied output head, has each of its channels scaled and moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model import ArchitectureSpec
from ..model.blocks import has_bias, hidden_into, hidden_of, layer_lists
from ..model.residual import Member
from ..oneshot.layers import Call, Reached, Stream, Taps, record, run
from ..oneshot.walk import Rows, Site, advance, find_site
from ..pruning.reconstruction import Moments, damping, refit
from .narrow import Norm, Plan, folded, matrix, wide

#: λ as a share of the mean of the diagonal of Σ x·xᵀ, see `damping`.
DAMPING = 1e-2


@torch.no_grad()
def repair(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    spec: ArchitectureSpec,
    members: Sequence[Member],
    plan: Plan,
    rows: Rows,
    *,
    pre_norm: bool,
) -> None:
    """Solve for the parameters of a narrowed model, in place.

    Args:
        dense: the model as it was.
        small: the narrowed one.
        spec: of their family.
        members: of the dense one.
        plan: how it was narrowed.
        rows: calibration data.
        pre_norm: whether layers only add to the stream, which no norm changes.

    Raises:
        ConfigError: layers share weights, so that they are no chain.
    """
    both = _Both(dense, small, {member.module: member for member in members}, plan, rows, pre_norm)
    for place in _in_order(both, spec):
        if isinstance(place, str):
            _repair_layers(both, place)
        else:
            _repair_step(both, place, _whole(both))


@dataclass
class _Both:
    """The two models and what is known of them."""

    dense: PreTrainedModel
    small: PreTrainedModel
    members: dict[nn.Module, Member]
    plan: Plan
    rows: Rows
    pre_norm: bool
    tied: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tied = {id(module.weight) for module in self.small.modules() if isinstance(module, nn.Embedding)}

    def counterpart(self, module: nn.Module) -> Any:
        """The module of the narrow model where the dense one has another."""
        return self.small.get_submodule(self.members[module].name)


@dataclass(frozen=True)
class _Step:
    """Modules that are repaired together, as they are given one and the same tensor; how often they are called."""

    modules: tuple[nn.Module, ...]
    calls: int


#: (which of the two models, the number of a batch) → runs what the modules of a step are in.
_Runs = Callable[[bool, int], object]


def _whole(both: _Both) -> _Runs:
    def forward(narrow: bool, index: int) -> object:
        return (both.small if narrow else both.dense)(**both.rows.batches[index])

    return forward


def _in_order(both: _Both, spec: ArchitectureSpec) -> Iterator[_Step | str]:
    """What is to be repaired: steps outside of layers, and the paths of lists of layers."""
    firsts = {layers[0]: name for path in spec.layers for name, layers in layer_lists(both.dense, path).items() if len(layers)}
    outside = [module for module, member in both.members.items() if not member.layer]
    for found in _steps([*firsts, *outside], lambda: _whole(both)(False, 0)):
        names = [firsts[module] for module in found.modules if module in firsts]
        yield names[0] if names else found


def _steps(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[_Step]:
    """Modules in the order of their first call; those together that are given the same tensor one after the other."""
    groups: list[tuple[tuple[object, ...], list[nn.Module]]] = []
    calls: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if calls[module] > 1:
            return
        given = args[0] if args else kwargs.get("hidden_states")
        key = (type(module), given, given._version) if isinstance(given, Tensor) else (type(module), None, 0)
        if groups and given is not None and all(one is other for one, other in zip(groups[-1][0], key)):
            groups[-1][1].append(module)
        else:
            groups.append((key, [module]))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [
        _Step(tuple(one for one in group if calls[one] == count), count)
        for _, group in groups
        for count in sorted({calls[one] for one in group})
    ]


def _repair_layers(both: _Both, name: str) -> None:
    """Repair a list of layers, by its name, layer by layer."""
    chains = [layer_lists(model, name)[name] for model in (both.dense, both.small)]
    streams = [Stream(), Stream()]
    calls = [
        record(model, both.rows.batches, list(chain), stream)
        for model, chain, stream in zip((both.dense, both.small), chains, streams)
    ]
    for number, (layer, small_layer) in enumerate(zip(*chains)):
        of_layer = [calls[0][number], calls[1][number]]

        def forward(
            narrow: bool, index: int, layer: nn.Module = layer, small_layer: nn.Module = small_layer, of_layer: Any = of_layer
        ) -> object:
            return run(small_layer if narrow else layer, streams[narrow][index], of_layer[narrow][index])

        inside = [module for module in layer.modules() if module in both.members]
        for step in _steps(inside, lambda: forward(False, 0)):
            (module, *_) = step.modules
            if both.members[module].kind == "linear" and not both.members[module].reads:
                _repair_writer(both, module, layer, small_layer, streams, of_layer)
            else:
                _repair_step(both, step, forward)
        for layer_of, stream, own in zip((layer, small_layer), streams, of_layer):
            advance(layer_of, stream, own)


def _seen(module: nn.Module, calls: int, forward: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """What a module is given and gives, call by call."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((hidden_into(args, kwargs).detach(), hidden_of(output).detach()))
        if len(found) == calls:
            raise Reached

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with suppress(Reached):
            forward()
    finally:
        handle.remove()
    return found


def _pairs(both: _Both, step: _Step, forward: _Runs) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """What the first module of a step is given and gives, in the dense and in the narrow model, `[tokens, …]`, padding aside."""
    (module, *_) = step.modules
    for index in range(len(both.rows.batches)):
        dense = _seen(module, step.calls, partial(forward, False, index))
        small = _seen(both.counterpart(module), step.calls, partial(forward, True, index))
        for wanted, given in zip(dense, small):
            there = both.rows.tokens(index, wanted[0].shape[:-1])[0] if wanted[0].ndim > 2 else slice(None)
            yield _counted(wanted, there), _counted(given, there)


def _counted(values: tuple[Tensor, Tensor], there: Tensor | slice) -> tuple[Tensor, Tensor]:
    given, made = (wide(value[there].flatten(0, -2)) for value in values)
    return given, made


def _repair_step(both: _Both, step: _Step, forward: _Runs) -> None:
    """Repair modules that read the stream, or a norm."""
    (module, *_) = step.modules
    member = both.members[module]
    if member.kind == "norm":
        last = _before_tied_head(both, member)
        if (last or not both.pre_norm) and not member.apart:
            _repair_norm(both, step, forward, both.plan.before_head if last else 1.0)
        return
    readers = [one for one in step.modules if both.members[one].reads and isinstance(one, nn.Linear | Conv1D)]
    readers = [one for one in readers if id(both.counterpart(one).weight) not in both.tied]
    if readers:
        _repair_readers(both, step, readers, forward)


def _before_tied_head(both: _Both, member: Member) -> bool:
    """Whether a norm is the last before an output head that is tied to the embeddings."""
    found = list(both.members.values())
    tied = any(other.kind == "linear" and id(both.counterpart(other.module).weight) in both.tied for other in found)
    norms = [other for other in found if other.kind == "norm" and not other.layer]
    return tied and bool(norms) and norms[-1] is member


def _repair_readers(both: _Both, step: _Step, readers: Sequence[Any], forward: _Runs) -> None:
    """W·A with the best guess A of what the dense model reads from what the narrow one reads."""
    first = both.counterpart(readers[0])
    member = both.members[readers[0]]
    basis, basis_out = (both.plan.apart if side in member.apart else both.plan.stream for side in ("in", "out"))
    copies = next(iter(member.axes["weight"].values()))
    inputs = matrix(first).shape[1]
    bias = all(map(has_bias, readers))
    hidden = matrix(readers[0]).shape[1]
    start = torch.zeros(hidden, inputs + bias, dtype=torch.float64, device=first.weight.device)
    norm, every = both.plan.folded.get(member.name), torch.eye(hidden).to(start)
    start[:, :inputs] = basis.along(every, 1, copies) if norm is None else folded(every, 1, norm, basis)
    moments = Moments.zeros(hidden, inputs + bias, start.device)
    for (wanted, _), (given, _) in _pairs(both, step, forward):
        if bias:
            given = torch.cat([given, given.new_ones(len(given), 1)], dim=-1)
        moments.add(given, wanted - given @ start.T.to(given))
    guess = start + _change(moments)
    for reader in readers:
        solved = matrix(reader).double() @ guess
        other = both.counterpart(reader)
        if bias:
            solved[:, inputs] += reader.bias
        if both.members[reader].writes:
            solved = basis_out.along(solved, 0)
        _write(other, solved[:, :inputs])
        if bias:
            other.bias.copy_(solved[:, inputs])


def _repair_writer(
    both: _Both, module: Any, layer: nn.Module, small_layer: nn.Module, streams: Sequence[Stream], calls: Sequence[Sequence[Call]]
) -> None:
    """The weight that makes of the narrow stream what the dense one becomes."""
    other = both.counterpart(module)
    site = find_site(layer, module, streams[0][0], calls[0][0])
    joined = small_layer if site.joined is layer else site.joined and both.small.get_submodule(_name(both.dense, site.joined))
    narrowing = (both.plan.factor * both.plan.stream.matrix).to(wide(other.weight))
    weight = matrix(other)
    bias = has_bias(other)
    moments = Moments.zeros(len(weight), weight.shape[1] + bias, weight.device)
    for index, (call, small_call) in enumerate(zip(*calls)):
        _, wanted = _at_site(layer, site, streams[0][index], call)
        given, there = _at_site(small_layer, Site(other, joined), streams[1][index], small_call)
        counted = both.rows.tokens(index, given.shape[:-1])[0]
        given, missing = given[counted], (wanted @ narrowing - there)[counted]
        if bias:
            given = torch.cat([given, given.new_ones(len(given), 1)], dim=-1)
        moments.add(given, missing)
    change = _change(moments)
    _write(other, weight + change[:, : weight.shape[1]])
    if bias:
        other.bias.copy_(other.bias + change[:, -1])


def _change(moments: Moments) -> Tensor:
    """How a weight changes by least squares, pulled to nothing, `[out, in]`: the targets are what it lacks.

    Of what it lacks, not of what it gives: nothing lacking, nothing changes, to the last bit of the sums.
    """
    if not moments.inputs.numel():  # condensing left no heads or neurons, and there is no bias
        return torch.zeros_like(moments.cross)
    return refit(
        torch.zeros_like(moments.cross), moments, torch.ones_like(moments.inputs[0]).bool(), damping(moments.inputs, DAMPING)
    )


def _at_site(layer: nn.Module, site: Site, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """What a projection is given, and what the stream is where its output joins it."""
    joined = site.joined if site.joined is not layer else None
    last = layer if site.joined is layer else joined or site.module
    with Taps([site.module] if joined is None else [site.module, joined], [site.module], last) as taps:
        try:
            stream = run(layer, hidden, call)
        except Reached:
            stream = taps.outputs[site.module] if joined is None else taps.inputs[joined]
    return wide(taps.inputs[site.module]), wide(stream)


def _repair_norm(both: _Both, step: _Step, forward: _Runs, more: float) -> None:
    """Each channel of what a norm gives, scaled and moved to what it should be: `more` times what it was."""
    (module, *_) = step.modules
    other = both.counterpart(module)
    moves = getattr(other, "bias", None) is not None
    size = len(other.weight)
    given_sum, wanted_sum, squares, products = torch.zeros(4, size, dtype=torch.float64, device=other.weight.device)
    tokens = 0
    for (_, wanted), (_, given) in _pairs(both, step, forward):
        wanted = wanted.double() @ (more * both.plan.stream.matrix)
        given = given.double()
        tokens += len(given)
        given_sum += given.sum(dim=0)
        wanted_sum += wanted.sum(dim=0)
        squares += given.square().sum(dim=0)
        products += (given * wanted).sum(dim=0)
    if moves:
        squares, products = squares - given_sum.square() / tokens, products - given_sum * wanted_sum / tokens
    pull = DAMPING * float(squares.mean())
    factor = (products + pull) / (squares + pull)
    offset = Norm.of(other).offset
    other.weight.copy_((other.weight.double() + offset) * factor - offset)
    if moves:
        other.bias.copy_(other.bias.double() * factor + (wanted_sum - factor * given_sum) / tokens)


def _write(module: Any, weight: Tensor) -> None:
    module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


def _name(model: nn.Module, module: nn.Module) -> str:
    names: dict[nn.Module, str] = {one: name for name, one in model.named_modules()}
    return names[module]
