"""Fewer experts, and narrower ones: what goes, and what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, snapshot
from reloading import reload, save_expected
from torch import Tensor, nn

from hf_prune import ConfigError, shrink_expert_neurons, shrink_experts
from hf_prune.condense.stock import smaller
from hf_prune.shrink.expert_neurons import importances, keep_neurons, most
from hf_prune.shrink.experts import CRITERIA, contributions, keep_experts, largest

FAST = ("olmoe", "qwen3-moe", "deepseek-v3", "gpt-oss")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in models.MIXTURES]

#: Those that can be trained with a loss of balance.
BALANCED = [
    pytest.param(name, marks=() if name == "olmoe" else pytest.mark.slow)
    for name in ("olmoe", "qwen3-moe", "mixtral", "qwen2-moe", "ernie4.5-moe", "gpt-oss", "granite-moe", "phi-moe", "minimax")
]


def batches(model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    return [models.ragged_batch(model, rows=6, seed=seed) for seed in range(count)]


def blocks(model: Any) -> dict[str, nn.Module]:
    """The modules of experts, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def without(model: Any, gone: dict[str, list[int]], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The logits of the whole model if the router can choose none of these experts."""
    rows = {}
    with torch.no_grad():
        for name, indices in gone.items():
            block = model.get_submodule(name.rpartition(".")[0])
            for key, tensor in (*block.named_parameters(), *block.named_buffers()):
                if tensor.shape == (8, 32):
                    rows[tensor.data_ptr()] = indices
                elif "e_score" in key:  # what is added to the scores after the logits are squashed
                    tensor[..., indices] = -torch.inf
    plain = F.linear

    def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = plain(tokens, weight, bias)
        indices = rows.get(weight.data_ptr(), [])
        return logits.index_fill(-1, torch.tensor(indices, dtype=torch.long), -torch.inf) if indices else logits

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", linear)
        return model(**batch).logits


def test_weights_of_experts_sum_to_one_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both settings of `norm_topk_prob`: that of Qwen3-MoE is true in the table, here it is not; OLMoE's is not, here it is."""
    for name, sums in (("qwen3-moe", False), ("olmoe", True)):
        test_what_is_left_is_the_model_that_cannot_choose_the_others(name, monkeypatch, norm_topk_prob=sums)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_the_model_that_cannot_choose_the_others(
    name: str, monkeypatch: pytest.MonkeyPatch, **config: object
) -> None:
    model = models.tiny_mixture(name, **config)
    whole, rows = copy.deepcopy(model), batches(model)
    assert shrink_experts(model, 4, rows) is model
    scores = contributions(whole, _rows(rows), "reap")
    groups = getattr(model.config, "n_group", None) or 1
    gone = {path: sorted(set(range(8)) - set(largest(worth, 4, groups).tolist())) for path, worth in scores.items()}
    assert len({tuple(indices) for indices in gone.values()}) > 1  # each layer has its own
    for batch in rows:
        read = batch["attention_mask"].bool()
        expected = without(copy.deepcopy(whole), gone, batch, monkeypatch)
        with torch.no_grad():
            assert (model(**batch).logits - expected)[read].abs().max() <= 1e-5
            assert (whole(**batch).logits - expected)[read].abs().max() > 1e-3


def _rows(given: list[dict[str, Tensor]]) -> Any:
    from hf_prune.oneshot.walk import Rows

    return Rows(given, [])


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_an_ordinary_model(name: str, tmp_path: Path) -> None:
    """Its own class makes it of its config and loads its weights."""
    model = models.tiny_mixture(name)
    shrink_experts(model, 4, batches(model))
    folder = tmp_path / f"{name}-{type(model).__name__}"
    model.save_pretrained(folder)
    fresh = type(model).from_pretrained(folder).eval()
    for batch in batches(model):
        with torch.no_grad():
            assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    number = [
        name for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if hasattr(fresh.config, name)
    ]
    assert {getattr(fresh.config, name) for name in number} == {4}
    assert set(fresh.config.hf_prune["original"].values()) == {8}


def test_it_loads_where_hf_prune_is_not(tmp_path: Path) -> None:
    """Nor by code of its own; with hf_prune it loads as well, what stock code saved."""
    model = models.tiny_mixture("mixtral")
    shrink_experts(shrink_expert_neurons(model, 8, batches(model)), 3, batches(model))
    assert model.config.hf_prune["original"] == {"intermediate_size": 16, "num_local_experts": 8}
    assert smaller(model.config) == {"experts in a layer": (3, 8), "neurons in an expert": (8, 16)}
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    folder = first / f"mixtral-{type(model).__name__}"
    model.save_pretrained(folder)
    save_expected(model, folder)
    rows = [reload("stock", first, second), reload("import", second, third)]
    assert [row[folder.name]["gap"] for row in rows] == [0, 0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_an_expert_is_worth(criterion: str) -> None:
    """Against every token and expert of its own, one at a time; padding counts for nothing."""
    model = models.tiny_mixture("qwen3-moe")
    given = batches(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in blocks(model)}
    for name, module in blocks(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    found = contributions(model, _rows(given), criterion)
    assert found.keys() == blocks(model).keys() == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}
    for name, module in blocks(model).items():
        total, served = torch.zeros(8), torch.zeros(8)
        router = model.get_submodule(name.replace("experts", "gate"))
        for tokens, batch in zip(seen[name], given):
            for token, read in zip(tokens.flatten(0, -2), batch["attention_mask"].flatten()):
                if not read:
                    continue
                chances = (router.weight @ token).softmax(0)
                best = chances.topk(2)
                for expert, weight in zip(best.indices, best.values / best.values.sum()):
                    gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
                    total[expert] += weight * (module.down_proj[expert] @ (F.silu(gate) * up)).norm()
                    served[expert] += 1
        expected = served if criterion == "frequency" else total / served
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-4, atol=1e-6)


def test_the_largest_of_each_group_stay() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.3, 0.2, 0.3])
    assert largest(scores, 4).tolist() == [0, 1, 2, 3]
    assert largest(scores, 4, groups=2).tolist() == [0, 1, 5, 7]
    assert largest(torch.zeros(8), 2).tolist() == [0, 1]


