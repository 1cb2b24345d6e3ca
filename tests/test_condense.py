"""A condensed model computes what the masked one did, and nothing that still matters is ever removed."""

from __future__ import annotations

import copy
import inspect
import re
from operator import attrgetter
from pathlib import Path

import models
import pytest
import torch
import transformers
from condensing import check_generation, gap, gradient_gap, outputs
from helpers import prune_at_once
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel

from hf_prune import Pruner, PruningConfig, PruningRule, cli, condense, condense_plan
from hf_prune.condense import cutting, stock_config
from hf_prune.condense.layers import layer_counts
from hf_prune.condense.plan import plan_block, regroup
from hf_prune.model import ArchitectureSpec, FeedForwardSpec, Part, blocks, find_blocks, spec_for
from hf_prune.model.targets import weight_target
from hf_prune.shrink.depth import drop_layers
from hf_prune.training.recipe import Stage


def sizes(model: PreTrainedModel) -> dict[str, int]:
    return {block.name: block.num_units for block in find_blocks(model)}


def state_of(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Every parameter and its values. Who has a parameter, as an optimizer has, gets the model back with that very object."""
    return {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}


def check_condensed_equals_masked(family: str, head: str, seed: int) -> None:
    model = models.tiny(family, head, seed)
    left = models.prune_randomly(model, seed)
    before = {attention: outputs(model, attention) for attention in models.attentions_of(model)}
    removed = [f"{path}.{index}." for path, indices in condense_plan(model).removed.items() for index in indices]
    assert condense(model, verify=seed == 0) is model
    assert list(sizes(model).values()) == [size for name, size in left.items() if not any(layer in name for layer in removed)]
    assert 0 in left.values()
    for attention in before:
        assert len(before[attention]) > 2
        after = outputs(model, attention)
        # Where a layer went, its hidden states did too: see the tests of removal.
        assert gap(before[attention][: 1 if removed else None], after[: 1 if removed else None]) <= 1e-5


@pytest.mark.core
@pytest.mark.parametrize(("family", "head"), [(family, models.heads_of(family)[-1]) for family in models.EVERY_FAMILY])
def test_condensed_equals_masked(family: str, head: str) -> None:
    check_condensed_equals_masked(family, head, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "head"), models.MATRIX)
def test_condensed_equals_masked_everywhere(family: str, head: str, seed: int) -> None:
    check_condensed_equals_masked(family, head, seed)


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_modules_stay_true_to_their_size(family: str) -> None:
    model = models.tiny(family)
    parameters = model.num_parameters()
    plan = condense_plan(model)
    assert not plan.changed
    models.prune_randomly(model)
    plan = condense_plan(model)
    condense(model)
    assert model.num_parameters() == parameters - plan.parameters
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    for block in find_blocks(model):
        if block.kind == "attention":
            width = len(block.roles["query"].rows)
            wanted = {"heads": width // 8, "width": width, "groups": block.units_per_group, "key_value_heads": block.num_groups}
            assert all(attrgetter(name)(block.module) == wanted[meaning] for name, meaning in block.spec.sizes.items())
            assert wanted["width"] == weight_target("", block.output.module).shape[1]


def test_zeroed_by_hand() -> None:
    model = models.tiny("bert")
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.attention.self.value.weight[8:16] = 0
        layer.attention.output.dense.weight[:, 24:32] = -0.0
        layer.intermediate.dense.weight[7] = 0
        layer.output.dense.weight[:, 30:] = 0
    survivors = layer.attention.self.query.weight[[*range(8), *range(16, 24)]].clone()
    before = outputs(model)
    condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    assert layer.attention.self.query.weight.equal(survivors)
    assert model.config.hf_prune == {
        "version": 1,
        "layers": {
            "encoder.layer.1": {
                "attention.self": {"num_attention_heads": 2},
                "intermediate.dense": {"intermediate_size": 29},
            }
        },
    }
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 40)


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_what_only_looks_dead_stays(family: str) -> None:
    model = models.tiny(family)
    attentions = [block for block in find_blocks(model)[:1] if block.kind == "attention"]
    silenced = [block.roles["up"] for block in find_blocks(model)[:2] if block.kind == "feed_forward"]
    with torch.no_grad():
        for attention in attentions:
            models.zero_units(attention, [0, 1, 2, 3], "query")
            silenced.append(attention.roles["key"])
            key, value = (attention.roles[name] for name in ("key", "value"))
            for part, rows in ((key, key.rows), (value, value.rows[:7])):  # all rows of the head but one
                target = weight_target("", part.module)
                target.matrix(target.parameter)[rows] = 0
        for part in silenced:
            if part.module.bias is not None:
                part.module.bias[part.rows] = 0
        for block in find_blocks(model)[:2]:
            if block.kind == "feed_forward":
                down = weight_target("", block.output.module)
                down.matrix(down.parameter)[1:, 3] = 0  # all rows of the column but one
    state = state_of(model)
    assert not condense_plan(model).changed
    condense(model)
    assert not hasattr(model.config, "hf_prune")
    assert all(parameter is state[name][0] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_gradients_of_survivors_are_equal(family: str) -> None:
    assert gradient_gap(models.tiny(family)) <= 1e-5


def test_empty_blocks_train() -> None:
    model = models.tiny("distilbert")
    models.prune_randomly(model)
    condense(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {**models.ragged_batch(model), "labels": torch.tensor([0, 1, 1, 0])}
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_attentions_have_one_entry_a_layer() -> None:
    for recorded_before in (True, False):
        model = models.tiny("bert")
        model.set_attn_implementation("eager")
        batch = models.ragged_batch(model)
        if recorded_before:
            model(**batch, output_attentions=True)
        models.prune_randomly(model)
        left = condense_plan(model).to_dict()[::2]
        attentions = condense(model)(**batch, output_attentions=True).attentions
        assert [part.shape for part in attentions] == [(4, row["after"], 11, 11) for row in left]


def tiny_decoder(cross_attention: bool) -> PreTrainedModel:
    """A BERT decoder with nothing left of the first two blocks of its first layer (attention, then FFN or cross-attention)."""
    config = models.FAMILIES["bert"]()
    config.update({"is_decoder": True, "add_cross_attention": cross_attention, "eos_token_id": None})
    torch.manual_seed(0)
    model = models.randomize(transformers.BertLMHeadModel(config)).eval()
    for block in find_blocks(model)[:2]:
        units = block.num_units
        models.zero_units(block, list(range(units)), "in")
    return model


def test_decoder_with_an_empty_first_layer_generates_the_same() -> None:
    model = tiny_decoder(cross_attention=False)
    inputs = {"input_ids": torch.tensor([[7, 8, 9], [5, 6, 4]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **settings)
    after = condense(model).generate(**inputs, **settings)
    assert list(sizes(model).values())[:2] == [0, 0]
    assert before.sequences.equal(after.sequences)
    assert gap(list(before.logits), list(after.logits)) <= 1e-5


@pytest.mark.core
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", models.GENERATORS)
def test_generates_the_same_left_padded(family: str, beams: int) -> None:
    model = models.tiny(family, models.GENERATORS[family])
    models.prune_randomly(model)
    for block in find_blocks(model):
        if block.kind == "attention" and block.layer.endswith(".0"):
            models.zero_units(block, list(range(block.num_units)), "out")
    check_generation(model, family, beams)
    left = {block.num_units for block in find_blocks(model) if block.kind == "attention" and block.layer.endswith(".0")}
    assert left == (set() if family in models.NEURONS_ALONE else {0})


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_heads_keep_their_key_and_value_heads(groups: list[list[bool]]) -> None:
    dead = torch.tensor(groups)
    heads, key_values = regroup(dead.flatten(), 3)
    alive = (~dead.flatten()).nonzero().flatten().tolist()
    assert set(alive) <= set(heads.tolist())
    assert heads.tolist() == sorted(set(heads.tolist()))
    assert len(key_values) <= len(groups)
    assert len(heads) == models.heads_left(groups)
    if alive:
        share = len(heads) // len(key_values)
        assert key_values.repeat_interleave(share).tolist() == [head // 3 for head in heads.tolist()]


@pytest.mark.parametrize(
    ("alive", "sizes", "masked"),
    [
        ([0, 1, 2, 3, 4, 5], {"num_attention_heads": 6, "num_key_value_heads": 3}, 0),  # a whole group goes
        ([0, 3, 5, 6], {"num_attention_heads": 4, "num_key_value_heads": 4}, 0),  # one head of each group stays
        ([0, 1, 2, 4], {"num_attention_heads": 4, "num_key_value_heads": 4}, 0),  # one key and value head is doubled
        ([0, 1, 2, 4, 6], {}, 3),  # doubling would need five key and value heads where four were
        ([0, 1, 2, 3, 4], {"num_attention_heads": 6, "num_key_value_heads": 3}, 1),
        ([], {"num_attention_heads": 0, "num_key_value_heads": 0}, 0),
    ],
)
def test_grouped_queries(alive: list[int], sizes: dict[str, int], masked: int) -> None:
    model = models.tiny("llama", "causal-lm")
    block = find_blocks(model)[2]
    models.zero_units(block, [head for head in range(8) if head not in alive], "out")
    plan, before = condense_plan(model), outputs(model)
    assert plan.to_dict()[2]["masked"] == masked
    assert (f"({masked} of them dead, but their key and value heads are shared)" in str(plan)) == (masked > 0)
    condense(model)
    condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    assert getattr(model.config, "hf_prune", {"layers": {}})["layers"] == ({"layers.1": {"self_attn": sizes}} if sizes else {})
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
    assert cache.layers[1].keys.shape[1] == max(sizes.get("num_key_value_heads", 4), 1)  # one stands in for none


def test_a_bias_where_the_family_has_none() -> None:
    model = models.tiny("qwen2", "causal-lm")
    block = find_blocks(model)[0]
    models.zero_units(block, [1], "in")  # a key and value head, of two heads
    plan, parameters, before = condense_plan(model), model.num_parameters(), outputs(model)
    condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    assert model.num_parameters() == parameters - plan.parameters
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "output_bias": True}
    assert model.config.hf_prune["layers"] == {"layers.0": {"self_attn": sizes}}
    models.zero_units(find_blocks(model)[0], [0, 1], "out")
    before = outputs(model)
    condense(model)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "output_bias": True}
    assert model.config.hf_prune["layers"] == {"layers.0": {"self_attn": sizes}}
    assert gap(before, outputs(model)) <= 1e-5


def test_shared_position_bias_when_condensed_again() -> None:
    model = models.tiny("mpnet")
    models.zero_units(find_blocks(model)[0], [1], "in")
    condense(model)
    models.zero_units(find_blocks(model)[0], [1], "out")
    before = outputs(model)
    condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    assert model.config.hf_prune["layers"] == {"encoder.layer.0": {"attention.attn": {"num_attention_heads": 2, "heads": [0, 3]}}}


@pytest.mark.parametrize("pattern", ["head", "kv_group", "block"])
@pytest.mark.parametrize("family", ["gpt2", "modernbert", "albert", "bart", "t5-gated", "llama"])
def test_what_a_pruner_removes_goes(family: str, pattern: str) -> None:
    model = models.tiny(family)
    rules = [PruningRule(pattern=pattern)] + ([PruningRule(pattern="neuron")] if pattern != "block" else [])
    config = PruningConfig(criterion="magnitude", schedule="constant", scope="global", target_sparsity=0.5, rules=rules)
    prune_at_once(model, config)
    rows = condense_plan(model).to_dict()
    condense(model)
    if pattern == "block":
        assert any(row["after"] == 0 for row in rows)
        return
    for unit in ("heads", "neurons"):
        before, after, masked = (sum(row[key] for row in rows if row["unit"] == unit) for key in ("before", "after", "masked"))
        assert after - masked < 0.9 * before
        assert masked == 0 or (family, pattern) == ("llama", "head")


def test_cross_attention() -> None:
    model = tiny_decoder(cross_attention=True)
    inputs = {**models.ragged_batch(model), "encoder_hidden_states": torch.randn(4, 5, 32)}
    with torch.no_grad():
        before = model(**inputs).logits
        after = condense(model)(**inputs).logits
    assert list(sizes(model).values())[:3] == [0, 0, 40]
    assert gap([before], [after]) <= 1e-5
    assert model.config.hf_prune["layers"] == {
        "encoder.layer.0": {"attention.self": {"num_attention_heads": 0}, "crossattention.self": {"num_attention_heads": 0}}
    }


def test_condensing_again() -> None:
    model = models.tiny("roberta")
    models.zero_units(find_blocks(model)[0], [1], "in")
    models.zero_units(find_blocks(model)[3], [0, 5], "out")
    condense(model)
    first = copy.deepcopy(model.config.hf_prune)
    state = state_of(model)
    condense(model)
    assert model.config.hf_prune == first
    assert all(parameter is state[name][0] for name, parameter in model.named_parameters())
    models.zero_units(find_blocks(model)[0], [0, 1, 2], "in")
    models.zero_units(find_blocks(model)[4], [2], "out")
    before = outputs(model)
    condense(model)
    condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    assert model.config.hf_prune["layers"] == {
        "encoder.layer.0": {"attention.self": {"num_attention_heads": 0}},
        "encoder.layer.1": {"intermediate.dense": {"intermediate_size": 38}},
        "encoder.layer.2": {"attention.self": {"num_attention_heads": 3}},
    }


@pytest.mark.parametrize("fault", ["fold", "units"])
def test_failed_verification_leaves_the_model_untouched(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("bert").train()
    model.bert.encoder.layer[0].eval()
    model.bert.encoder.layer[2].attention.self.query.weight.requires_grad_(False)
    models.prune_randomly(model)
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    state, config = state_of(model), model.config.to_dict()
    if fault == "fold":
        fold = cutting.fold
        monkeypatch.setattr(cutting, "fold", lambda plan: None if plan.block.layer.endswith("2") else fold(plan))
    else:
        keep = cutting.keep_units
        monkeypatch.setattr(
            cutting, "keep_units", lambda block, units, *_, **__: keep(block, (units + 1) % 4 if len(units) == 3 else units)
        )
    with pytest.raises(RuntimeError, match=r"differs from the masked one by \d.*; allowed: 1.00e-05"):
        condense(model)
    assert model.config.to_dict() == config
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes
    for name, parameter in model.named_parameters():
        assert parameter is state[name][0]
        assert parameter.equal(state[name][1])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    monkeypatch.undo()
    before = outputs(model.eval())
    assert gap(before, outputs(condense(model))) <= 1e-5


def test_modes_flags_and_random_state_are_kept() -> None:
    model = models.tiny("electra").train()
    model.electra.encoder.layer[1].eval()
    model.set_attn_implementation("sdpa")
    for block in find_blocks(model)[:2]:
        for part in block.projections:
            part.module.weight.requires_grad_(False)
    models.prune_randomly(model)
    modes = [module.training for module in model.modules()]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    random = torch.get_rng_state()
    condense(model)
    assert torch.get_rng_state().equal(random)
    assert [module.training for module in model.modules()] == modes
    empty = {name for name, parameter in model.named_parameters() if parameter.numel() == 0}
    assert empty
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen | empty
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = models.tiny("bert").to(dtype)
    models.prune_randomly(model)
    before = outputs(model)
    condense(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert gap(before, outputs(model)) <= (1e-12 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps)


def test_copy_of_a_model_without_heads() -> None:
    model = models.tiny("distilbert")
    models.prune_randomly(model)
    twin = copy.deepcopy(condense(model))
    assert gap(outputs(model), outputs(twin)) == 0


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Softplus()])
def test_gated_neurons_go_only_when_constant(activation: nn.Module) -> None:
    """Neurons: 0 alive; 1 no up, no up bias; 2 no up; 3 no gate, no gate bias; 4 no gate; 5 neither; 6 no down."""
    torch.manual_seed(0)
    up, gate, down = nn.Linear(4, 7), nn.Linear(4, 7), nn.Linear(7, 4)
    with torch.no_grad():
        up.weight[[1, 2, 5]] = 0
        up.bias[1] = 0
        gate.weight[[3, 4, 5]] = 0
        gate.bias[3] = 0
        down.weight[:, 6] = 0
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"up": up, "gate": gate, "down": down, "act": activation})])
    gated = FeedForwardSpec(up=Part("up"), down=Part("down"), gate=Part("gate"), activation="act")
    (block,) = blocks(model, ArchitectureSpec(model_types=(), layers=("layers",), attentions=(), feed_forwards=(gated,)))
    with torch.no_grad():
        plan = plan_block(block, 1)
        inputs = torch.randn(5, 4)
        before = down(activation(gate(inputs)) * up(inputs))
        cutting.fold(plan)
        cutting.keep_units(plan.block, plan.kept)
        after = down(activation(gate(inputs)) * up(inputs))
    silu = isinstance(activation, nn.SiLU)  # 0 at 0, so that neuron 3 is a product with zero
    assert plan.dead.nonzero().flatten().tolist() == ([1, 3, 5, 6] if silu else [1, 5, 6])
    assert float((before - after).abs().max()) <= 1e-6


def test_plan_touches_nothing_and_prints() -> None:
    model = models.tiny("bert")
    left = models.prune_randomly(model)
    state = state_of(model)
    plan = condense_plan(model)
    assert [row["after"] for row in plan.to_dict()] == list(left.values())
    assert "encoder.layer.0.attention.self" in str(plan)
    assert "0 of 4 heads" in str(plan)
    assert all(parameter.equal(state[name][1]) for name, parameter in model.named_parameters())


def test_what_cannot_be_condensed() -> None:
    model = models.tiny("bert")
    pruner = Pruner(model, PruningConfig(pattern="head"), total_steps=2)
    with pytest.raises(RuntimeError, match=r"pruner\.finish\(\)"):
        condense(model)
    pruner.release()
    condense(model)

    with pytest.raises(TypeError, match="Linear; allowed: a transformers PreTrainedModel"):
        condense(nn.Linear(2, 2))

    with torch.device("meta"):
        empty = transformers.BertModel(models.FAMILIES["bert"]())
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.attention\.self\.query is on the meta device"):
        condense(empty)

    model = models.tiny("bert")
    model.bert.encoder.layer[2].intermediate.dense = nn.Bilinear(1, 1, 1)
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.intermediate\.dense is a Bilinear"):
        condense(model)

    mamba = transformers.MambaModel(transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"no record of model_type='mamba' \(it has no attention, and no neurons that single"):
        condense(mamba)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("part", ["attention.self.query", "attention.output.dense", "output.dense"])
def test_a_block_whose_weights_are_computed_is_left_out(part: str, tensor: str) -> None:
    model = models.tiny("bert")
    for block in find_blocks(model):
        models.zero_units(block, [0, 1], "in")
    layer = model.bert.encoder.layer[1].get_submodule(part)
    prune.l1_unstructured(layer, tensor, 0.5)
    batch = models.ragged_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
        rows = condense_plan(condense(model)).to_dict()
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-5)
    stayed = [row for row in rows if row["left_out"]]
    assert [row["before"] for row in stayed] == [40 if part == "output.dense" else 4]
    assert f"its {tensor} is not a parameter but computed from {tensor}_orig" in stayed[0]["left_out"]
    assert all(row["before"] in (2, 38) for row in rows if not row["left_out"])
    assert stayed[0]["left_out"] in str(condense_plan(model))


@pytest.mark.parametrize("multiple", [1, 4, 16, 64])
def test_neurons_are_padded_to_a_multiple(multiple: int) -> None:
    model = models.tiny("bert")
    alive = [17, 0, 33]
    neurons = [block for block in find_blocks(model) if block.kind == "feed_forward"]
    for block, count in zip(neurons, alive):
        models.zero_units(block, list(range(count, block.num_units)), "in")
    batch = models.ragged_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
        condense(model, pad_to_multiple_of=multiple)
        after = model(**batch).logits
    left = [block.num_units for block in find_blocks(model) if block.kind == "feed_forward"]
    assert left == [min(-(-count // multiple) * multiple, 40) for count in alive]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("multiple", [0, -8, 1.5, True, "8"])
def test_a_multiple_that_is_none(multiple: object) -> None:
    with pytest.raises(ValueError, match="pad_to_multiple_of="):
        condense_plan(models.tiny("bert"), multiple)  # type: ignore[arg-type]


def test_padding_is_none_unless_it_is_asked_for() -> None:
    for function in (condense, condense_plan, cli.condense, cli.inspect, Stage):
        assert inspect.signature(function).parameters["pad_to_multiple_of"].default is None
    root = Path(__file__).parents[1]
    files = [root / "README.md", *root.glob("scripts/**/*.py"), *root.glob("scripts/**/*.json"), *root.glob("hf_prune/**/*.py")]
    assert [file.name for file in files if re.search(r"pad_to_multiple_of\"?\s*[=:]\s*\d", file.read_text())] == []


def five_layers(family: str, head: str | None = None) -> PreTrainedModel:
    """A tiny model with five layers in each list."""
    config = models.EVERY_FAMILY[family]()
    names = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    changes: dict[str, object] = {name: 5 for name in names if hasattr(config, name)}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = (config.layer_types * 2)[:5]
    for tower in ("text_config", "vision_config"):
        if hasattr(config, tower):
            changes[tower] = getattr(config, tower)
            changes[tower].num_hidden_layers = 5  # type: ignore[attr-defined]
    if getattr(config, "stage_names", None):
        changes["stage_names"] = ["stem", *(f"stage{index}" for index in range(1, 6))]
    if getattr(config, "no_rope_layers", None):
        changes["no_rope_layers"] = (config.no_rope_layers * 2)[:5]
    return models.tiny(family, head, **changes)


def hidden_states(model: PreTrainedModel, attention: str) -> dict[str, tuple[Tensor, ...]]:
    """Every tuple of hidden states by its name, and what the model puts out first."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        seen = model(**models.ragged_batch(model), output_hidden_states=True, return_dict=True)
    return {name: value for name, value in seen.items() if name.endswith("hidden_states")} | {"first": (seen[0],)}


def check_removal(model: PreTrainedModel, gone: dict[str, list[int]], verify: bool = True) -> None:
    """Condense; just these layers go, and all outputs but what the removed layers were given are as before."""
    before = {attention: hidden_states(model, attention) for attention in models.attentions_of(model)}
    parameters, plan = model.num_parameters(), condense_plan(model)
    assert plan.removed == gone
    assert condense(model, verify=verify) is model
    assert model.num_parameters() == parameters - plan.parameters
    for attention, wanted in before.items():
        after = hidden_states(model, attention)
        assert after.keys() == wanted.keys()
        for name, states in wanted.items():
            stack = name.removesuffix("_hidden_states")
            own = [indices for path, indices in gone.items() if path.startswith(stack)] or list(gone.values())
            missing = own[0] if name.endswith("hidden_states") and own else []
            assert gap([state for index, state in enumerate(states) if index not in missing], list(after[name])) <= 1e-5
    stacks: dict[str, list[int]] = {}
    for block in find_blocks(model):
        if block.kind == "attention" and getattr(block.module, "layer_idx", None) is not None:
            assert block.module.layer_idx == int(block.layer.rpartition(".")[2])
            stacks.setdefault(block.layer.rpartition(".")[0], []).append(block.module.layer_idx)
    assert all(set(indices) == set(range(len(set(indices)))) for indices in stacks.values())


@pytest.mark.parametrize("family", models.PRE_NORM)
def test_empty_layers_go(family: str) -> None:
    model = five_layers(family)
    gone = models.empty_layers(model, {1, 2, 4})
    assert gone.keys() <= set(models.PRE_NORM[family])
    check_removal(model, gone)
    assert model.config.hf_prune["removed_layers"] == gone
    attributes = layer_counts(spec_for(model.config.model_type))
    assert {attrgetter(attributes[path])(model.config) for path in gone} == {2}
    assert getattr(model.config, "layer_types", None) is None or len(model.config.layer_types) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [case for case in models.MATRIX if case[0] in models.PRE_NORM])
