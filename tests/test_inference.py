"""Specs are inferred where there is no record, and proven before they are believed: right ones pass, wrong ones do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import condensing
import models
import peft
import pytest
import reloading
import torch
from helpers import prune_at_once
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SplinterConfig, SplinterModel
from transformers.modeling_outputs import BaseModelOutput

import hf_prune.model
from hf_prune import PruningConfig, PruningRule, condense, sparsity_report
from hf_prune.condense.infer import infer_architecture
from hf_prune.condense.layers import depths
from hf_prune.condense.prove import ArchitectureError, prove_architecture
from hf_prune.model import SPECS, ArchitectureSpec, Part, blocks, find_blocks
from hf_prune.model.blocks import outlines
from hf_prune.model.families import INFERRED, remember
from hf_prune.model.spelled import as_json, as_source, from_json


def with_block(spec: ArchitectureSpec, kind: str, **changes: Any) -> ArchitectureSpec:
    """A spec with other fields in the first of its `attentions` or `feed_forwards`."""
    first, *others = getattr(spec, kind)
    return replace(spec, **{kind: (replace(first, **changes), *others)})


def swapped(spec: ArchitectureSpec, kind: str, one: str, other: str) -> ArchitectureSpec:
    """A spec with two roles of its first block exchanged."""
    first = getattr(spec, kind)[0]
    return with_block(spec, kind, **{one: getattr(first, other), other: getattr(first, one)})


def parts(path: str, *order: int, interleaved: bool = False) -> dict[str, Part]:
    """Query, key and value in a packed projection, in this order."""
    return {role: Part(path, index, 3, interleaved) for role, index in zip(("query", "key", "value"), order)}


def model_and_spec(family: str) -> tuple[PreTrainedModel, ArchitectureSpec]:
    more: dict[str, object] = {"num_attention_heads": 8} if family == "bert-narrow" else {}  # as many as twice the width of one
    more |= {"attention_bias": True} if family == "gemma2-biased" else {}  # what a layer without heads still adds
    model = models.tiny(family.partition("-")[0] if more else family, models.GENERATORS.get(family), **more)
    return model, SPECS[model.config.model_type]


def bert(spec: ArchitectureSpec, **changes: Any) -> ArchitectureSpec:
    return with_block(spec, "attentions", **changes)


#: What is wrong → the family, and its spec made wrong.
WRONG: dict[str, tuple[str, Any]] = {
    "key and value swapped under grouped queries": ("llama", lambda spec: swapped(spec, "attentions", "key", "value")),
    "query and value swapped, with a value bias": ("bert", lambda spec: swapped(spec, "attentions", "query", "value")),
    "key and value swapped, with a value bias": ("bert", lambda spec: swapped(spec, "attentions", "key", "value")),
    "query and key swapped under grouped queries": ("llama", lambda spec: swapped(spec, "attentions", "query", "key")),
    "packed parts shifted": ("gpt2", lambda spec: bert(spec, **parts("attn.c_attn", 1, 2, 0))),
    "packed parts thought interleaved": ("gpt2", lambda spec: bert(spec, **parts("attn.c_attn", 0, 1, 2, interleaved=True))),
    "interleaved parts thought packed": ("gpt_neox", lambda spec: bert(spec, **parts("attention.query_key_value", 0, 1, 2))),
    "interleaved parts shifted": (
        "gpt_neox",
        lambda spec: bert(spec, **parts("attention.query_key_value", 2, 0, 1, interleaved=True)),
    ),
    "twice the heads, half as wide": ("bert", lambda spec: bert(spec, head_size="num_attention_heads", sizes={})),
    "half the heads, twice as wide": ("bert-narrow", lambda spec: bert(spec, head_size="num_attention_heads", sizes={})),
    "the width is not updated": ("gpt2", lambda spec: bert(spec, sizes={"num_heads": "heads"})),
    "the size of groups is not updated": ("llama", lambda spec: bert(spec, sizes={})),
    "the size of groups taken for the number of heads": (
        "llama",
        lambda spec: bert(spec, sizes={"num_key_value_groups": "heads"}),
    ),
    "no norm after the output": ("albert", lambda spec: bert(spec, residual_norm="")),
    "a norm that adds its input, though it does not": ("gpt2", lambda spec: bert(spec, after=(), residual_norm="resid_dropout")),
    "no norm over the queries and keys of all heads": ("olmo2", lambda spec: bert(spec, by_head=())),
    "no table with a column for every head": ("swin", lambda spec: bert(spec, by_head=())),
    "two missing readers": ("deberta-v2", lambda spec: bert(spec, extra=())),
    "one missing reader": ("deberta-v2", lambda spec: bert(spec, extra=spec.attentions[0].extra[:1])),
    "missing readers that the pass does not call": ("luke", lambda spec: bert(spec, extra=())),
    "no position bias": ("t5", lambda spec: bert(spec, position_bias="")),
    "a position bias that is not passed on": ("t5", lambda spec: bert(spec, position_bias="taken")),
    "a shared position bias left out": ("mpnet", lambda spec: bert(spec, position_bias="")),
    "another output projection": ("bert", lambda spec: bert(spec, output=Part("output.dense"))),
    "gate and up swapped, with biases": ("llama-with-biases", lambda spec: swapped(spec, "feed_forwards", "up", "gate")),
    "a gate left out": ("llama", lambda spec: with_block(spec, "feed_forwards", gate=None)),
    "another activation": ("bert", lambda spec: with_block(spec, "feed_forwards", activation="output.dropout")),
    "another module taken for the neurons": (
        "bert",
        lambda spec: with_block(spec, "feed_forwards", up=Part("attention.output.dense")),
    ),
    "no scale of what a block adds": ("dinov2", lambda spec: bert(spec, scale="")),
    "the scale of another block": ("dinov2", lambda spec: bert(spec, scale="layer_scale2.lambda1")),
    "no norms of what blocks add": (
        "gemma2-biased",
        lambda spec: with_block(bert(spec, norm=""), "feed_forwards", norm=""),
    ),
    "no biases by name": ("mpt", lambda spec: bert(spec, position_bias="", position_arguments={}, forwards=())),
    "one of two biases by name": ("layoutlmv3", lambda spec: bert(spec, position_arguments={"rel_pos": -3})),
    "a stream that is not added": ("bloom", lambda spec: bert(spec, adds_residual=False)),
    "post-norm layers thought to only add": ("bert", lambda spec: replace(spec, pre_norm=True)),
    "another attribute for the number of layers": ("vit", lambda spec: replace(spec, depths=("patch_size",))),
    "another attribute for the number of neurons": (
        "bert",
        lambda spec: replace(spec, widths=({"intermediate_size": "max_position_embeddings"},)),
    ),
    "another attribute for the number of heads": ("bert", lambda spec: replace(spec, heads=("num_hidden_layers",))),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_is_refused(what: str) -> None:
    family, make_wrong = WRONG[what]
    model, spec = model_and_spec(family)
    with pytest.raises(ArchitectureError):
        prove_architecture(model, make_wrong(spec))


def some(*names: str) -> list[Any]:
    """All families; those but some are slow."""
    return [family if family in names else pytest.param(family, marks=pytest.mark.slow) for family in models.EVERY_FAMILY]


@pytest.mark.parametrize("family", some("llama"))
def test_a_right_spec_is_proven(family: str) -> None:
    prove_architecture(*model_and_spec(family))


#: LUKE has projections that a batch of words does not call; of the others it cannot be seen that heads stay.
REFUSED = ("luke", "nystromformer", "deberta", "wavlm", "led", "gpt_neox_japanese", "deepseek_v2", "deepseek_v3")
#: Adapters of languages are found, too, which are no neurons by the record.
OTHERWISE = ("xmod",)


@pytest.mark.parametrize("family", some("bert", "gpt2", "llama", "modernbert", "t5", "beit", "bloom"))
def test_a_family_without_a_record_is_inferred(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it is found again, under names that nobody knows, and the model stays as it is."""
    known = SPECS[models.EVERY_FAMILY[family]().model_type]
    for name in list(SPECS):
        monkeypatch.delitem(SPECS, name)
    with models.disguised(family) as model:
        before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        model.train()
        if family in REFUSED:
            with pytest.raises(ArchitectureError):
                infer_architecture(model)
            return
        spec = infer_architecture(model)
        assert not SPECS
        assert model.training
        assert torch.get_rng_state().equal(state)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert getattr(model.config, "hf_prune", None) is None
        if family in OTHERWISE:
            return
        found, wanted, removable = blocks(model, spec), blocks(model, known), depths(model, known)
    assert outlines(found) == outlines(wanted)
    assert [(block.kind, block.num_units, block.unit_width) for block in found] == [
        (block.kind, block.num_units, block.unit_width) for block in wanted
    ]
    assert spec.pre_norm == bool(removable)


