"""Fewer experts: which go, and what is left."""

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

from hf_prune import ConfigError, shrink_experts
from hf_prune.shrink.experts import CRITERIA, contributions, keep_experts, largest

FAST = ("olmoe", "qwen3-moe", "deepseek-v3", "gpt-oss")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in models.MIXTURES]


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


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_the_model_that_cannot_choose_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny_mixture(name)
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
    model = models.tiny_mixture("olmoe")
    shrink_experts(model, 3, batches(model))
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    folder = first / f"olmoe-{type(model).__name__}"
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


def test_losses_of_balance_are_those_of_fewer_experts() -> None:
    model = models.tiny_mixture("olmoe")
    shrink_experts(model, 4, batches(model))
    batch = batches(model)[0]
    output = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert {tuple(logits.shape[1:]) for logits in output.router_logits} == {(4,)}
    assert torch.isfinite(output.loss)
    assert output.aux_loss > 0
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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