def test_empty_layers_go_everywhere(family: str, head: str) -> None:
    for indices in ({1, 2, 4}, {2, 3}, {1}):
        model = five_layers(family, head)
        gone = models.empty_layers(model, indices)
        check_removal(model, {} if (family, head) == ("whisper", "causal-lm") else gone)


def test_a_layer_stays_whose_cross_attention_adds_something_only_with_encoder_states() -> None:
    model = five_layers("whisper", "causal-lm")
    models.empty_layers(model, {2})
    check_removal(model, {})
    assert len(model.base_model.decoder.layers) == 5


@pytest.mark.parametrize("family", models.PRE_NORM)
def test_first_layer_goes_when_it_adds_nothing_and_is_made_like_the_others(family: str) -> None:
    model = five_layers(family)
    gone = models.empty_layers(model, {0, 2}, silent=True)
    differs = family in ("t5", "t5-gated", "mt5", "modernbert", "modernbert-decoder")
    check_removal(model, {path: [2] for path in gone} if differs else gone)

    model = five_layers(family)
    gone = models.empty_layers(model, {0, 2})
    adds = any(constant is not None and constant.any() for constant in first_constants(model))
    check_removal(model, {path: [2] for path in gone} if differs or adds else gone)


def first_constants(model: PreTrainedModel) -> list[Tensor]:
    """What the biases of first layers' output projections, and of what feeds them, could add."""
    found = [block for block in find_blocks(model) if block.layer.endswith(".0")]
    modules = [part.module for block in found for part in (*block.inputs, block.output)]
    return [module.bias for module in modules if module.bias is not None]