def halve(model: Any) -> None:
    """Mask half of the heads and neurons of a model."""
    rules = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]
    prune_at_once(model, PruningConfig(rules=rules, criterion="magnitude", schedule="constant"))


@pytest.fixture
def forgetting() -> Iterator[None]:
    """What was inferred in a test is forgotten after it."""
    known = dict(SPECS)
    yield
    SPECS.clear()
    SPECS.update(known)
    INFERRED.clear()


def splinter() -> PreTrainedModel:
    """A model of a family of transformers that has no record."""
    assert "splinter" not in SPECS
    torch.manual_seed(0)
    return models.randomize(SplinterModel(SplinterConfig(**models._bert_like()))).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_pruning_and_condensing_infer_what_they_do_not_know(
    adapted: bool, forgetting: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = splinter()
    model: Any = whole
    if adapted:
        settings = peft.LoraConfig(target_modules=["query", "value", "intermediate.dense"], init_lora_weights=False)
        model = peft.get_peft_model(whole, settings).eval()
    halve(model)
    assert [record.levelname for record in caplog.records if "it inferred this one" in record.message] == ["WARNING"]
    assert "register_architecture(ArchitectureSpec" in caplog.text
    before, parameters = condensing.outputs(whole), model.num_parameters()
    condense(model)
    assert model.num_parameters() < parameters
    assert condensing.gap(before, condensing.outputs(whole)) <= 1e-5
    whole = model.unload() if adapted else whole
    before = condensing.outputs(whole)
    whole.save_pretrained(tmp_path)
    SPECS.pop("splinter")
    INFERRED.clear()
    loaded = SplinterModel.from_pretrained(tmp_path)
    assert condensing.gap(before, condensing.outputs(loaded)) <= 1e-5
    models.zero_units(find_blocks(loaded)[1], [0], "out")
    condense(loaded)
    assert caplog.text.count("it inferred this one") == 1  # what a checkpoint carries is believed


@pytest.mark.slow
def test_a_checkpoint_carries_what_was_inferred(forgetting: None, tmp_path: Path) -> None:
    """Fresh processes load it, with hf_prune, and by remote code without."""
    model, name = splinter(), "splinter-AutoModel"
    halve(model)
    condense(model).save_pretrained(tmp_path / "first" / name)
    reloading.save_expected(model, tmp_path / "first" / name)
    assert reloading.reload("import", tmp_path / "first", tmp_path / "by-import")[name]["gap"] <= 1e-5
    assert reloading.reload("remote", tmp_path / "by-import", tmp_path / "by-remote")[name]["gap"] <= 1e-5
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "by-import" / name / file).read_bytes() == (tmp_path / "first" / name / file).read_bytes()


