"""How a model is to be narrowed: by a choice of channels, or by a rotation first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.residual import Member
from ..settings.errors import ConfigError
from .basis import Basis, with_scale
from .look import Seen
from .narrow import Norm, Plan, head_scale, rescaling


def norms(members: Sequence[Member]) -> dict[str, Norm]:
    """The norms of the stream, by name."""
    return {member.name: Norm.of(member.module) for member in members if member.kind == "norm" and not member.apart}


def tied(members: Sequence[Member]) -> list[Member]:
    """The output heads that are tied to embeddings."""
    tables = {id(member.module.weight) for member in members if isinstance(member.module, nn.Embedding)}
    return [member for member in members if member.kind == "linear" and id(member.module.weight) in tables]


def is_tied(small: PreTrainedModel, members: Sequence[Member]) -> bool:
    """Whether an output head of the narrow model is tied to its embeddings."""
    tables = {id(module.weight) for module in small.modules() if isinstance(module, nn.Embedding)}
    return any(id(small.get_parameter(f"{member.name}.weight")) in tables for member in tied(members))


def selection(
    model: PreTrainedModel,
    small: PreTrainedModel,
    members: Sequence[Member],
    stream: Basis,
    apart: Basis | None,
    pre_norm: bool,
    seen: Seen | None,
) -> Plan:
    """The plan by which some channels stay.

    With RMSNorms alone, on block inputs, the stream is scaled by c; then zeros go without a difference. With data, the scale of
    each norm makes up for the energy that goes.

    Args:
        model: the model.
        small: one of its class with the new hidden size.
        members: of the model.
        stream: which channels stay.
        apart: which of the task head's; None where it has none of its own.
        pre_norm: whether layers only add to the stream.
        seen: what data show.
    """
    hidden, size = stream.matrix.shape
    own = norms(members)
    exact = pre_norm and not any(norm.centred for norm in own.values())
    factor = (size / hidden) ** 0.5 if exact else 1.0
    scales: dict[str, float | Tensor] = {}
    for name, squares in ({} if seen is None else seen.plain_squares).items():
        share = float(squares[stream.kept].sum() / squares.sum())
        scales[name] = (share if exact else share * hidden / size) ** 0.5
    more = _before_head(model, small, members, factor)
    if more != 1:
        last = _last(members, own)
        scales[last] = scales.get(last, 1.0) * more
    return Plan(stream, apart or stream, factor, scales=scales, before_head=more)


def rotation(
    model: PreTrainedModel, small: PreTrainedModel, members: Sequence[Member], stream: Basis, apart: Basis | None, seen: Seen
) -> Plan:
    """The plan by which some directions stay, in a model whose norms are all on the inputs of blocks; see [`selection`].

    Raises:
        ConfigError: a module reads the stream without a norm, or there is none that could take over the scale of a norm.
    """
    hidden, size = stream.matrix.shape
    own, kind = norms(members), type(model).__name__
    factor = (size / hidden) ** 0.5
    heads = [member.name for member in tied(members)] if is_tied(small, members) else []
    folded = {}
    for member in members:
        if member.kind == "linear" and member.reads and "in" not in member.apart and member.name not in heads:
            if not (name := seen.norm_of.get(member.name)):
                raise ConfigError("rotate", True, f"{kind} has {member.name}, which reads the stream without a norm.")
            folded[member.name] = own[name]
    left = [name for name in own if name not in {seen.norm_of[reader] for reader in folded}]
    if len(left) > 1 or (left and own[left[0]].centred):
        raise ConfigError("rotate", True, f"{kind} has nothing that reads {left[0]} and could take over its scale.")
    scales: dict[str, float | Tensor] = {}
    for name in left:
        stream, scales[name] = with_scale(stream, own[name].scale)
    more = _before_head(model, small, members, factor)
    if more != 1:
        last = _last(members, own)
        scales[last] = scales.get(last, 1.0) * more
    return Plan(stream, apart or stream, factor, folded, scales, more)


def _last(members: Sequence[Member], own: dict[str, Norm]) -> str:
    """The last norm outside of layers, which a tied head reads."""
    return [member.name for member in members if member.name in own and not member.layer][-1]


def _before_head(model: PreTrainedModel, small: PreTrainedModel, members: Sequence[Member], factor: float) -> float:
    """See `Plan.before_head`."""
    untyped: Any = model
    more = 1.0 if untyped.get_output_embeddings() is None else head_scale(model.config) / head_scale(small.config)
    if factor != 1 and is_tied(small, members):
        table = next(member for member in members if isinstance(member.module, nn.Embedding))
        more *= rescaling(table.module, small.get_submodule(table.name)) / factor
    return more