def test_one_layer_always_stays() -> None:
    model = five_layers("llama", "causal-lm")
    models.empty_layers(model, set(range(5)))
    check_removal(model, {"layers": [0, 1, 2, 3]})
    assert sizes(model) == {"model.layers.0.self_attn": 0, "model.layers.0.mlp.up_proj": 0}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {}),
        ("bart", {}),
        ("wav2vec2", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("whisper", {"use_weighted_layer_sum": True}),
        ("wav2vec2-stable", {"use_weighted_layer_sum": True}),
        ("wav2vec2-stable", {"adapter_attn_dim": 4}),
    ],
)
def test_layers_that_stay(family: str, config: dict[str, object]) -> None:
    model = models.tiny(family, **config)
    layers = {block.layer for block in find_blocks(model)}
    models.empty_layers(model, {1})
    check_removal(model, {})
    assert "removed_layers" not in model.config.hf_prune
    assert {block.layer for block in find_blocks(model)} == layers


@pytest.mark.parametrize("family", [family for family in models.GENERATORS if family in models.PRE_NORM])
def test_generates_the_same_with_fewer_layers(family: str) -> None:
    model = five_layers(family, models.GENERATORS[family])
    models.empty_layers(model, {0, 1, 3}, silent=True)
    check_generation(model, family)
    assert model.config.hf_prune["removed_layers"]


