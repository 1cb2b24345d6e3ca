"""Specs find what they name, and a family of one's own takes a few lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import condensing
import models
import peft
import pytest
import torch
from helpers import prune_at_once
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GPTNeoXForCausalLM, PreTrainedConfig, PreTrainedModel, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from hf_prune import ConfigError, Pruner, PruningConfig, PruningRule, condense, latency_table, prune, shrink_depth, shrink_hidden
from hf_prune.model import (
    SPECS,
    ArchitectureSpec,
    AttentionSpec,
    FeedForwardSpec,
    Part,
    find_blocks,
    register_architecture,
)
from hf_prune.model.blocks import layer_lists
from hf_prune.model.families import INFERRED
from hf_prune.model.families.refused import HEADS_STAY, REFUSED
from hf_prune.pruning.patterns import build_groups
from hf_prune.settings.patterns import parse_pattern


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
        find_blocks(model)
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


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_specs_find_every_block(family: str) -> None:
    found = find_blocks(models.tiny(family, "bare"))
    layers = {block.layer for block in found}
    attentions = [block for block in found if block.kind == "attention"]
    cross = sum("encoder_attn" in block.name or "EncDec" in block.name for block in attentions)
    stacks = (
        2 if len({name.partition(".")[0] for name in layers} & {"encoder", "decoder", "text_model", "vision_model"}) == 2 else 1
    )
    if family in models.HEADS_STAY:
        assert not attentions
        assert len(layers) == 3 * stacks
        return
    assert len(layers) == (2 if family == "albert" else 3 * stacks)
    assert len(attentions) - cross == len(layers)
    plain = len(layers) * {"mobilebert": 4, "wav2vec2-conformer": 2}.get(family, family not in models.ATTENTION_ALONE)
    plain = 1 if family == "qwen3_moe" else plain  # the others have experts
    assert len(found) - len(attentions) == plain
    assert cross == (3 if any(name.startswith("decoder") for name in layers) and stacks == 2 else 0)
    neurons = {"bloom": {128}, "swin": {40, 80}, "swinv2": {40, 80}, "mpt": {128}, "dinov2": {64}, "dinov2_with_registers": {64}}
    neurons |= {"qwen2_moe": {16}, "ernie4_5_moe": {32}, "glm4_moe": {16}, "dots1": {16}}
    assert {block.num_units for block in found if block.kind == "feed_forward"} == neurons.get(family, {40} if plain else set())
    assert {block.unit_width for block in attentions} == {8}


def test_every_record_has_a_row_and_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[1] / "docs/guides/condense.md").read_text()
    rows = {config().model_type for config in models.EVERY_FAMILY.values()}
    assert rows == SPECS.keys() - INFERRED.keys() - {"toy"}
    listed = set(re.findall(r"[\w-]+", guide[guide.index("## Families") :]))
    assert [name for name in (*rows, *REFUSED) if name not in listed] == []
    assert not rows & REFUSED.keys()
    assert [name for name in (*REFUSED, *HEADS_STAY) if name not in CONFIG_MAPPING] == []
    written = " ".join(guide.split())
    assert [reason for reason in {*REFUSED.values(), *HEADS_STAY.values()} if f"| {reason} |" not in written] == []


def test_why_heads_stay_is_said() -> None:
    with pytest.raises(ConfigError, match="has heads that its record does not describe"):
        shrink_hidden(models.tiny("wavlm"), 24)
    with pytest.raises(
        ConfigError, match=r"pattern='head': finds nothing to prune \(each head scales its position bias by its own"
    ):
        Pruner(models.tiny("wavlm"), PruningConfig(pattern="head", criterion="magnitude"), 1)


@pytest.fixture
def neox() -> PreTrainedModel:
    """A model whose projection has query, key and value of each head side by side."""
    return models.tiny("gpt_neox", "causal-lm")


@pytest.mark.parametrize("pattern", ["head", "auto", "block"])
def test_masks_of_interleaved_projections(neox: PreTrainedModel, pattern: str) -> None:
    attention = find_blocks(neox)[0]
    assert [part.rows[:9].tolist() for part in attention.inputs] == [[*range(start, start + 8), start + 24] for start in (0, 8, 16)]
    module = neox.gpt_neox.layers[0].attention.query_key_value
    groups, _ = build_groups(parse_pattern(pattern), [], [attention])
    kept = torch.ones(groups[0].num_units, dtype=torch.bool)
    kept[-1] = False
    groups[0].apply(kept)
    zeros = (module.weight == 0).all(1).nonzero().flatten().tolist()
    if pattern == "auto":  # a tile of the query: rows of the last head, the last eight columns
        assert (module.weight == 0).nonzero().tolist() == [[row, column] for row in range(72, 80) for column in range(24, 32)]
    else:
        assert zeros == (module.bias == 0).nonzero().flatten().tolist() == list(range(0 if pattern == "block" else 72, 96))


@pytest.mark.parametrize("adapted", [False, True])
def test_interleaved_projections_are_cut(neox: PreTrainedModel, adapted: bool, tmp_path: Path) -> None:
    model: Any = neox
    if adapted:
        settings = peft.LoraConfig(target_modules=["query_key_value", "dense"], init_lora_weights=False)
        model = peft.get_peft_model(neox, settings).eval()
    config = PruningConfig(
        rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")], criterion="magnitude", schedule="constant"
    )
    prune_at_once(model, config)
    before = condensing.outputs(neox)
    parameters = model.num_parameters()
    condense(model)
    assert {block.num_units for block in find_blocks(model) if block.kind == "attention"} < {0, 1, 2, 3, 4}
    assert model.num_parameters() < parameters
    assert condensing.gap(before, condensing.outputs(neox)) <= 1e-5
    if not adapted:
        neox.save_pretrained(tmp_path)
        assert condensing.gap(before, condensing.outputs(GPTNeoXForCausalLM.from_pretrained(tmp_path))) <= 1e-5


def batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    return [models.ragged_batch(model, seed=seed) for seed in range(2)]


def narrower(model: PreTrainedModel) -> None:
    shrink_hidden(model, 24)


def narrower_by_data(model: PreTrainedModel) -> None:
    shrink_hidden(model, 24, batches(model))


def shallower(model: PreTrainedModel) -> None:
    lists = [path for path in SPECS[model.config.model_type].layers if layer_lists(model, path)]
    shrink_depth(model, dict.fromkeys(lists, 2) if len(lists) > 1 else 2, batches(model))


def pruned(model: PreTrainedModel) -> None:
    patterns = {"attention": "head", "feed_forward": "neuron"}
    rules = [PruningRule(pattern=patterns[kind]) for kind in dict.fromkeys(block.kind for block in find_blocks(model))]
    prune(model, PruningConfig(rules=rules, criterion="magnitude", target_sparsity=0.5), batches(model))
    parameters = model.num_parameters()
    assert condense(model).num_parameters() < parameters


def timed(model: PreTrainedModel) -> None:
    assert latency_table(model, batch_size=2, length=8, repeats=1).total > 0


@pytest.mark.parametrize("stage", [narrower, narrower_by_data, shallower, pruned, timed])
@pytest.mark.parametrize("family", models.MORE_FAMILIES)
def test_what_else_is_done_to_a_family_works_or_is_refused_in_words(
    family: str, stage: Callable[[PreTrainedModel], None], tmp_path: Path
) -> None:
    model = models.tiny(family)
    try:
        stage(model)
    except ConfigError:
        return
    batch = models.ragged_batch(model)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted, found = (one(**batch)[0] for one in (model, type(model).from_pretrained(tmp_path)))
    assert float((wanted - found).abs().max()) <= 1e-6


def changed(spec: ArchitectureSpec, block: str = "", **changes: Any) -> ArchitectureSpec:
    """A spec with other fields, or with other fields in one kind of its blocks."""
    return replace(spec, **{block: (replace(getattr(spec, block)[0], **changes), *getattr(spec, block)[1:])} if block else changes)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "list": ("bert", {"layers": ("encoder.layrs",)}, r"BertModel has no 'encoder.layrs'.*Did you mean 'encoder.layer'\?"),
    "list in a list": (
        "albert",
        {"layers": ("encoder.groups.*.albert_layers",)},
        r"Did you mean 'encoder.albert_layer_groups.\*.alb",
    ),
    "one of two lists": (
        "bart",
        {"layers": ("encoder.layers", "decodr.layers")},
        r"BartModel has no 'decodr.layers'.*'decoder.layers'\?",
    ),
    "no list": ("bert", {"layers": ("encoder",)}, r"BertModel has no 'encoder'.*'encoder.layer'\?"),
    "depth": ("vit", {"depths": ("num_layers",)}, r"ViTConfig has no 'num_layers'"),
    "attention": (
        "bert",
        {"block": "attentions", "module": "atention.self"},
        r"has no 'encoder.layer.\*.atention.self'.*'enc.*attention.self'\?",
    ),
    "feed-forward": (
        "bert",
        {"block": "feed_forwards", "up": Part("intermediate.dens")},
        r"has no 'encoder.*dens'.*intermediate.dense'\?",
    ),
    "self-attention beside another": (
        "bart",
        {"block": "attentions", "module": "self_atn"},
        r"BartModel has no 'encoder.*self_atn'.*'encoder.*self_attn'\?",
    ),
    "projection": (
        "bert",
        {"block": "attentions", "key": Part("attention.self.k")},
        r"BertModel has no 'attention.self.k'.*'attention.self.key'\?",
    ),
    "activation": ("bert", {"block": "feed_forwards", "activation": "intermediate.act"}, r"BertModel has no 'intermediate.act'"),
    "after": ("gpt2", {"block": "attentions", "after": ("dropout",)}, r"GPT2Model has no 'attn.dropout'.*'attn.attn_dropout'\?"),
    "head size": (
        "bert",
        {"block": "attentions", "head_size": "head_siz"},
        r"BertSelfAttention has no 'head_siz'.*'all_head_size'\?",
    ),
    "size": (
        "bert",
        {"block": "attentions", "sizes": {"num_heads": "heads"}},
        r"BertSelfAttention has no 'num_heads'.*num_attention_heads",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_record_names_and_the_model_lacks_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes, message = WRONG[name]
    model = models.tiny(family, "bare")
    monkeypatch.setitem(SPECS, family, changed(SPECS[family], **changes))
    with pytest.raises(ValueError, match=message):
        condense(model)


def test_attention_that_no_record_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional block may be missing, but not while the model has another that it might be: BART's decoder attends twice."""
    wrong = replace(SPECS["bart"].attentions[1], module="encoder_atn")
    monkeypatch.setitem(SPECS, "bart", replace(SPECS["bart"], attentions=(SPECS["bart"].attentions[0], wrong)))
    with pytest.raises(ValueError, match=r"BartModel has no 'encoder_atn'.*Did you mean 'encoder_attn'\?"):
        find_blocks(models.tiny("bart", "bare"))


def test_parts_of_a_family_have_the_blocks_they_have() -> None:
    encoder = T5EncoderModel(models.FAMILIES["t5"]())
    assert {block.layer.partition(".")[0] for block in find_blocks(encoder)} == {"encoder"}
    with pytest.raises(ValueError, match=r"T5Stack has no 'encoder.block'"):
        find_blocks(encoder.encoder)