@pytest.mark.parametrize("name", BALANCED)
def test_losses_of_balance_are_those_of_fewer_experts(name: str) -> None:
    """Number of experts · Σ share of tokens that choose an expert · mean chance of it, with the model's weight, in the loss."""
    model: Any = models.tiny_mixture(name)
    shrink_experts(model, 4, batches(model))
    batch = batches(model)[0]
    inputs = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    output = model(**inputs, output_router_logits=True)
    assert {logits.shape[-1] for logits in output.router_logits} == {4}
    read = batch["attention_mask"].flatten().bool()
    chances = torch.cat([logits[read] for logits in output.router_logits]).softmax(-1)
    chosen = torch.zeros_like(chances).scatter_(1, chances.topk(2).indices, 1.0)
    torch.testing.assert_close(output.aux_loss, 4 * (chosen.mean(0) * chances.mean(0)).sum())
    torch.testing.assert_close(output.loss, model(**inputs).loss + model.config.router_aux_loss_coef * output.aux_loss)
    output.loss.backward()
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if "e_score" not in key)


def test_twice_remembers_the_first() -> None:
    model = models.tiny_mixture("mixtral")
    shrink_experts(shrink_experts(model, 6, batches(model)), 3, batches(model))
    assert model.config.num_local_experts == 3
    assert model.config.hf_prune["original"] == {"num_local_experts": 8}