def test_heads_stay_whose_queries_a_norm_over_all_heads_sees() -> None:
    """OLMo 2: what such a head adds is nothing, but the others are divided by the size of its queries."""
    model = models.tiny("olmo2-grouped")
    attention = find_blocks(model)[2]
    output, query, key = (attention.roles[role].layer.weight for role in ("output", "query", "key"))
    with torch.no_grad():
        output[:, :24] = 0  # the first group of two heads, and the first of the second
        query[:8] = 0
    reason = "3 dead heads stay, because a norm over all heads sees their queries and keys"
    assert [plan.left_out for plan in condense_plan(model).blocks] == ["", "", reason, "", "", ""]
    assert reason in str(condense_plan(model))
    with torch.no_grad():
        query[:16] = key[:8] = 0
    wanted = outputs(model)
    condense(model)
    assert sizes(model)["model.layers.1.self_attn"] == 2
    assert gap(wanted, outputs(model)) <= 1e-5


def test_a_layer_stays_behind_whose_norm_is_a_constant() -> None:
    """Gemma 2 has an RMSNorm on what a block adds, which leaves zeros; a LayerNorm adds its bias."""
    for norm, gone in ((None, {"layers": [1]}), (nn.LayerNorm, {})):
        model = models.tiny("gemma2")
        for layer in model.model.layers if norm else ():
            layer.post_feedforward_layernorm = norm(32)
            nn.init.normal_(layer.post_feedforward_layernorm.bias)
        models.empty_layers(model, {1})
        assert condense_plan(model).removed == gone
        wanted = outputs(model)
        condense(model)
        assert gap(wanted[:1], outputs(model)[:1]) <= 1e-5


