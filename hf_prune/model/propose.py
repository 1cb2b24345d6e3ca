"""Proposals: what the blocks of a layer may be, by what reaches what in it. `condense/infer.py` tries them.

An output of a linear module that changes one feature of another's input, at its own position, makes a neuron of that one. One that
changes a whole run of features at its own position is of a query, and the run is a head; at other positions, too, it is of a key,
or of a value if it changes one feature of each head that shares it. So the roles, the width of a head, groups, and how modules pack
them follow from the flow; names decide nothing but what is tried first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .blocks import _rows, at_path, body, hidden_of, out_features
from .flow import LayerCall, Reach, reached
from .spec import AttentionSpec, ByHead, FeedForwardSpec, Part

#: How many outputs of a module are probed at most, and how many of them at a time.
PROBES, COPIES = 192, 16

#: How many descriptions of one block are proposed at most.
GUESSES = 400


def in_features(layer: Any) -> int:
    """Number of inputs of a Linear or Conv1D."""
    size: int = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
    return size


def layer_paths(model: Any) -> list[str]:
    """The lists of layers in a model's body, as `ArchitectureSpec.layers` names them: modules of one class, with linear modules.

    Of a list of lists of such layers the inner ones are meant.
    """
    found: dict[str, str] = {}
    for name, module in body(model).named_modules():
        if not _is_list(module) or any(name.startswith(f"{other}.") for other in found):
            continue
        inner = next((key for key, child in module[0].named_modules() if _is_list(child)), "")
        lists = [member.get_submodule(inner) for member in module if inner and _has(member, inner)]
        deeper = len(lists) == len(module) and all(2 * _linears(one) > _linears(other) for one, other in zip(lists, module))
        found[name] = f"{name}.*.{inner}" if deeper else name
    return list(found.values())


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a list of layers that are alike."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        return False
    return len(set(map(type, module))) == 1 and all(_linears(layer) > 1 for layer in module)


def _linears(module: nn.Module) -> int:
    return sum(isinstance(inner, (nn.Linear, Conv1D)) for inner in module.modules())


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def blocks_of(call: LayerCall, alike: Sequence[nn.Module] = ()) -> list[list[AttentionSpec] | list[FeedForwardSpec]]:
    """What each block of a layer may be, best guess first.

    Args:
        call: of the layer, in a pass of `COPIES` equal rows.
        alike: the other layers of its list: a number that differs between them is no size.
    """
    linears: dict[str, Any] = {
        name: module for name, module in call.layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    modules, norms = list(linears.values()), _norms_behind(call, linears)
    probed = {name: call.layer.get_submodule(norms.get(name, name)) for name in linears}
    flow = {name: reached(call, probed[name], modules, _some(out_features(linears[name])), COPIES) for name in linears}
    found: list[list[AttentionSpec] | list[FeedForwardSpec]] = []
    for name, output in linears.items():
        reaching = {source: reach[output] for source, reach in flow.items() if source != name and reach[output]}
        here = _Output(call, alike, name, in_features(output), linears, reaching, norms)
        neurons = list(_feed_forwards(here))
        heads = [] if neurons else list(itertools.islice(_attentions(here), GUESSES))
        found += [some for some in (neurons, heads) if some]
    return found


@dataclass(frozen=True)
class _Output:
    """A linear module of a layer, and what makes its input.

    Attributes:
        call: of the layer.
        alike: the other layers of its list.
        name: of the module in the layer.
        size: how many features its input has.
        linears: the linear modules of the layer.
        sources: module → output → what that reaches in the input.
        norms: module → the norm over all of its outputs that they go through; what these reach is told from there.
    """

    call: LayerCall
    alike: Sequence[nn.Module]
    name: str
    size: int
    linears: Mapping[str, nn.Module]
    sources: Mapping[str, Mapping[int, Reach]]
    norms: Mapping[str, str]


def _norms_behind(call: LayerCall, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The linear modules whose whole output is what a norm is given (queries and keys of all heads): the names of both."""
    outputs: dict[str, Tensor] = {}
    found: dict[str, str] = {}

    def note(name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in linears:
            outputs.setdefault(name, result)
        else:
            found.update({source: name for source, value in outputs.items() if args and args[0] is value})

    vectors = {name for name, module in call.layer.named_modules() if [value.ndim for value in module.parameters()] == [1]}
    handles = [
        module.register_forward_hook(lambda module, args, result, name=name: note(name, args, result))
        for name, module in call.layer.named_modules()
        if name in linears or name in vectors
    ]
    try:
        with torch.no_grad():
            call.again()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _some(size: int) -> list[int]:
    """Some outputs of a module: all, or evenly many at random places."""
    if size <= PROBES:
        return list(range(size))
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:PROBES]
    return sorted(map(int, drawn.tolist()))


