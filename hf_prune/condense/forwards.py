"""The `forward`s of attention modules that lack heads, where the stock ones would fail.

A spec names those that its family needs (`AttentionSpec.forwards`), and the modelling file of a checkpoint has only these, and
`NoHeads`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model import AttentionSpec
from ..model.blocks import Adapted


class NoHeads(Adapted):
    """The `forward` of an attention module without heads: stock ones cannot infer the shape of a tensor without elements.

    Returns an empty context, `[batch, tokens, 0]`, or, if the module applies the output projection itself, its result, `[batch,
    tokens, hidden]`; and attention weights `[batch, 0, tokens, keys]` if eager attention would return them.
    """

    config: Any = None
    spec: AttentionSpec

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor | None]:
        batch, tokens = hidden_states.shape[:2]
        given = [kwargs.get(name) for name in ("encoder_hidden_states", "key_value_states")]
        others = next((states for states in given if states is not None), None)
        keys = tokens if others is None else others.shape[1]
        cache = next((kwargs[name] for name in ("past_key_values", "layer_past") if name in kwargs), None)
        if cache is not None:
            keys = self.note_length(cache, hidden_states.new_zeros(batch, 1, keys, 1), crosses=others is not None)
        output = hidden_states.new_zeros(batch, tokens, 0)
        inside = f"{self.spec.module}."
        if self.spec.output.path.startswith(inside):
            for name in (self.spec.output.path.removeprefix(inside), *self.spec.after):
                output = getattr(self, name)(output)
        if self.spec.adds_residual:
            output = output + args[0]
        if self.spec.residual_norm:
            output = getattr(self, self.spec.residual_norm)(hidden_states + output)
        eager = self.config is None or self.config._attn_implementation == "eager"
        weights = hidden_states.new_zeros(batch, 0, tokens, keys) if eager else None
        return output if self.spec.returns_tensor else (output, weights)

    def note_length(self, cache: Any, states: Tensor, crosses: bool) -> int:
        """Add as many positions to the cache as if there were a head, and return how many it has now.

        The model reads the length of the past from the cache, which treats a layer without elements as empty.

        Args:
            cache: the model's cache, for self-attention or for both kinds.
            states: a placeholder for keys and values, `[batch, 1, keys, 1]`.
            crosses: whether this is cross-attention, whose keys are added once.
        """
        place = vars(self).get("layer_idx", vars(self).get("layer_id"))
        if not crosses:
            return int(getattr(cache, "self_attention_cache", cache).update(states, states, place)[0].shape[2])
        if hasattr(cache, "cross_attention_cache") and not cache.is_updated.get(place):
            cache.cross_attention_cache.update(states, states, place)
            cache.is_updated[place] = True
        return states.shape[2]


class OwnHeads(Adapted):
    """The `forward` of an attention module that receives a position bias for every stock head and selects that of its own."""

    own_heads: list[int]
    spec: AttentionSpec

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Any = None, **kwargs: Any) -> Any:
        stock: Any = super()
        if position_bias is None and getattr(self, "has_relative_attention_bias", False):
            position_bias = self.every_bias(hidden_states, mask, kwargs.get("past_key_values"))
        own = None if position_bias is None else position_bias[:, self.own_heads]
        output, *others = stock.forward(hidden_states, mask, position_bias=own, **kwargs)
        return (output, position_bias, others[-1]) if self.spec.position_bias == "passed on" else (output, *others)

    def every_bias(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> Any:
        """The bias that T5's first layer computes for all heads of the stock model, `[1, heads, tokens, keys]`."""
        module: Any = self
        tokens = hidden_states.shape[1]
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        keys = past + tokens if mask is None else mask.shape[-1]
        return module.compute_bias(tokens, keys, device=hidden_states.device, past_seen_tokens=past)


class OwnBiases(Adapted):
    """The `forward` of an attention module that receives biases for every stock head by name and selects those of its own."""

    own_heads: list[int]
    spec: AttentionSpec

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        for name, dim in self.spec.position_arguments.items():
            if (bias := kwargs.get(name)) is not None:
                every = bias if dim else bias.unflatten(0, (len(hidden_states), -1))
                own = every.index_select(dim or 1, torch.tensor(self.own_heads, dtype=torch.long, device=bias.device))
                kwargs[name] = own if dim else own.flatten(0, 1)
        return stock.forward(hidden_states, *args, **kwargs)


class StockMean(Adapted):
    """The `forward` of an RMSNorm over all heads of which some are gone: those were zero, and still count in the mean."""

    stock_width: int
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        stock: Any = super()
        factor = (self.stock_width / len(self.weight)) ** 0.5
        output: Tensor = stock.forward(hidden_states / factor) * factor
        return output


class OwnConfig(Adapted):
    """A module that reads the number of heads from its config, and finds its own there; all else is that of the model's."""

    spec: AttentionSpec

    @property
    def config(self) -> Any:
        names = [name.removeprefix("config.") for name in self.spec.sizes if name.startswith("config.")]
        return ConfigOf(vars(self)["config"], {name: vars(self)[name] for name in names})

    @config.setter
    def config(self, config: Any) -> None:
        vars(self)["config"] = config


class ConfigOf:
    """A config as a module sees it that has some sizes of its own."""

    def __init__(self, config: Any, sizes: dict[str, int]) -> None:
        self.stock, self.sizes = config, sizes

    def __getattr__(self, name: str) -> Any:
        return self.sizes[name] if name in self.sizes else getattr(self.stock, name)