def test_one_tower_loses_layers() -> None:
    model = models.tiny("clip", "bare")
    for block in find_blocks(model):
        if block.layer == "vision_model.encoder.layers.1":
            models.zero_units(block, list(range(block.num_units)), "out")
    wanted = outputs(model)
    condense(model)
    assert model.config.hf_prune["removed_layers"] == {"vision_model.encoder.layers": [1]}
    assert [model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers] == [3, 2]
    assert gap(wanted[:1], outputs(model)[:1]) <= 1e-5


def test_layers_removed_again() -> None:
    model = five_layers("llama-with-biases", "causal-lm")
    models.zero_units(find_blocks(model)[5], [3, 4], "in")
    models.empty_layers(model, {1})
    check_removal(model, {"layers": [1]})
    assert model.config.hf_prune["layers"] == {"layers.1": {"mlp.up_proj": {"intermediate_size": 38}}}
    models.empty_layers(model, {2})
    assert condense_plan(model).removed == {"layers": [2]}
    before = outputs(model)[0]
    condense(model)
    assert gap([before], [outputs(model)[0]]) <= 1e-5
    assert model.config.hf_prune["removed_layers"] == {"layers": [1, 3]}
    assert model.config.num_hidden_layers == 3


def test_failed_verification_brings_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = five_layers("t5", "seq2seq-lm")
    models.prune_randomly(model)
    gone = models.empty_layers(model, {1, 3})
    state, config = state_of(model), model.config.to_dict()
    remove = cutting.remove_layers
    monkeypatch.setattr(cutting, "remove_layers", lambda model, spec, removed: remove(model, spec, {"encoder.block": [1, 2]}))
    with pytest.raises(RuntimeError, match="model was restored"):
        condense(model)
    monkeypatch.undo()
    assert model.config.to_dict() == config
    assert [stack.config.num_layers for stack in (model.encoder, model.decoder)] == [5, 5]
    assert [name for name, _ in model.named_parameters()] == list(state)
    assert all(parameter is state[name][0] for name, parameter in model.named_parameters())
    check_removal(model, gone)


