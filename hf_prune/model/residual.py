"""The residual stream: which modules read it, write it or scale it, and along which dimensions of their parameters.

Nothing is listed by family and nothing is traced. A dimension belongs to the stream if it grows with the hidden size: the class of
the model is built twice on the meta device, the second time with the hidden size doubled and nothing else, and the shapes of
parameters are compared by name. What grows because heads do is known from the [`Block`]s and left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..settings.errors import ConfigError
from .blocks import Block, blocks, body_prefix, hidden_size_name, layer_lists
from .spec import ArchitectureSpec


@dataclass(frozen=True, eq=False)
class Member:
    """A module with parameters along the residual stream.

    Attributes:
        name: its name in the model.
        module: the module.
        axes: parameter → its dimensions along the stream, each with the number of copies of the stream that are side by side there.
        kind: `"norm"` for a module that scales each channel by itself, `"linear"` for one that maps its input, and `"table"` for an
            embedding or any other that holds vectors of the stream.
        layer: the name of the layer that it is in, `""` for none.
        reads: whether what goes into it is the stream.
        writes: whether what comes out of it is.
        apart: what of it is along channels of a task head (a pooler's), which have the number of the stream's but not their
            meaning: `"in"` and `"out"`.
    """

    name: str
    module: Any
    axes: Mapping[str, Mapping[int, int]]
    kind: str
    layer: str = ""
    reads: bool = False
    writes: bool = False
    apart: frozenset[str] = frozenset()

    def side(self, key: str, dim: int) -> str:
        """Whether a dimension of a parameter is along what goes `"in"` or what comes `"out"`."""
        inputs = 0 if isinstance(self.module, Conv1D) else 1
        return "in" if self.kind == "linear" and key == "weight" and dim == inputs else "out"


def resized(config: Any, spec: ArchitectureSpec, size: int, head_size: int | None) -> Any:
    """The config of a stock model with another hidden size, and heads and neurons as wide as they are.

    Where the width of a head follows from the hidden size, so does the number of heads: more or fewer of the same width. What would
    follow by default (GPT-2's number of neurons) is written out.

    Args:
        config: of a model, condensed or not.
        spec: of its family.
        size: the hidden size. Whether the config can have it, the config itself says when a model is built.
        head_size: the width of a head; None for a model without attention.
    """
    other: Any = copy.deepcopy(config)
    name = hidden_size_name(config)
    before = getattr(config, name)
    if head_size is not None:
        for attribute in spec.heads:
            setattr(other, attribute, size // head_size)
        if any("head_dim" in widths for widths in spec.widths):
            other.head_dim = head_size
    for widths in spec.widths:
        if getattr(config, widths.get("intermediate_size", ""), 0) is None:
            setattr(other, widths["intermediate_size"], 4 * before)
    for attribute in (name, *(other for other in spec.as_hidden if getattr(config, other, None) == before)):
        setattr(other, attribute, size)
    other.hf_prune = None
    return other


def head_size(found: list[Block]) -> int | None:
    """The width of the heads among some blocks, None if there are none."""
    return next((block.unit_width for block in found if block.kind == "attention"), None)


def twin(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class by another config, on the meta device."""
    with torch.device("meta"):
        built: Any = type(model)(config)
    return built  # type: ignore[no-any-return]


def members(model: PreTrainedModel, spec: ArchitectureSpec) -> list[Member]:
    """Every module of a model with parameters along the residual stream, in the order of the model's modules.

    Raises:
        ConfigError: a parameter grows with the hidden size in a way that is not by whole copies of the stream (a convolution in
            groups), which its channels cannot be taken from one by one.
    """
    size = getattr(model.config, hidden_size_name(model.config))
    found_blocks = blocks(model, spec)
    width = head_size(found_blocks)
    stock, wide = (dict(_tensors(twin(model, resized(model.config, spec, count * size, width)))) for count in (1, 2))
    if stock.keys() != wide.keys():
        some = min(stock.keys() ^ wide.keys())
        raise ConfigError("model", type(model).__name__, f"has {some} at one hidden size and not at another.")
    made = _made_along(model, stock, wide)
    if made:
        raise ConfigError("model", type(model).__name__, f"has {made}, which follows from the hidden size and is in no checkpoint.")
    own = _own_dimensions(found_blocks)
    layers = [
        f"{body_prefix(model)}{name}.{index}"
        for path in spec.layers
        for name, found in layer_lists(model, path).items()
        for index in range(len(found))
    ]
    buffers = {name for name, _ in model.named_buffers()}
    found: list[Member] = []
    for name, module in model.named_modules(remove_duplicate=False):
        axes: dict[str, dict[int, int]] = {}
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{name}.{key}" if name else key
            if full not in stock:  # a bias that condensing added to the output of a block
                axes[key] = {0: 1}
                continue
            for dim, (small, large) in enumerate(zip(stock[full].shape, wide[full].shape)):
                if small == large or dim in own.get((module, key), ()):
                    continue
                if large != 2 * small or small % size or full in buffers:
                    shape = "x".join(map(str, tensor.shape))
                    allowed = f"has {full} ({shape}), whose shape follows from the hidden size, but not channel by channel."
                    raise ConfigError("model", type(model).__name__, allowed)
                axes.setdefault(key, {})[dim] = small // size
        if axes:
            layer = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
            found.append(_member(name, module, axes, layer))
    if not found:
        name = hidden_size_name(model.config)
        raise ConfigError("model", type(model).__name__, f"has no stream of one width that {name} of its config gives.")
    return _with_heads_apart(found)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, module in model.named_modules():  # attributes of neither kind
        yield from ((f"{name}.{key}", value) for key, value in vars(module).items() if isinstance(value, Tensor))


def _made_along(model: PreTrainedModel, stock: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> str:
    """A tensor along the stream that a model makes itself whenever it is loaded; `""` if there is none."""
    kept = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
    kept -= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return next((name for name in stock if name not in kept and stock[name].shape != wide[name].shape), "")


def _own_dimensions(found: list[Block]) -> dict[tuple[nn.Module, str], set[int]]:
    """(module, parameter) → the dimensions that are along heads or neurons."""
    own: dict[tuple[nn.Module, str], set[int]] = {}
    for block in found:
        for part in block.projections:
            stored_in_out = isinstance(part.layer, Conv1D)
            if part is block.output:
                own.setdefault((part.layer, "weight"), set()).add(0 if stored_in_out else 1)
            else:
                own.setdefault((part.layer, "weight"), set()).add(1 if stored_in_out else 0)
                own.setdefault((part.layer, "bias"), set()).add(0)
        for owner, name, entry in block.by_head:
            own.setdefault((owner, name), set()).add(entry.dim)
    return own


def _member(name: str, module: Any, axes: dict[str, dict[int, int]], layer: str) -> Member:
    if isinstance(module, (nn.Linear, Conv1D, _ConvNd)):
        inputs = 0 if isinstance(module, Conv1D) else 1
        along = axes.get("weight", {})
        return Member(name, module, axes, "linear", layer, reads=inputs in along, writes=1 - inputs in along)
    one_by_one = not isinstance(module, nn.Embedding) and all(value.ndim == 1 for value in module.parameters(recurse=False))
    if one_by_one and "weight" in axes:
        return Member(name, module, axes, "norm", layer, reads=True, writes=True)
    return Member(name, module, axes, "table", layer, writes=True)


def _with_heads_apart(found: list[Member]) -> list[Member]:
    """Tell the channels of task heads from the stream's: behind the last layer, what a linear module writes is its own.

    A head that ends in the embeddings, as that of a masked language model, writes channels of the stream after all.
    """
    last = max((place for place, member in enumerate(found) if member.layer), default=len(found))
    places: list[frozenset[str]] = []
    inside = False
    for place, member in enumerate(found):
        behind = place > last and member.kind != "table"
        apart = {"in"} if behind and inside else set()
        if behind and (inside or member.kind == "linear") and member.writes:
            apart.add("out")
            inside = True
        places.append(frozenset(apart))
    tables = {id(member.module.weight) for member in found if member.kind == "table" and hasattr(member.module, "weight")}
    if any(
        "in" in apart and member.kind == "linear" and id(member.module.weight) in tables for member, apart in zip(found, places)
    ):
        places = [frozenset()] * len(found)
    return [
        Member(one.name, one.module, one.axes, one.kind, one.layer, one.reads, one.writes, apart)
        for one, apart in zip(found, places)
    ]