def _in_modules() -> Any:
    import transformers

    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4, "num_experts": 4}
    return transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda: models.tiny_mixture("olmoe"),
            {"num_experts": 1},
            "num_experts=1: must be a whole number from 2 to 7: of 8, 2 are",
        ),
        (lambda: models.tiny_mixture("olmoe"), {"num_experts": 8}, "num_experts=8: must be a whole number from 2 to 7"),
        (lambda: models.tiny_mixture("olmoe"), {"num_experts": True}, "num_experts=True: must be a whole number"),
        (
            lambda: models.tiny_mixture("deepseek-v3"),
            {"num_experts": 5},
            "num_experts=5: .* from 4 to 7, divisible by 2, the groups",
        ),
        (lambda: models.tiny_mixture("olmoe"), {"criterion": "reep"}, "criterion='reep': .* Did you mean 'reap'"),
        (lambda: models.tiny("llama", "causal-lm"), {}, "model='LlamaForCausalLM': has no experts: none of num_experts, "),
        (
            _in_modules,
            {"num_experts": 2},
            "model='SwitchTransformersForConditionalGeneration': keeps each expert in a module of its",
        ),
        (lambda: models.tiny_mixture("olmoe"), {"calibration_rows": 2}, "must give at least"),
    ],
)
def test_refused_and_nothing_changed(make: Callable[[], Any], settings: dict[str, Any], message: str) -> None:
    model = make()
    before = snapshot(model)
    given = [models.ragged_batch(model, rows=6)]
    with pytest.raises(ConfigError, match=message):
        shrink_experts(model, **{"num_experts": 4, "dataloader": given, **settings})
    assert_equal(snapshot(model), before)
    assert getattr(model.config, "hf_prune", None) is None


def test_all_or_nothing() -> None:
    """What the smaller model cannot read is found out before it is kept."""
    model = models.tiny_mixture("olmoe")
    before = snapshot(model)
    kept = {name: torch.arange(4) for name in blocks(model)}
    with pytest.raises(Exception, match=r".+"):
        keep_experts(model, kept, {"input_ids": torch.full((1, 3), 1000)})
    assert_equal(snapshot(model), before)
    assert model.config.num_experts == 8


# ------------------------------------------------------------------------------------------------------------ neurons of experts