@pytest.mark.parametrize("emptier", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["t5", "t5-gated", "whisper"])
def test_generates_the_same_with_unequal_stacks(family: str, emptier: str, tmp_path: Path) -> None:
    model = five_layers(family, models.GENERATORS[family])
    for block in find_blocks(model):
        if int(block.layer.rpartition(".")[2]) in ({1, 2, 3} if block.layer.startswith(emptier) else {2}):
            units = block.num_units
            models.zero_units(block, list(range(units)), "in")
    check_generation(model, family)
    assert sorted(map(len, model.config.hf_prune["removed_layers"].values())) == [1, 3]
    assert stock_config(model.config).get_text_config(decoder=True).num_hidden_layers == 5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = {model.main_input_name: models.ragged_batch(model)[model.main_input_name]}
    assert again.generate(**inputs, max_new_tokens=3).equal(model.generate(**inputs, max_new_tokens=3))


def test_dropped_layers_are_remembered(tmp_path: Path) -> None:
    model = five_layers("llama-with-biases", "causal-lm")
    models.zero_units(find_blocks(model)[1], [0], "in")
    models.zero_units(find_blocks(model)[9], [3, 4], "in")
    models.empty_layers(model, {3})
    condense(model)
    assert model.config.hf_prune["removed_layers"] == {"layers": [3]}
    models.zero_units(find_blocks(model)[0], list(range(8)), "out")
    assert drop_layers(model) == ["layers.0"]
    assert model.config.hf_prune["layers"] == {"layers.2": {"mlp.up_proj": {"intermediate_size": 38}}}
    assert model.config.hf_prune["removed_layers"] == {"layers": [0, 3]}
    assert stock_config(model.config).num_hidden_layers == 5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert gap(outputs(model), outputs(again)) == 0


