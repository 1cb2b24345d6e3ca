"""Weights under LoRA: what counts is the merged weight W + s·BA, which the layer computes with and `merge_and_unload()` keeps.

Zeros are made in two ways. If a unit holds whole rows (or columns), its rows of W and B (columns of W and A) are set to zero, and
the gradients of these rows of B (columns of A) are zeroed. Otherwise W is set to −s·BA after each step; PEFT itself computes the
product, so that the sum is exactly zero. In this case the gradients of A and B, to which dead and living weights contribute, are
those of the merged weight without a mask (a straight-through estimator), and what a step changes in dead weights is undone. Living
base weights are never changed, except that a weight whose mask is lifted gets a base value that restores the old merged weight.

The base model alone is changed, so adapters must not be disabled or exchanged afterwards. Merge on the device that pruned: another
may round the product differently. With `lora_dropout`, training sees dead weights as noise with zero mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Adapted, adapted, base_layer


@dataclass(frozen=True, eq=False)
class Adapter:
    """The active adapter of a LoRA layer.

    Attributes:
        layer: PEFT's layer.
        name: the adapter's name.
        base: the layer of the model under it.
    """

    layer: Any
    name: str
    base: Any

    @property
    def lora_A(self) -> nn.Module:
        """The first projection, with a weight of shape `[rank, in]`."""
        module: nn.Module = self.layer.lora_A[self.name]
        return module

    @property
    def lora_B(self) -> nn.Module:
        """The second projection, with a weight of shape `[out, rank]`."""
        module: nn.Module = self.layer.lora_B[self.name]
        return module

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained."""
        return any(part.get_parameter("weight").requires_grad for part in (self.lora_A, self.lora_B))

    def delta(self) -> Tensor:
        """s·BA as `merge_and_unload` adds it to the weight, in the shape of the weight."""
        delta: Tensor = self.layer.get_delta_weight(self.name)
        return delta.detach()

    def merged(self) -> Tensor:
        """W + s·BA as `merge_and_unload` computes it, in the shape and dtype of the weight."""
        weight: Tensor = self.base.weight.detach()
        return (weight + self.delta()).to(weight.dtype)

    def merged_bias(self) -> Tensor:
        """The layer's bias plus the adapter's, if any (`lora_bias`), as `merge_and_unload` computes it, `[out]`."""
        bias: Tensor = self.base.bias.detach()
        own: Tensor | None = getattr(self.lora_B, "bias", None)
        return bias if own is None else bias + own.detach() * self.layer.scaling[self.name]

    def gradient(self) -> Tensor:
        """The gradient of the merged weight, estimated from those of A and B, in the weight's shape; zero where they have none.

        s·(∂L/∂B·A + B·∂L/∂A − ∂L/∂B·∂L/∂A), the decrease of the merged weight in a gradient step of size one on A and B: the
        LoRA-guided criterion of LoRAPrune (Zhang et al. 2023, https://arxiv.org/abs/2305.18403), with PEFT's scaling s of BA.
        """
        (a, a_step), (b, b_step) = (_matrix_and_step(part.get_parameter("weight")) for part in (self.lora_A, self.lora_B))
        product: Tensor = (b_step @ (a - a_step) + b @ a_step) * self.layer.scaling[self.name]
        return product.T if getattr(self.layer, "fan_in_fan_out", False) else product.reshape(self.base.weight.shape)

    def keep_exact(self) -> None:
        """Make merging exact for a weight of lower precision than its adapter; see [`RoundsToBase`]."""
        stock: Any = type(self.layer)
        if self.lora_B.get_parameter("weight").dtype != self.base.weight.dtype and not issubclass(stock, RoundsToBase):
            self.layer.__class__ = adapted(stock, (RoundsToBase,))


def _matrix_and_step(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient, or zeros, as matrices."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return parameter.detach().flatten(1), gradient.flatten(1)


class RoundsToBase(Adapted):
    """Mixin for LoRA layers whose adapter and weight differ in dtype, as PEFT creates them for models in half precision.

    `merge()` adds the adapter's product in float32 and rounds the sum, so that W = −s·BA, itself rounded, leaves a remainder. Here
    the product is rounded first, as `merge(safe_merge=True)` does.
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        stock: Any = super()
        delta: Tensor = stock.get_delta_weight(adapter)
        return delta.to(base_layer(self).weight.dtype)


def adapter_of(name: str, layer: Any, base: nn.Module) -> Adapter | None:
    """The active adapter of a PEFT layer, or None.

    Args:
        name: the layer's name, for the message.
        layer: the layer.
        base: the layer of the model under it.

    Raises:
        ValueError: the weight that the layer computes with is not W + s·BA for a single trained pair A, B.
    """
    reason = _obstacle(layer, base)
    if reason:
        raise ValueError(f"{name}: {reason}. Use one plain LoRA adapter, or merge_and_unload() first.")
    names = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    return Adapter(layer, names[0], base) if names else None


@contextmanager
def zeros_held(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Keep merged weights that are zero exactly zero while both of their parts are cut, however the smaller product is rounded."""
    for adapter in adapters:
        adapter.keep_exact()
        adapter.base.zeros = nn.Parameter(adapter.merged() == 0, requires_grad=False)  # cut like the weight
    yield
    for adapter in adapters:
        layer = adapter.base
        layer.weight.data = torch.where(layer.zeros, -adapter.delta(), layer.weight.data)
        del layer.zeros


def _obstacle(layer: Any, base: nn.Module) -> str:
    """Why the merged weight of an adapted layer is not W + s·BA, or an empty string."""
    from peft.tuners.lora.layer import Conv1d, Conv2d, Linear  # there is an adapted layer, so it is imported already

    stock = layer.stock_class if isinstance(layer, RoundsToBase) else type(layer)
    if stock not in (Linear, Conv1d, Conv2d) or layer.base_layer is not base:
        return f"its adapter is a {stock.__module__}.{stock.__name__}, whose merged weight is not W + BA"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return f"adapters {', '.join(active)} are active together, and are merged one by one, which leaves no exact zeros"
    for name in active:
        if name in layer.lora_variant:
            return f"its adapter is a LoRA variant, {type(layer.lora_variant[name]).__name__}, whose merged weight is not W + BA"
        if layer.lora_B[name].bias is not None and base.bias is None:
            return "its adapter has a bias (lora_bias=True) and the layer has none, so it cannot be merged"
        if getattr(base, "groups", 1) > 1:
            return "PEFT cannot merge an adapter of a grouped convolution"
    if layer.merged or layer.disable_adapters:
        return "its adapter is merged or disabled"
    return ""