#: A model with code of its own: queries, keys and values packed for each group of heads, names that tell nothing.
REMOTE = """
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class Settings(PreTrainedConfig):
    model_type = "somebodys"
    def __init__(self, vocab_size=60, hidden_size=32, a=4, b=2, c=24, d=3, **kwargs):
        self.vocab_size, self.hidden_size, self.a, self.b, self.c, self.d = vocab_size, hidden_size, a, b, c, d
        super().__init__(**kwargs)

class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.p, self.q, self.r = config.a, config.b, config.hidden_size // config.a
        self.x = nn.Linear(config.hidden_size, (self.p + 2 * self.q) * self.r)
        self.y = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        rows, tokens, _ = hidden_states.shape
        packed = self.x(hidden_states).view(rows, tokens, self.q, -1, self.r).permute(0, 2, 3, 1, 4)
        query = packed[:, :, :-2].flatten(1, 2)
        key, value = (packed[:, :, [at]].expand(-1, -1, query.shape[1] // self.q, -1, -1).flatten(1, 2) for at in (-2, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.y(mixed.transpose(1, 2).reshape(rows, tokens, -1)), None

class Step(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n, self.m = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.f, self.g, self.s = Mixer(config), nn.Linear(config.hidden_size, 2 * config.c), nn.SiLU()
        self.h = nn.Linear(config.c, config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.f(self.n(hidden_states))[0]
        gate, up = self.g(self.m(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.h(self.s(gate) * up)

class Somebodys(PreTrainedModel):
    config_class = Settings
    _supports_sdpa = True
    def __init__(self, config):
        super().__init__(config)
        self.e, self.z = nn.Embedding(config.vocab_size, config.hidden_size), nn.ModuleList(Step(config) for _ in range(config.d))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        states = [self.e(input_ids)]
        for step in self.z:
            states.append(step(states[-1]))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))
"""