def test_attention_that_insists_on_float32(caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("gpt2", reorder_and_upcast_attn=True)
    models.prune_randomly(model)
    before = outputs(model)
    with caplog.at_level("WARNING"):
        condense(model)
    assert "verified in float32" in caplog.text
    assert gap(before[:1], outputs(model)[:1]) <= 1e-5
    assert model.config.hf_prune["layers"]


class Kernel(nn.Module):
    """An activation that some dtypes do not have."""

    def __init__(self, lacks: tuple[torch.dtype, ...], error: type[Exception]) -> None:
        super().__init__()
        self.lacks, self.error = lacks, error

    def forward(self, states: Tensor) -> Tensor:
        if states.dtype in self.lacks:
            raise self.error(f"this kernel has no {states.dtype}")
        return nn.functional.gelu(states)


@pytest.mark.parametrize("error", [NotImplementedError, ValueError, TypeError])
def test_verification_falls_back_where_a_kernel_lacks_float64(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("bert")
    models.prune_randomly(model)
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = Kernel((torch.float64,), error)
    before = outputs(model)
    with caplog.at_level("WARNING"):
        condense(model)
    assert gap(before, outputs(model)) <= 1e-5
    message = rf"float64 \({error.__name__}: this kernel .*\), so it is verified in float32: differences up to 1e-05"
    assert len(re.findall(message, caplog.text)) == 1
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = Kernel((torch.float64, torch.float32), error)
    models.zero_units(find_blocks(model)[4], [0], "out")
    state = state_of(model)
    with pytest.raises(error, match=r"this kernel has no torch\.float32"):
        condense(model)
    assert all(parameter is state[name][0] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("pattern", "pad"), [("2:4", None), ("1x1", None), ("neuron", 1000)])
def test_it_says_when_nothing_is_cut_out(pattern: str, pad: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("bert")
    prune_at_once(model, PruningConfig(pattern=pattern, criterion="magnitude", scope="local"))
    parameters = model.num_parameters()
    with caplog.at_level("WARNING"):
        assert condense(model, pad_to_multiple_of=pad).num_parameters() == parameters
    assert ("pad_to_multiple_of=1000 keeps all" if pad else "no head, neuron or layer of this Bert") in caplog.text
    caplog.clear()
    if pad:
        assert condense(model).num_parameters() < parameters
        assert not caplog.text


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_warning_where_embeddings_require_gradients() -> None:
    model = models.tiny("llama", "causal-lm")
    model.enable_input_require_grads()  # as PEFT and TRL do under gradient checkpointing
    models.zero_units(find_blocks(model)[1], [0, 1], "in")
    condense(model)
