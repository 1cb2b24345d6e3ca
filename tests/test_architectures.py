"""Specs find what they name, and a family of one's own takes a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import prune_at_once
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_prune import PruningConfig, PruningRule, condense
from hf_prune.model import (
    SPECS,
    ArchitectureSpec,
    AttentionBlock,
    AttentionSpec,
    FeedForwardSpec,
    Part,
    find_blocks,
    register_architecture,
)


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, vocab_size: int = 30, hidden_size: int = 16, num_heads: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_heads = vocab_size, hidden_size, num_heads


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.heads, self.head_dim = config, config.num_heads, config.hidden_size // config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:2], self.heads, self.head_dim)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.o(context.transpose(1, 2).flatten(2)), None


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.attention, self.act = ToyAttention(config), nn.GELU()
        self.up, self.down = nn.Linear(config.hidden_size, 24), nn.Linear(24, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention(hidden_states)[0]
        return hidden_states + self.down(self.act(self.up(hidden_states)))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    _supports_sdpa = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutput:
        hidden_states = [self.embeddings(input_ids)]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1]))
        return BaseModelOutput(last_hidden_state=hidden_states[-1], hidden_states=tuple(hidden_states))


@pytest.fixture
def toy() -> Iterator[ArchitectureSpec]:
    spec = ArchitectureSpec(
        model_types=("toy",),
        layers=("layers",),
        attentions=(
            AttentionSpec(
                module="attention",
                query=Part("attention.q"),
                key=Part("attention.k"),
                value=Part("attention.v"),
                output=Part("attention.o"),
                sizes={"heads": "heads"},
            ),
        ),
        feed_forwards=(FeedForwardSpec(up=Part("up"), down=Part("down"), activation="act"),),
    )
    yield spec
    SPECS.pop("toy", None)


def test_a_family_of_ones_own(toy: ArchitectureSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.randomize(ToyModel(ToyConfig())).eval()
    with pytest.raises(ValueError, match=r"model_type='toy' has no architecture spec.*register_architecture"):
        condense(model)
    register_architecture(toy)
    config = PruningConfig(
        rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")], criterion="magnitude", schedule="constant"
    )
    prune_at_once(model, config)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids)[0]
        condense(model)
        assert float((model(ids)[0] - before).abs().max()) <= 1e-5
        assert model.num_parameters() < ToyModel(ToyConfig()).num_parameters()
        model.save_pretrained(tmp_path)
        assert ToyModel.from_pretrained(tmp_path)(ids)[0].equal(model(ids)[0])


def test_a_spec_that_leaves_something_out_is_found_out(toy: ArchitectureSpec) -> None:
    register_architecture(replace(toy, attentions=(replace(toy.attentions[0], sizes={}),)))
    model = models.randomize(ToyModel(ToyConfig())).eval()
    models.zero_units(find_blocks(model)[0], [1], "out")
    with pytest.raises(RuntimeError):
        condense(model)
    assert model.layers[0].attention.q.weight.shape == (16, 16)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_specs_find_every_block(family: str) -> None:
    found = find_blocks(models.tiny(family, "bare"))
    layers = {block.layer for block in found}
    attentions = [block for block in found if isinstance(block, AttentionBlock)]
    cross = sum("encoder_attn" in block.name or "EncDec" in block.name for block in attentions)
    assert len(layers) == {"albert": 2, "bart": 6, "t5": 6, "t5-gated": 6, "whisper": 6}.get(family, 3)
    assert len(attentions) - cross == len(found) - len(attentions) == len(layers)
    assert cross == (3 if len(layers) == 6 else 0)
    assert {block.num_neurons for block in found if not isinstance(block, AttentionBlock)} == {40}
    assert {block.head_size for block in attentions} == {8}