def test_a_model_with_code_of_its_own(forgetting: None, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "somebodys.py").write_text(REMOTE)
    code = {"AutoConfig": "somebodys.Settings", "AutoModel": "somebodys.Somebodys"}
    (tmp_path / "first" / "config.json").write_text(json.dumps({"model_type": "somebodys", "auto_map": code}))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tmp_path / "first", trust_remote_code=True)
    model = models.randomize(AutoModel.from_config(config, trust_remote_code=True)).eval()
    halve(model)
    before, ids = model.num_parameters(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = model(ids).hidden_states
        condense(model)
        assert model.num_parameters() < before
        assert condensing.gap(list(wanted), list(model(ids).hidden_states)) <= 1e-5
        models.empty_layers(model, {1})
        wanted = model(ids).hidden_states
        condense(model)
        assert len(model.z) == 2
        wanted = [wanted[0], *wanted[2:]]
        assert condensing.gap(wanted, list(model(ids).hidden_states)) <= 1e-5
        models.zero_units(find_blocks(model)[1], [0], "out")
        wanted = list(model(ids).hidden_states)
        condense(model)  # no config could build a stand-in of what it is now, and none is needed
        assert condensing.gap(wanted, list(model(ids).hidden_states)) <= 1e-5
        model.save_pretrained(tmp_path / "second")
        SPECS.pop("somebodys")
        INFERRED.clear()
        loaded = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True)
        assert condensing.gap(wanted, list(loaded(ids).hidden_states)) <= 1e-5
        models.zero_units(find_blocks(loaded)[1], [0], "out")
        condense(loaded)


def test_a_report_says_what_it_does_not_count(forgetting: None) -> None:
    model = splinter()
    report = sparsity_report(model)
    assert not report.blocks
    assert report.no_record is not None
    assert report.no_record in " ".join(str(report).split())
    assert "no record of splinter" in report.to_dict()["no_record"]
    remember(infer_architecture(model), "splinter")
    report = sparsity_report(model)
    assert (len(report.blocks), report.no_record) == (6, None)


def test_another_config_of_a_family_is_inferred_again(forgetting: None) -> None:
    for name in ("falcon", "falcon-multihead"):
        SPECS.pop("falcon") if name == "falcon" else None
        model = models.tiny(name)
        halve(model)
        assert {block.num_units for block in find_blocks(model) if block.kind == "attention"} == {4}
        before = condensing.outputs(model)
        assert condensing.gap(before, condensing.outputs(condense(model))) <= 1e-5


def test_what_cannot_be_proven_is_refused_with_where_it_failed(forgetting: None) -> None:
    """Neurons whose activation is no module cannot be described; attention alone would be, but has none here."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states + self.down(nn.functional.gelu(self.up(hidden_states)).flip(-1))

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.embeddings, self.layers = nn.Embedding(99, 32), nn.ModuleList(Layer() for _ in range(2))
            self.post_init()

        def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutput:
            hidden_states = self.embeddings(input_ids)
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return BaseModelOutput(last_hidden_state=hidden_states)

    model = Model(PreTrainedConfig(vocab_size=99, hidden_size=32))
    with pytest.raises(
        ValueError, match=r"no record of model_type=.*could not infer.*layers: no linear module.*register_architecture"
    ):
        condense(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, r"\['architecture'\] has an unknown key 'layer'; .*Did you mean 'layers'\?"),
        ({"layers": "x"}, r"\['architecture'\]\['layers'\] is 'x'"),
        ({"pre_norm": 1}, r"\['pre_norm'\] is 1; allowed: bool"),
        ({"attentions": [{"module": "a"}]}, r"\['attentions'\]\[0\] is .* it needs module, query, key, value, output"),
    ],
)
def test_a_spec_in_a_config_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(as_json(SPECS["bert"]) | change)


@pytest.mark.parametrize("model_type", SPECS)
def test_a_spec_in_writing_is_the_spec(model_type: str) -> None:
    spec = SPECS[model_type]
    assert from_json(json.loads(json.dumps(as_json(spec)))) == spec
    assert eval(as_source(spec), vars(hf_prune.model)) == spec
