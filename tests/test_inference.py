"""Specs are inferred where there is no record, and proven before they are believed: right ones pass, wrong ones do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from transformers import PreTrainedModel

from hf_prune.condense.infer import infer_architecture
from hf_prune.condense.layers import depths
from hf_prune.condense.prove import ArchitectureError, prove_architecture
from hf_prune.model import SPECS, ArchitectureSpec, Part, blocks
from hf_prune.model.blocks import outlines


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
    more = {"num_attention_heads": 8} if family == "bert-narrow" else {}  # as many heads as twice the width of one
    model = models.tiny(family.removesuffix("-narrow"), models.GENERATORS.get(family), **more)
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
    "two missing readers": ("deberta-v2", lambda spec: bert(spec, extra=())),
    "one missing reader": ("deberta-v2", lambda spec: bert(spec, extra=spec.attentions[0].extra[:1])),
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


#: The families that are tried every time; the others are slow.
FEW = ("gpt2", "llama", "t5")
FAMILIES = [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in models.EVERY_FAMILY]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_spec_is_proven(family: str) -> None:
    prove_architecture(*model_and_spec(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_a_record_is_inferred(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it is found again, under names that nobody knows, and the model stays as it is."""
    known = SPECS[models.EVERY_FAMILY[family]().model_type]
    for name in list(SPECS):
        monkeypatch.delitem(SPECS, name)
    with models.disguised(family) as model:
        before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        model.train()
        spec = infer_architecture(model)
        assert not SPECS
        assert model.training
        assert torch.get_rng_state().equal(state)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert getattr(model.config, "hf_prune", None) is None
        found, wanted, removable = blocks(model, spec), blocks(model, known), depths(model, known)
    assert outlines(found) == outlines(wanted)
    assert [(block.kind, block.num_units, block.unit_width) for block in found] == [
        (block.kind, block.num_units, block.unit_width) for block in wanted
    ]
    assert spec.pre_norm == bool(removable)