def _makes_all(output: _Output, sources: Iterable[str]) -> bool:
    """Whether nothing but these makes the input of a module: without them it is the same everywhere."""
    silent = {output.linears[source]: torch.zeros_like for source in sources}
    (without,) = output.call.inputs_of([output.linears[output.name]], silent)
    if not silent or without is None:
        return False
    flat = without.flatten(0, -2)
    return bool(torch.allclose(flat, flat[:1].expand_as(flat)))


# ----------------------------------------------------------------------------------------------------------------------- parts


def _layouts(path: str, counts: Sequence[int] = (1, 2, 3)) -> Iterator[Part]:
    """The ways in which rows of a role may be among the outputs of a module."""
    for count in counts:
        for index in range(count):
            yield Part(path, index, count)
    for count in counts[1:]:
        for index in range(count):
            yield Part(path, index, count, interleaved=True)


def _agrees(
    part: Part, first: Part, size: int, width: int, each: int, wanted: Mapping[int, int], others: Iterable[int], to: int
) -> bool:
    """Whether a layout agrees with what was seen.

    Args:
        part, first: the layout, and that of the queries.
        size: how many outputs its module has.
        width, each: of a head, and how many of them share a key and value.
        wanted: output → the place among the role's rows that it must have, divided by `to`.
        others: outputs of other roles.
        to: 1, or the width of a head if no more is known.
    """
    try:
        rows = _rows(part, size, width, first, each).tolist()
    except RuntimeError:  # the outputs do not divide into such parts
        return False
    place = {row: number for number, row in enumerate(rows)}
    return not place.keys() & set(others) and all(row in place and place[row] // to == where for row, where in wanted.items())


# ----------------------------------------------------------------------------------------------------------------- feed-forward


def _feed_forwards(output: _Output) -> Iterator[FeedForwardSpec]:
    """What a feed-forward block may be whose neurons go into this module."""
    by_part: list[tuple[float, Part]] = []
    for source, by in output.sources.items():
        if any(len(reach.features) > 1 or reach.elsewhere for reach in by.values()):
            continue
        size = out_features(output.linears[source])
        for part in _layouts(source, counts=(size // output.size,)):
            rows = _rows(part, size, 1, part, 1).tolist()
            mine = {row: by[row] for row in rows if row in by}
            if mine and all(reach.features == (rows.index(row),) for row, reach in mine.items()):
                by_part.append((sum(reach.linear for reach in mine.values()) / len(mine), part))
    if not _makes_all(output, {part.path for _, part in by_part}):
        return
    down, roles = Part(output.name), [part for _, part in sorted(by_part, key=lambda one: -one[0])]
    for activation in _activations(output):
        if len(roles) == 1:
            yield FeedForwardSpec(roles[0], down, activation)
        elif len(roles) == 2:
            yield FeedForwardSpec(roles[0], down, activation, gate=roles[1])


def _activations(output: _Output) -> list[str]:
    """The modules without parameters through which features go to a module and are changed."""
    seen: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        given = next((value for value in args if isinstance(value, Tensor)), None)
        if given is not None and isinstance(result, Tensor) and given.shape[-1] == result.shape[-1] == output.size:
            seen.setdefault(module, not given.equal(result))

    modules = {name: module for name, module in output.call.layer.named_modules() if name and not [*module.parameters()]}
    handles = [module.register_forward_hook(note) for module in modules.values()]
    try:
        output.call.again()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, module in modules.items() if seen.get(module)]


# -------------------------------------------------------------------------------------------------------------------- attention


def _attentions(output: _Output) -> Iterator[AttentionSpec]:
    """What an attention block may be whose heads go into this module."""
    reaches = [reach for by in output.sources.values() for reach in by.values()]
    runs = [reach.features for reach in reaches if not reach.elsewhere and _is_run(reach.features, output.size)]
    if not runs:
        return
    width = len(max(runs, key=runs.count))
    apart = [reach.features for reach in reaches if reach.elsewhere and len({f % width for f in reach.features}) == 1]
    if not apart:
        return
    each = len(max(apart, key=apart.count))  # how many heads share a key and value
    roles: dict[str, dict[str, dict[int, int]]] = {"query": {}, "key": {}, "value": {}}
    for source, by in output.sources.items():
        if _one_each(output, source, width):
            continue
        known = {row: _role(reach, width, each) for row, reach in by.items()}
        if all(role for role, _ in known.values()):
            for row, (role, place) in known.items():
                roles[role].setdefault(source, {})[row] = place
    used = {source for sources in roles.values() for source in sources}
    if len(roles["query"]) != 1 or len(roles["value"]) != 1 or not _makes_all(output, used):
        return

    def layouts(role: str, source: str, first: Part | None = None) -> list[Part]:
        others = [row for other, its in roles.items() if other != role for row in its.get(source, {})]
        size, to = out_features(output.linears[source]), 1 if role == "value" else width
        wanted = roles[role][source]
        return [part for part in _layouts(source) if _agrees(part, first or part, size, width, each, wanted, others, to)]

    (query,), (value,) = roles["query"], roles["value"]
    for key, first in itertools.product(roles["key"], layouts("query", query)):
        rest = [("key", key), ("value", value), *(("key", other) for other in roles["key"] if other != key)]
        module = _common([query, key, value])
        for parts in itertools.product(*(layouts(role, source, first) for role, source in rest)) if module else ():
            yield from _modules(output, module, (first, *parts), width, each)


def _is_run(features: Sequence[int], size: int) -> bool:
    """Whether features are neighbours, more than one, and may be one of several heads."""
    count = len(features)
    return 1 < count < size and features[-1] - features[0] == count - 1 and not size % count and not features[0] % count


def _one_each(output: _Output, source: str, width: int) -> bool:
    """Whether a module has one output for every head, such as a bias by head that a network computes from positions."""
    rows = output.sources.get(source, {})
    own = all({feature // width for feature in reach.features} == {row} for row, reach in rows.items())
    return bool(rows) and own and out_features(output.linears[source]) == output.size // width


def _role(reach: Reach, width: int, each: int) -> tuple[str, int]:
    """The role of an output, and the unit (of a value, the row) that it belongs to; `""` if it has none that a spec can say."""
    features = set(reach.features)
    first = min(features)
    unit = first // width
    if not reach.elsewhere:
        return ("query", unit) if features == set(range(unit * width, (unit + 1) * width)) else ("", 0)
    group = unit // each
    heads = range(group * each, (group + 1) * each)
    if features == {feature for head in heads for feature in range(head * width, (head + 1) * width)}:
        return "key", group
    return ("value", group * width + first % width) if features == {head * width + first % width for head in heads} else ("", 0)


def _common(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these."""
    steps = zip(*(path.split(".")[:-1] for path in paths))
    return ".".join(step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, steps))


def _modules(output: _Output, path: str, parts: Sequence[Part], width: int, each: int) -> Iterator[AttentionSpec]:
    """The specs of attention in a module, by what its attributes may mean and what it may do after the output projection."""
    module = output.call.layer.get_submodule(path)
    query, key, value, *extra = parts
    heads = output.size // width
    siblings = [other.get_submodule(path) for other in output.alike if _has(other, path)]
    read = _read(output.call, module)
    numbers = {
        name: number
        for name, number in (vars(module) | read).items()
        if type(number) is int and all(at_path(other, name) == number for other in siblings)
    }
    meanings = {"heads": heads, "key_value_heads": heads // each, "width": output.size, "groups": each}
    by_head = tuple(
        ByHead(f"{output.norms[part.path]}.weight", role=role, forward="StockMean")
        for role, part in (("query", query), ("key", key))
        if part.path in output.norms
    )
    afterwards, (given, residual, alone) = _afterwards(output, path), _given(output, module)
    for head_size in sorted(
        (name for name, number in numbers.items() if number == width and "." not in name),
        key=_looks_like("head_dim head_size size dim"),
    ):
        choices = {name: _meanings(name, number, meanings, name in read) for name, number in numbers.items() if name != head_size}
        choices = {name: some for name, some in choices.items() if some != [""]}
        for said in itertools.product(*choices.values()):
            sizes = {name: meaning for name, meaning in zip(choices, said) if meaning}
            plain = AttentionSpec(
                path,
                query,
                key,
                value,
                Part(output.name),
                head_size,
                sizes,
                extra=tuple(extra),
                forwards=("OwnConfig",) if any("." in name for name in sizes) else (),
                by_head=by_head,
                adds_residual=residual,
                returns_tensor=alone,
            )
            for (after, norm), guess in itertools.product(afterwards, _by_head(output, plain, given, heads)):
                yield replace(guess, after=after, residual_norm=norm)


#: What names of sizes look like.
_HINTS = {
    "key_value_heads": r"(kv|key_value).*heads",
    "heads": r"^(?!.*(kv|key_value)).*heads?$",
    "groups": r"group",
    "width": r"all_head|inner_dim|^dim$|split_size",
}


def _meanings(name: str, number: int, meanings: Mapping[str, int], read: bool) -> list[str]:
    """What a number of a module may mean, what its name suggests first; `""` for nothing that heads change.

    A number that the module does not read (but a spec may need) means what its name suggests.
    """
    hinted = [meaning for meaning, hint in _HINTS.items() if meanings[meaning] == number and re.search(hint, name)]
    if hinted and not read:
        return hinted[:1]
    return list(dict.fromkeys((*hinted, "", *(what for what, size in meanings.items() if size == number and number > 1))))


def _looks_like(names: str) -> Callable[[str], int]:
    """A sorting key: by the first of some words that a name contains."""
    words = names.split()
    return lambda name: next((place for place, word in enumerate(words) if word in name), len(words))


def _read(call: LayerCall, module: Any) -> dict[str, Any]:
    """The attributes of a module, and of its config, that it reads while its layer is called."""
    read: dict[str, Any] = {}
    kind: Any = type(module)

    def spy(self: Any, name: str) -> Any:
        value = read[name] = kind.__getattribute__(self, name)
        return _Spied(value, f"{name}.", read) if isinstance(value, PreTrainedConfig) else value

    module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": spy})
    try:
        with torch.no_grad():
            call.again()
    finally:
        module.__class__ = kind
    return read


class _Spied:
    """A config that notes what is read of it."""

    def __init__(self, config: Any, prefix: str, read: dict[str, Any]) -> None:
        self.noted = config, prefix, read

    def __getattr__(self, name: str) -> Any:
        config, prefix, read = self.noted
        value = read[prefix + name] = getattr(config, name)
        return value


def _afterwards(output: _Output, path: str) -> list[tuple[tuple[str, ...], str]]:
    """What a module may do with the result of its output projection: names of submodules, and of a norm that adds the input."""
    if not output.name.startswith(f"{path}."):
        return [((), "")]
    module = output.call.layer.get_submodule(path)
    order: list[str] = []
    handles = [
        child.register_forward_hook(lambda module, args, result, name=name: order.append(name))
        for name, child in module.named_children()
    ]
    try:
        with torch.no_grad():
            output.call.again()
    finally:
        for handle in handles:
            handle.remove()
    own = output.name.removeprefix(f"{path}.").partition(".")[0]
    after = tuple(order[order.index(own) + 1 :]) if own in order else ()
    return [(after, ""), *([(after[:-1], after[-1])] if after else [])]


def _given(output: _Output, module: nn.Module) -> tuple[dict[str, Tensor], bool, bool]:
    """The tensors that a module is given by name, whether it adds its second argument to what its output projection gives, and
    whether it returns nothing else."""
    seen: dict[str, Tensor] = {}
    adds = alone = False

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        nonlocal adds, alone
        seen.update({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})
        adds = len(args) > 1 and isinstance(args[1], Tensor) and hidden_of(result).equal(args[1])
        alone = isinstance(result, Tensor)

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        output.call.again({output.linears[output.name]: torch.zeros_like})
    finally:
        handle.remove()
    return seen, adds, alone


def _by_head(output: _Output, plain: AttentionSpec, given: Mapping[str, Tensor], heads: int) -> Iterator[AttentionSpec]:
    """What an attention block may have an entry of for every head: nothing; parameters of its layer; a bias, from an embedding in
    it or elsewhere, that layers share; biases that it is given by name."""
    yield plain
    many = {name for name in output.linears if not _one_each(output, name, output.size // heads)}
    parameters = [(name, value) for name, value in output.call.layer.named_parameters() if name.rpartition(".")[0] not in many]
    places = [[ByHead(name, dim) for dim, size in enumerate(value.shape) if size == heads] for name, value in parameters]
    if any(places):
        for own in itertools.product(*filter(None, places)):
            yield replace(plain, by_head=plain.by_head + own)
    module = output.call.layer.get_submodule(plain.module)
    tables = [name for name, child in module.named_children() if isinstance(child, nn.Embedding) and child.embedding_dim == heads]
    for way, table in itertools.product(("taken", "passed on"), (*tables, "")):
        yield replace(plain, position_bias=way, position_table=table, forwards=("OwnHeads", *plain.forwards))
    along = {name: -3 for name, value in given.items() if value.ndim > 2 and value.shape[-3] == heads}
    along |= {name: 0 for name, value in given.items() if value.ndim == 3 and value.shape[0] == COPIES * heads}
    if along:
        yield replace(plain, position_bias="taken", position_arguments=along, forwards=("OwnBiases", *plain.forwards))
