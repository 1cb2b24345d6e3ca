"""A model in another basis of the residual stream: every parameter along the stream, and what the config says of it.

With c and S of `basis.py`: what writes the stream gives c·Sᵀ of what it gave, what reads it takes S of what it is given, and norms
give what they gave. When S chooses channels, norms are cut like anything else and divided by c. A rotation needs norms that do not
tell channels apart, so scales (and biases) go into what reads the norm: W·diag(g)·S for RMSNorm; for LayerNorm, which keeps a bias
of ones, W·diag(g)·S + W·b·1ᵀ/size, whose second term sees nothing but that bias, as all else has mean zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model.residual import Member
from .basis import Basis


@dataclass(frozen=True)
class Norm:
    """What a norm does, found by asking it.

    Attributes:
        scale: what it multiplies each channel by, `[hidden]`, float64.
        bias: what it adds, `[hidden]`, float64.
        offset: what the scale is beside the weight: 1 where the weight says how far it is from 1 (Gemma).
        centred: whether it subtracts the mean, as LayerNorm does.
        epsilon: what it adds to the mean square.
    """

    scale: Tensor
    bias: Tensor
    offset: float
    centred: bool
    epsilon: float

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> Norm:
        """That of a module with a weight for each channel."""
        weight = module.weight.detach()
        bias = getattr(module, "bias", None)
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        same = module(torch.ones_like(weight)[None])[0] - bias  # nothing is left of it if the mean is subtracted
        centred = bool(same.abs().max() <= 1e-3 * weight.abs().max())
        offset = 0.0 if centred else round(float((same - weight).double().mean()))
        epsilon = next((float(getattr(module, name)) for name in ("eps", "variance_epsilon") if hasattr(module, name)), 1e-6)
        return cls(weight.double() + offset, bias.double(), offset, centred, epsilon)

    def normalised(self, inputs: Tensor) -> Tensor:
        """What it makes of inputs, `[…, hidden]`, before scale and bias."""
        if self.centred:
            inputs = inputs - inputs.mean(dim=-1, keepdim=True)
        return inputs * torch.rsqrt(inputs.square().mean(dim=-1, keepdim=True) + self.epsilon)


@dataclass(frozen=True)
class Plan:
    """How a model is to be narrowed.

    Attributes:
        stream: the basis of the residual stream.
        apart: that of the channels of task heads.
        factor: c, by which the stream itself is scaled.
        folded: name of a module that reads the stream → the norm whose scale and bias it takes over; for rotations.
        scales: name of a norm → what it multiplies each channel by beside what is said here, or, where `folded` takes its own scale
            away, instead of 1: a number or `[size]`.
        before_head: by how much more the norm before a tied output head gives, since the head is as much smaller as the embeddings.
    """

    stream: Basis
    apart: Basis
    factor: float = 1.0
    folded: Mapping[str, Norm] = field(default_factory=dict)
    scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    before_head: float = 1.0

    @property
    def rotates(self) -> bool:
        """Whether the basis mixes channels."""
        return self.stream.kept is None


@torch.no_grad()
def narrow(model: PreTrainedModel, small: PreTrainedModel, members: Sequence[Member], plan: Plan) -> None:
    """Write a model's parameters into one of the same class with another hidden size.

    Args:
        model: the model.
        small: the other one, on the same device; it takes the dtypes of the first, too.
        members: of the model.
        plan: what is kept.
    """
    known = {member.name: member for member in members}
    others = dict(small.named_modules(remove_duplicate=False))
    done: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            other = others[name].get_parameter(key)
            if id(other) in done:
                continue
            done.add(id(other))
            value = parameter.detach()
            if name in known and key in known[name].axes:
                value = _along(known[name], key, value, others[name], plan)
            other.data = value.to(parameter.dtype).clone()
            other.requires_grad_(parameter.requires_grad)
        for key, buffer in module.named_buffers(recurse=False):
            other = others[name].get_buffer(key)
            made = key in module._non_persistent_buffers_set  # of the config, and so already there
            other.data = other.to(buffer.dtype) if made else buffer.detach().clone()


def _along(member: Member, key: str, value: Tensor, small: Any, plan: Plan) -> Tensor:
    """A parameter in the other basis, in float32 at least."""
    value = wide(value)
    if member.kind == "norm":
        return _norm(member, key, value, plan)
    for dim, copies in member.axes[key].items():
        side = member.side(key, dim)
        if side == "in" and member.name in plan.folded:
            value = folded(value, dim, plan.folded[member.name], plan.stream)
        else:
            value = (plan.apart if side in member.apart else plan.stream).along(value, dim, copies)
    if member.writes and "out" not in member.apart:
        value = value * (plan.factor / rescaling(member.module, small))
    return value


def folded(weight: Tensor, dim: int, norm: Norm, basis: Basis) -> Tensor:
    """The weight of what reads a norm that is left without scale and bias, with its inputs along `dim`."""
    hidden, size = basis.matrix.shape
    last = weight.movedim(dim, -1)
    shape = (*[1] * (last.ndim - 1), hidden)
    made = (last * norm.scale.to(last).view(shape)) @ basis.matrix.to(last)
    if norm.centred:
        made = made + (last @ norm.bias.to(last))[..., None] / size
    return made.movedim(-1, dim)


def _norm(member: Member, key: str, value: Tensor, plan: Plan) -> Tensor:
    norm, own = Norm.of(member.module), plan.scales.get(member.name, 1.0)
    if member.apart:
        return plan.apart.along(value, 0)
    cut = value.new_ones(plan.stream.matrix.shape[1]) if plan.rotates else plan.stream.along(value, 0)
    if key != "weight":
        return cut
    scale = cut if plan.rotates else cut + norm.offset
    return scale * (own.to(value) if isinstance(own, Tensor) else own) / plan.factor - norm.offset


def wide(value: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def matrix(module: Any) -> Tensor:
    """The weight of a Linear or Conv1D as `[out, in]`."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def rescaling(module: Any, small: Any) -> float:
    """How much more the narrow model multiplies its embeddings by than the model did."""
    now, before = (float(getattr(one, "embed_scale", None) or 1.0) for one in (small, module))
    return now / before


def head_scale(config: Any) -> float:
    """What a model multiplies its last hidden states by before the output head: T5 makes up for tied embeddings."""
    return float(config.d_model) ** -0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0


@torch.no_grad()
def take_over(model: PreTrainedModel, small: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Let a model be what another one of its class is: its parameters, its sizes and its config.

    Args:
        model: the model; its modules stay the same objects.
        small: the other one.
        stock: one as the model was made, on the meta device. Numbers that a module has from its config are known by their being
            different there and in `small`; others, somebody has set.
    """
    others, before = dict(small.named_modules(remove_duplicate=False)), dict(stock.named_modules(remove_duplicate=False))
    taken: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in list(module.named_parameters(recurse=False)):
            other = others[name].get_parameter(key)
            setattr(module, key, taken.setdefault(id(other), nn.Parameter(other.data, parameter.requires_grad)))
        for key, _ in list(module.named_buffers(recurse=False)):
            setattr(module, key, others[name].get_buffer(key))
        for key, value in vars(others[name]).items():
            if key != "training" and isinstance(value, int | float | tuple) and vars(before[name]).get(key, value) != value:
                setattr(module, key, value)