def narrow_by_zeros(model: Any, scores: dict[str, Tensor], number: int) -> None:
    """Zero what all but the `number` (of 16) best neurons of each expert write, one expert at a time."""
    for name, worth in scores.items():
        module: Any = model.get_submodule(name)
        if worth.ndim == 1:
            module.weight.data[:, worth.argsort()[: worth.numel() * (16 - number) // 16]] = 0
            continue
        for expert, own in enumerate(worth):
            down = module.down_proj.data[expert]
            (down.T if module.is_transposed else down)[:, own.argsort()[: 16 - number]] = 0


@pytest.mark.parametrize("name", NAMES)
def test_narrower_experts_are_those_with_zeros(name: str, tmp_path: Path) -> None:
    """Each loses its own neurons, shared ones too if they are as wide; what is left is an ordinary model of its own class."""
    model = models.tiny_mixture(name)
    whole, rows = copy.deepcopy(model), batches(model)
    scores = importances(whole, _rows(rows))
    assert shrink_expert_neurons(model, 8, rows) is model
    zeroed = copy.deepcopy(whole)
    narrow_by_zeros(zeroed, scores, 8)
    folder = tmp_path / f"{name}-{type(model).__name__}"
    model.save_pretrained(folder)
    fresh = type(model).from_pretrained(folder).eval()
    for batch in rows:
        with torch.no_grad():
            expected = zeroed(**batch).logits
            assert (model(**batch).logits - expected).abs().max() <= 1e-5
            assert (whole(**batch).logits - expected).abs().max() > 1e-3
            assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    for key, parameter in model.named_parameters():
        if "expert" not in key.replace("shared_expert.", ""):  # routers and all else, Qwen2-MoE's shared expert among it
            assert torch.equal(parameter, whole.get_parameter(key)), key
    assert set(fresh.config.hf_prune["original"].values()) == {16}


def test_what_a_neuron_is_worth() -> None:
    """Against every token, expert and neuron of its own, one at a time; padding counts for nothing."""
    model = models.tiny_mixture("deepseek-v3")
    given = [models.ragged_batch(model, rows=2)]
    model.requires_grad_(False)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("experts", "mlp.gate")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in blocks(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: chosen.update({name: args[1:]}))
    found = importances(model, _rows(given))
    read = given[0]["attention_mask"].flatten().bool()
    layers = ("model.layers.1.mlp", "model.layers.2.mlp")
    assert found.keys() == {f"{layer}.{part}" for layer in layers for part in ("experts", "shared_experts.down_proj")}
    for layer in layers:
        module: Any = model.get_submodule(f"{layer}.experts")
        expected = torch.zeros(8, 16, dtype=torch.float64)
        for token, experts, weights, counts in zip(seen[f"{layer}.experts"], *chosen[f"{layer}.experts"], read):
            for expert, weight in zip(experts, weights):
                gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
                for neuron in range(16):
                    written = (F.silu(gate[neuron]) * up[neuron] * module.down_proj[expert][:, neuron]).norm()
                    expected[expert, neuron] += float(weight * written * counts)
        torch.testing.assert_close(found[f"{layer}.experts"], expected, rtol=1e-4, atol=1e-6)
        shared: Any = model.get_submodule(f"{layer}.shared_experts")
        tokens = seen[f"{layer}.shared_experts"].flatten(0, -2)[read]
        used = (F.silu(shared.gate_proj(tokens)) * shared.up_proj(tokens)).abs().sum(0)
        expected = (used * shared.down_proj.weight.norm(dim=0)).detach().double()
        torch.testing.assert_close(found[f"{layer}.shared_experts.down_proj"], expected, rtol=1e-4, atol=1e-6)


def test_an_expert_that_serves_nobody_keeps_what_writes_most() -> None:
    model: Any = models.tiny_mixture("olmoe")
    given = [{"input_ids": torch.tensor([[7]])}]  # two experts of eight serve it
    scores = importances(model, _rows(given))["model.layers.0.mlp.experts"]
    idle = [expert for expert in range(8) if scores[expert].max() < 1e-100]
    assert len(idle) == 6
    for expert in idle:
        written = model.model.layers[0].mlp.experts.down_proj[expert].norm(dim=0)
        assert most(scores[expert], 8).equal(most(written, 8))


def _without_layout() -> Any:
    model = models.tiny_mixture("olmoe")
    for module in blocks(model).values():
        del module.is_transposed
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: models.tiny_mixture("olmoe"), {"moe_intermediate_size": 16}, "=16: must be a multiple of 8 below 16, the number"),
        (lambda: models.tiny_mixture("olmoe"), {"moe_intermediate_size": 0}, "=0: must be a multiple of 8"),
        (lambda: models.tiny_mixture("olmoe"), {"moe_intermediate_size": 12}, "=12: must be a multiple of 8"),
        (lambda: models.tiny_mixture("olmoe"), {"moe_intermediate_size": True}, "=True: must be a multiple of 8"),
        (lambda: models.tiny_mixture("olmoe"), {"calibration_rows": 2}, "must give at least"),
        (lambda: models.tiny("llama", "causal-lm"), {}, "model='LlamaForCausalLM': has no experts"),
        (_in_modules, {}, "keeps each expert in a module of its own"),
        (_without_layout, {}, "'model.layers.0.mlp.experts', which is not of transformers' own layout"),
    ],
)
def test_narrower_refused_and_nothing_changed(make: Callable[[], Any], settings: dict[str, Any], message: str) -> None:
    model = make()
    before = snapshot(model)
    given = [models.ragged_batch(model, rows=6)]
    with pytest.raises(ConfigError, match=message):
        shrink_expert_neurons(model, **{"moe_intermediate_size": 8, "dataloader": given, **settings})
    assert_equal(snapshot(model), before)
    assert getattr(model.config, "hf_prune", None) is None


def test_narrower_all_or_nothing() -> None:
    model = models.tiny_mixture("gpt-oss")
    before = snapshot(model)
    kept = {name: most(torch.rand(8, 16), 8) for name in blocks(model)}
    with pytest.raises(Exception, match=r".+"):
        keep_neurons(model, kept, 8, {"input_ids": torch.full((1, 3), 1000)})
    assert_equal(snapshot(model), before)
    assert model.config.intermediate_size == 16
