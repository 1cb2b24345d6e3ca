"""Pruning under LoRA, against references computed from W + s·BA; real PEFT models, real Trainer runs."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import arguments, assert_equal, forget_criterion, ragged_rows, snapshot, tiny_bert
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, Trainer

from hf_prune import ConfigError, Pruner, PruningCallback, PruningConfig, condense, sparsity_report
from hf_prune.model.targets import prunable_modules, weight_target
from hf_prune.model.units import UnitGroup
from hf_prune.pruning.criteria import Criterion, gradient, register_criterion, weight
from hf_prune.training.callback import STATE_NAME

#: Family → its head, and every linear layer of its transformer layers.
CASES: dict[str, tuple[str, list[str]]] = {
    "llama": ("causal-lm", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "bert": ("sequence-classification", ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
    "gpt2": ("causal-lm", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}
#: For whole matrices: one family in the fast suite.
FAMILIES = [family if family == "llama" else pytest.param(family, marks=pytest.mark.slow) for family in CASES]
#: Patterns whose units are whole rows and columns, and patterns whose units are not.
STRUCTURED, UNSTRUCTURED = ["head", "neuron", "1xchannel", "channelx1"], ["4x1", "2:4", "1x1"]


def base(family: str = "llama", **config: Any) -> PreTrainedModel:
    """A tiny model without dropout."""
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    return tiny_bert(**config) if family == "bert" else models.tiny(family, CASES[family][0], **dropout, **config)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """A tiny model with LoRA adapters that have random values on every layer that can be pruned."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": CASES[family][1], "init_lora_weights": False}
    chosen["fan_in_fan_out"] = family == "gpt2"
    model = base(family).to(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**chosen | settings)).eval()


#: Mask updates from the first steps to the last.
WHOLE_RUN: dict[str, Any] = {"warmup_steps": 0, "cooldown_steps": 0, "frequency": 2}


def config(pattern: str, **settings: Any) -> PruningConfig:
    return PruningConfig(**{"pattern": pattern, "target_sparsity": 0.5, "scope": "local"} | WHOLE_RUN | settings)


def rows(family: str, count: int = 32) -> list[dict[str, Any]]:
    """Rows for a classifier, or for a causal language model, whose labels are its inputs."""
    chosen = ragged_rows(count)
    if CASES[family][0] == "causal-lm":
        for row in chosen:
            row["labels"] = [token if seen else -100 for token, seen in zip(row["input_ids"], row["attention_mask"])]
    return chosen


def batch(family: str, count: int = 8) -> dict[str, Tensor]:
    chosen = rows(family, count)
    return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}


def steps(model: nn.Module, pruner: Pruner, inputs: dict[str, Tensor], count: int, lr: float = 1e-2) -> Iterator[int]:
    """Train in a plain loop, with AdamW and weight decay."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    for step in range(count):
        model(**inputs).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        yield step


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + s·BA of every LoRA layer, as PEFT's merge computes it."""
    found = {}
    for name, layer in lora_layers(model).items():
        copied = copy.deepcopy(layer)
        copied.merge()
        found[name] = copied.base_layer.weight.detach()
    return found


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight_target(name, module).weight() == 0 for name, module in prunable_modules(model)}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def train(folder: Path, family: str, settings: PruningConfig, model: PeftModel | None = None, **overrides: Any) -> Trainer:
    model = adapted(family, init_lora_weights=True) if model is None else model
    trainer = Trainer(
        model=model,
        args=arguments(folder, **{"num_train_epochs": 2, "learning_rate": 1e-2} | overrides),
        train_dataset=rows(family),
        eval_dataset=rows(family, 16),
        callbacks=[PruningCallback(settings)],
    )
    resume = overrides.pop("resume_from_checkpoint", None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def pruner_of(trainer: Trainer) -> Pruner:
    found = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PruningCallback)).pruner
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------- merging, shrinking


@pytest.mark.core
@pytest.mark.parametrize("pattern", ["head", "neuron", "4x1", "2:4"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_trained_merged_and_condensed(family: str, pattern: str, tmp_path: Path) -> None:
    """What the Trainer leaves has the target's sparsity, exactly, before and after the merge; the smaller model is the same."""
    trainer = train(tmp_path, family, config(pattern, criterion="snip_momentum"))
    model, pruner, inputs = trainer.model, pruner_of(trainer), batch(family)
    assert pruner.reached_sparsity() == pruner.target_sparsity() == 0.5
    assert trainer.state.log_history[-1]["reached_sparsity"] == 0.5
    before, report = logits(model, inputs), sparsity_report(model)
    names = {view.target.module_name for rule in pruner.rules for group in rule.groups for view in group.weights}
    merged = model.merge_and_unload()
    weights = {name: merged.get_submodule(name).weight for name in names}
    assert sum(int((value == 0).sum()) for value in weights.values()) * 2 == sum(value.numel() for value in weights.values())
    after = sparsity_report(merged)
    assert (after.modules, after.blocks) == (report.modules, report.blocks)
    torch.testing.assert_close(logits(merged, inputs), before, atol=1e-5, rtol=0)
    size = merged.num_parameters()
    masked = logits(merged, inputs)
    torch.testing.assert_close(logits(condense(merged), inputs), masked, atol=1e-5, rtol=0)
    assert merged.num_parameters() < size or pattern in UNSTRUCTURED


@pytest.mark.parametrize("pattern", ["neuron", "2:4"])
def test_with_what_the_trainer_offers(pattern: str, tmp_path: Path) -> None:
    """bf16 autocast, accumulation, recomputation, dropout in the adapters, rank-stabilised scaling."""
    model = adapted(init_lora_weights=True, lora_dropout=0.1, use_rslora=True)
    overrides = {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "num_train_epochs": 4}
    trainer = train(tmp_path, "llama", config(pattern, criterion="taylor"), model, **overrides)
    assert pruner_of(trainer).reached_sparsity() == 0.5
    assert all(bool((layer.lora_B["default"].weight != 0).any()) for layer in lora_layers(model).values())
    report = sparsity_report(model)
    assert sparsity_report(model.merge_and_unload()).modules == report.modules


@pytest.mark.parametrize("pattern", ["head", "neuron", "4x1"])
@pytest.mark.parametrize("family", CASES)
def test_adapters_shrink_with_the_base_model(family: str, pattern: str, tmp_path: Path) -> None:
    """Condensed unmerged, then saved as base and adapter: loaded and merged, it is the condensed merged model."""
    model, inputs = adapted(family), batch(family)
    pruner = Pruner(model, config(pattern, criterion="magnitude", target_sparsity=0.75, target_modules=r".*\d\..*"), 4)
    list(steps(model, pruner, inputs, 4))
    pruner.finish()
    before = logits(model, inputs)
    small = condense(copy.deepcopy(model).merge_and_unload())
    assert condense(model) is model
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=0)
    assert model.config.hf_prune == small.config.hf_prune
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    again = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, inputs), before, atol=1e-5, rtol=0)
    merged = again.merge_and_unload()
    assert merged.num_parameters() == small.num_parameters()
    zeros = zeros_of(small)
    assert all(torch.equal(value, zeros[name]) for name, value in zeros_of(merged).items())
    torch.testing.assert_close(logits(merged, inputs), logits(small, inputs), atol=1e-5, rtol=0)


def test_zeros_survive_the_rounding_of_a_smaller_product() -> None:
    """With one neuron left the product of its adapter is one of a vector, which is summed in another order."""
    model = adapted(r=64, init_lora_weights=True)
    for name, layer in lora_layers(model).items():
        if name.endswith(("up_proj", "gate_proj")):
            with torch.no_grad():
                layer.base_layer.weight[1:] = 0
                layer.base_layer.weight[:, ::2] = 0
    pruner = Pruner(model, PruningConfig(keep_zeros=True), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    pruner.step()
    pruner.finish()
    merged = condense(model).merge_and_unload()
    for block in merged.model.layers:
        for module in (block.mlp.up_proj, block.mlp.gate_proj):
            assert module.weight.shape == (1, 32)
            assert torch.equal(module.weight[0] == 0, torch.arange(32) % 2 == 0)


def test_condensing_that_fails_puts_adapters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    pruner = Pruner(model, config("head", criterion="magnitude"), 1)
    list(steps(model, pruner, batch("llama"), 1))
    pruner.finish()
    before, parameters = snapshot(model), list(model.parameters())

    def differ(*args: Any) -> None:
        raise RuntimeError("differs")

    monkeypatch.setattr(sys.modules["hf_prune.condense"], "compare", differ)
    with pytest.raises(RuntimeError, match="differs"):
        condense(model)
    assert_equal(snapshot(model), before)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]


def test_condense_refuses_an_attached_pruner_and_other_adapters() -> None:
    model = adapted()
    pruner = Pruner(model, config("head", criterion="magnitude"), 1)
    with pytest.raises(RuntimeError, match="a Pruner is attached"):
        condense(model)
    with pytest.raises(RuntimeError, match="attached"):
        Pruner(model.get_base_model(), config("head", criterion="magnitude"), 1)
    pruner.release()
    with pytest.raises(ValueError, match=r"self_attn.q_proj: .*DoraLinearVariant.*merge_and_unload"):
        condense(adapted(use_dora=True))


# ------------------------------------------------------------------------------------------------------------------- each step


@pytest.mark.parametrize("pattern", [*STRUCTURED, *UNSTRUCTURED])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_leaves_exact_zeros_and_living_base_weights_alone(family: str, pattern: str) -> None:
    model, inputs = adapted(family), batch(family)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in lora_layers(model).items()}
    adapters = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in lora_layers(model).items()}
    pruner = Pruner(model, config(pattern, criterion="snip", schedule="linear", target_modules=r".*\d\..*"), 6)
    weights = pruner.weights.values()
    for _ in steps(model, pruner, inputs, 6):
        merged = merged_weights(model)
        zeros = sum(int((value == 0).sum()) for value in merged.values())
        pruned = {target.module_name for target in weights}
        assert zeros == round(pruner.reached_sparsity() * sum(target.parameter.numel() for target in weights))
        for name, layer in lora_layers(model).items():
            alive = merged[name] != 0
            assert torch.equal(layer.base_layer.weight[alive], before[name][alive])
            assert name.removeprefix("base_model.model.") in pruned or alive.all()
    assert pruner.reached_sparsity() == pruner.target_sparsity() == 0.5
    assert any(not torch.equal(layer.lora_B["default"].weight, adapters[name]) for name, layer in lora_layers(model).items())


LOTTERY = {"pattern": "1x1", "schedule": "lottery", "criterion": "magnitude", "cooldown_steps": 1}


@pytest.mark.parametrize("settings", [{"keep_zeros": True}, LOTTERY])
def test_sparse_model_stays_sparse_under_lora(settings: dict[str, Any]) -> None:
    """A sparse model is fine-tuned with LoRA; a lottery starts anew from the values it had."""
    model, inputs = adapted(init_lora_weights=True), batch("llama")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.base_layer.weight.mul_(torch.rand_like(layer.base_layer.weight) < 0.5)
    zeros = {name: value == 0 for name, value in merged_weights(model).items()}
    pruner = Pruner(model, PruningConfig(**{"scope": "local", "target_sparsity": 0.6} | WHOLE_RUN | settings), 4)
    list(steps(model, pruner, inputs, 4))
    pruner.finish()
    for name, value in merged_weights(model).items():
        assert ((value == 0) >= zeros[name]).all()
    assert all(bool((layer.lora_B["default"].weight != 0).any()) for layer in lora_layers(model).values())


def test_several_rules_on_one_module_multiply() -> None:
    model, inputs = adapted(), batch("llama")
    pruner = Pruner(
        model, PruningConfig(**WHOLE_RUN, scope="local", rules=[{"pattern": "head", "target_sparsity": 0.5}, {"pattern": "2:4"}]), 4
    )
    list(steps(model, pruner, inputs, 4))
    for layer in range(3):
        found = merged_weights(model)[f"base_model.model.model.layers.{layer}.self_attn.q_proj"] == 0
        assert int(found.view(8, 8 * 32).all(dim=1).sum()) == 4
        assert (found.view(-1, 4).sum(dim=1) >= 2).all()
        assert float(found.float().mean()) == 0.75


@pytest.mark.parametrize("pattern", ["head", "neuron", "4x1"])
def test_adapter_gradients_at_dead_weights(pattern: str) -> None:
    """Dropped where whole rows or columns are dead; elsewhere they are those of the merged weight as if it were alive."""
    model, inputs = adapted(), batch("llama")
    pruner = Pruner(model, config(pattern, criterion="magnitude"), 1)
    list(steps(model, pruner, inputs, 1))
    model(**inputs).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    pruner.observe()
    merged, changed = merged_weights(model), set()
    for name, layer in lora_layers(model).items():
        dead = merged[name] == 0
        rows_dead, columns_dead = dead.all(dim=1), dead.all(dim=0)
        for part, lost in (("lora_B", rows_dead[:, None]), ("lora_A", columns_dead[None])):
            found = getattr(layer, part)["default"].weight.grad
            lost = lost if pattern in STRUCTURED else torch.zeros_like(lost)
            expected = before[f"{name}.{part}.default.weight"].masked_fill(lost, 0.0)
            assert torch.equal(found, expected)
            changed |= {part} if lost.any() else set()
    assert changed == ({"lora_A", "lora_B"} if pattern in STRUCTURED else set())


def test_removed_rows_lose_every_bias() -> None:
    model, inputs = adapted("bert", lora_bias=True), batch("bert")
    pruner = Pruner(model, config("neuron", criterion="magnitude"), 2)
    list(steps(model, pruner, inputs, 2))
    pruner.finish()
    before = logits(model, inputs)
    merged = copy.deepcopy(model).merge_and_unload()
    up = merged.bert.encoder.layer[0].intermediate.dense
    dead = (up.weight == 0).all(dim=1)
    assert int(dead.sum()) == 20
    assert torch.equal(up.bias == 0, dead)
    torch.testing.assert_close(logits(condense(model), inputs), before, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------- what is scored


@pytest.mark.parametrize("criterion", ["magnitude", "fpgm", "wanda", "apoz", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_chosen_by_the_merged_weight(family: str, criterion: str) -> None:
    """The same units go as from the merged model without adapters.

    In float64, since in float32 the two models' activations differ by rounding, which decides between rows whose scores nearly tie.
    """
    inputs = batch(family)
    chosen = []
    for merged in (False, True):
        model = adapted(family, torch.float64)
        model = model.merge_and_unload().requires_grad_(True).train() if merged else model.train()
        pruner = Pruner(model, config("1xchannel", criterion=criterion), 1)
        list(steps(model, pruner, inputs, 1, lr=0.0))
        chosen.append(zeros_of(model))
    assert_equal(*chosen)
    assert any(value.any() for value in chosen[0].values())


class Convolutions(nn.Module):
    """A 1d and 2d convolution, one of kernel size one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.line, self.linear = nn.Conv1d(4, 8, 3), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.linear(self.line(self.narrow(self.wide(inputs)).flatten(2)).mean(dim=2))
        return found


def adapted_convolutions() -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["wide", "narrow", "line", "linear"], init_lora_weights=False)
    return get_peft_model(Convolutions(), settings)


@pytest.mark.parametrize("make", [lambda: adapted("gpt2"), lambda: adapted("llama"), adapted_convolutions])
def test_estimated_gradient_is_what_a_step_on_the_adapter_subtracts(make: Callable[[], PeftModel]) -> None:
    """s·(∂L/∂B·A + B·∂L/∂A − ∂L/∂B·∂L/∂A): the merged weight before minus after a step of plain gradient descent of size one."""
    model = make()
    inputs = {"inputs": torch.randn(2, 4, 5, 5)} if isinstance(model.get_base_model(), Convolutions) else batch("llama")
    output = model(**inputs)
    (output if isinstance(output, Tensor) else output.loss).square().sum().backward()
    targets = [weight_target(name, module) for name, module in prunable_modules(model) if name != "lm_head"]
    estimates, before = [gradient(target) for target in targets], [weight(target) for target in targets]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    for target, estimate, value in zip(targets, estimates, before):
        assert estimate.abs().max() > 0
        torch.testing.assert_close(value - weight(target), estimate, atol=1e-4, rtol=1e-3)


def test_a_trained_base_weight_has_its_own_gradient() -> None:
    inputs, model = batch("llama"), adapted()
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(True)
    model(**inputs).loss.backward()
    merged = adapted().merge_and_unload()
    merged.requires_grad_(True)
    merged(**inputs).loss.backward()
    for (name, module), (_, plain) in zip(prunable_modules(model), prunable_modules(merged)):
        if name != "lm_head":
            torch.testing.assert_close(gradient(weight_target(name, module)), plain.weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("pattern", ["1x1", "1xchannel", "channelx1", "2:4"])
def test_convolutions(pattern: str) -> None:
    model, inputs = adapted_convolutions(), torch.randn(2, 4, 5, 5)
    pruner = Pruner(model, config(pattern, criterion="snip"), 2)
    for _ in range(2):
        model(inputs).square().sum().backward()
        pruner.observe()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        pruner.step()
    before = model(inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(inputs), before, atol=1e-5, rtol=0)
    for module in (merged.wide, merged.narrow, merged.line, merged.linear):
        assert int((module.weight == 0).sum()) * 2 == module.weight.numel()


def test_frozen_weights_without_adapter() -> None:
    """Left out by criteria that need their gradient, pruned by the others."""
    model = adapted(target_modules=["q_proj", "v_proj"])
    plan = Pruner(model, config("2:4", criterion="snip"), 1).plan()
    assert {name.rsplit(".", 1)[1] for name in (group.name for group in plan.groups)} == {"q_proj", "v_proj"}
    assert "frozen" in plan.left_out["model.layers.0.mlp.up_proj"]
    model = adapted(target_modules=["q_proj", "v_proj"])
    pruner = Pruner(model, config("2:4", criterion="magnitude"), 1)
    list(steps(model, pruner, batch("llama"), 1))
    assert sparsity_report(model.merge_and_unload()).sparsity == 0.5


class Alternating(Criterion):
    """Prefers the first units at one update and the last ones at the next."""

    regrows = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first = 1

    def scores(self, group: UnitGroup) -> Tensor:
        return torch.arange(group.num_units) * float(self.first)

    def updated(self) -> None:
        self.first = -self.first


@pytest.fixture
def alternating() -> Iterator[str]:
    """The name of the criterion, for as long as a test runs."""
    register_criterion("alternating")(Alternating)
    yield "alternating"
    forget_criterion("alternating")


@pytest.mark.parametrize("pattern", ["4x1", "head"])
def test_what_comes_back_has_the_value_it_left_with(pattern: str, alternating: str) -> None:
    """When a mask is lifted, merged weight and bias are those put aside, whatever the adapter has learnt meanwhile."""
    model, inputs = adapted("bert"), batch("bert")
    settings = config(pattern, criterion=alternating, schedule="linear", target_modules=["query", "key", "value"])
    pruner = Pruner(model, settings, 8)
    layer = model.get_base_model().bert.encoder.layer[1].attention.self.value
    name, bias = "bert.encoder.layer.1.attention.self.value", layer.base_layer.bias.detach().clone()
    put_aside_now = lambda: pruner.state_dict()[f"regrowth/value/{name}.weight"].clone()  # noqa: E731
    before, put_aside, came_back = weight_target(name, layer).value(), put_aside_now(), 0
    for _ in steps(model, pruner, inputs, 8, lr=3e-2):
        found, aside = weight_target(name, layer).value(), put_aside_now()
        alive = found != 0
        returned = alive & (before == 0)
        torch.testing.assert_close(found[returned], put_aside[returned], atol=1e-6, rtol=0)
        assert torch.equal(aside == 0, alive)
        if pattern == "head":
            assert torch.equal(layer.base_layer.bias, bias * alive.any(dim=1))
        before, put_aside, came_back = found, aside, came_back + int(returned.sum())
    assert came_back > 0


def test_starts_from_the_zeros_of_the_merged_weight() -> None:
    model, inputs = adapted(), batch("llama")
    first = Pruner(model, config("4x1", criterion="magnitude"), 1)
    list(steps(model, first, inputs, 1))
    first.finish()
    zeros = merged_weights(model)
    second = Pruner(model, config("4x1", criterion="random", initial_sparsity="from_model", target_sparsity=0.75), 2)
    list(steps(model, second, inputs, 2))
    assert second.reached_sparsity() == 0.75
    assert all(bool((value[zeros[name] == 0] == 0).all()) for name, value in merged_weights(model).items())


# -------------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["head", "4x1"])
@pytest.mark.parametrize("adapter", ["float32", "same"])
def test_merge_is_exact_in_half_precision(adapter: str, pattern: str, dtype: torch.dtype) -> None:
    """PEFT keeps adapters of half precision models in float32; every way to merge leaves exact zeros."""
    model = adapted("llama", dtype)
    if adapter == "same":
        model = model.to(dtype)
    assert lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"].lora_A["default"].weight.dtype == (
        dtype if adapter == "same" else torch.float32
    )
    pruner = Pruner(model, config(pattern, criterion="magnitude"), 2)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn_like(parameter)
        pruner.step()
    pruner.finish()
    pruned = {target.module_name for target in pruner.weights.values()}
    zeros = {name: value for name, value in zeros_of(model).items() if name in pruned}
    assert pruner.reached_sparsity() >= 0.5
    for merge in ({}, {"safe_merge": True}):
        found = zeros_of(copy.deepcopy(model).merge_and_unload(**merge))
        assert_equal({name: found[name] for name in pruned}, zeros)
    model.merge_adapter()
    model.unmerge_adapter()
    assert {parameter.dtype for name, parameter in model.named_parameters() if "base_layer" in name} == {dtype}


# ---------------------------------------------------------------------------------------------------------------------- resuming


RESUMED = {
    "head": config("head", criterion="snip_momentum"),
    "4x1": config("4x1", criterion="snip_momentum"),
    "movement": config("4x1", criterion="movement"),
    "movement of heads": config("head", criterion="movement"),
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_resumes_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    """Checkpoints hold adapters alone; the zeros of the base model come from the pruner's state."""
    overrides = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = train(tmp_path / "whole", family, RESUMED[kind], **overrides)
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()
    resumed = Trainer(
        model=adapted(family, init_lora_weights=True),
        args=arguments(tmp_path / "whole", learning_rate=1e-2, **overrides),
        train_dataset=rows(family),
        callbacks=[PruningCallback(RESUMED[kind])],
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(snapshot(resumed.model), snapshot(whole.model))
    assert_equal(pruner_of(resumed).state_dict(), pruner_of(whole).state_dict())
    assert pruner_of(resumed).reached_sparsity() == 0.5


def test_best_checkpoint_keeps_its_zeros(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        "llama",
        config("4x1", criterion="snip_momentum", cooldown_steps=6),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.3,
    )
    best, metric = trainer.state.best_global_step, trainer.state.best_metric
    assert best is not None
    assert 2 <= best < 8
    assert pruner_of(trainer).reached_sparsity() == 0.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metric, abs=1e-6)
    assert sparsity_report(trainer.model.merge_and_unload()).sparsity == 0.5


def test_saved_masks_prune_a_fresh_base_model(tmp_path: Path) -> None:
    """What an adapter's checkpoint and the masks beside it hold is enough to make the pruned model again."""
    trainer = train(tmp_path, "llama", config("4x1", criterion="snip_momentum"), save_strategy="steps", save_steps=8)
    folder = tmp_path / "checkpoint-8"
    again = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    pruner = Pruner(again, PruningConfig.from_pretrained(folder), total_steps=8)
    pruner.load_state_dict(load_file(folder / STATE_NAME))
    pruner.finish()
    assert_equal(snapshot(again.merge_and_unload()), snapshot(trainer.model.merge_and_unload()))


# ------------------------------------------------------------------------------------------------------- names, and what is refused


@pytest.mark.parametrize("names", [["q_proj"], ["layers.1.self_attn.q_proj"], r"model\.layers\.0\..*", None])
@pytest.mark.parametrize("pattern", ["2:4", "head"])
def test_names_are_those_without_adapters(pattern: str, names: Any) -> None:
    """A config means the same with LoRA as without: module names, groups, state."""
    settings = config(pattern, criterion="magnitude", target_modules=names)
    plain, under = Pruner(base(), settings, 1), Pruner(adapted(), settings, 1)
    assert under.plan() == plain.plan()
    assert under.state_dict().keys() == plain.state_dict().keys()
    assert not [name for name, _ in prunable_modules(adapted()) if "lora" in name or "base_layer" in name]


def test_adapter_added_by_transformers() -> None:
    """`model.add_adapter` puts LoRA layers into the model without a PeftModel around it."""
    model, inputs = base(), batch("llama")
    model.add_adapter(LoraConfig(r=4, target_modules=CASES["llama"][1]))
    pruner = Pruner(model, config("4x1", criterion="snip"), 2)
    list(steps(model, pruner, inputs, 2))
    assert pruner.reached_sparsity() == 0.5
    assert all(2 * int((value == 0).sum()) == value.numel() for value in merged_weights(model).values())


def test_modules_to_save() -> None:
    """The trained copy is what counts, under the module's own name, in the body and in the head."""
    model = adapted("bert", modules_to_save=["pooler", "classifier"])
    inputs = batch("bert")
    pruner = Pruner(model, config("1x1", criterion="snip", target_modules=["pooler.dense", "classifier", "query"]), 4)
    original = model.get_base_model().classifier.original_module.weight.detach().clone()
    list(steps(model, pruner, inputs, 4))
    pruner.finish()
    assert torch.equal(model.get_base_model().classifier.original_module.weight, original)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= pruner.weights.keys()
    merged = model.merge_and_unload()
    for name in pruner.weights:
        value = merged.get_parameter(name)
        assert 2 * int((value == 0).sum()) == value.numel()
    assert not torch.equal(merged.classifier.weight[merged.classifier.weight != 0], original[merged.classifier.weight != 0])


@pytest.mark.parametrize("settings", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_leave_the_weights_alone(settings: Any) -> None:
    """Methods that learn a prompt keep every weight as it is, frozen: they are pruned as ever, by what needs no gradient."""
    inputs = batch("bert")
    del inputs["labels"]
    model = get_peft_model(base("bert"), settings(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="frozen"):
        Pruner(model, config("head", criterion="snip"), 1)
    pruner = Pruner(model, config("head", criterion="magnitude"), 2)
    for _ in range(2):
        pruner.step()
    before = logits(model, inputs)
    pruner.finish()
    assert pruner.reached_sparsity() == 0.5
    if settings is PrefixTuningConfig:
        with pytest.raises(ValueError, match="prefix tuning"):
            condense(model)
        return
    condense(model)
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=0)


def two_active() -> PeftModel:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=CASES["llama"][1]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged_in() -> PeftModel:
    model = adapted()
    model.merge_adapter()
    return model


def in_eight_bits() -> PeftModel:
    model = adapted()
    for layer in lora_layers(model).values():
        layer.base_layer.weight = nn.Parameter(torch.zeros_like(layer.base_layer.weight, dtype=torch.int8), requires_grad=False)
    return model


def with_ia3() -> PeftModel:
    return get_peft_model(base(), IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]))


def with_tied_head() -> PeftModel:
    model = base(tie_word_embeddings=True)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))


REFUSED: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "DoRA": (lambda: adapted(use_dora=True), "LoRA variant, DoraLinearVariant"),
    "two active adapters": (two_active, "default, second are active together"),
    "merged adapter": (merged_in, "merged or disabled"),
    "IA3": (with_ia3, r"ia3\.layer\.Linear"),
    "AdaLoRA": (
        lambda: get_peft_model(base(), AdaLoraConfig(target_modules=CASES["llama"][1], init_r=4, target_r=2, total_step=10)),
        "adalora",
    ),
    "bias without a bias": (lambda: adapted(lora_bias=True), "lora_bias=True"),
    "eight bits": (in_eight_bits, r"quantized \(torch.int8\)"),
}


@pytest.mark.parametrize("pattern", ["2:4", "head"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_the_first_step(kind: str, pattern: str) -> None:
    make, reason = REFUSED[kind]
    model = make()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rf"target_modules.*model.layers.0.self_attn.*{reason}"):
        Pruner(model, config(pattern, criterion="magnitude"), 1)
    assert_equal(snapshot(model), before)
    Pruner(base(), config(pattern, criterion="magnitude"), 1)


def test_refused_on_a_tied_weight() -> None:
    with pytest.raises(ConfigError, match=r"'lm_head', whose weight another module shares"):
        Pruner(with_tied_head(), config("2:4", criterion="magnitude", target_modules=["lm_head"]), 1)
    Pruner(with_tied_head(), config("2:4", criterion="magnitude"), 1)


def test_refused_on_sharded_weights(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted()
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.q_proj', which has a LoRA adapter and is sharded"):
            Pruner(model, config("2:4", criterion="magnitude"), 1)
    finally:
        dist.destroy_process_group()


def test_other_adapters_may_stay_where_nothing_is_pruned() -> None:
    pruner = Pruner(with_ia3(), config("2:4", criterion="magnitude", target_modules=["up_proj"]), 1)
    assert len(pruner.plan().groups) == 3


def test_works_where_peft_is_not_installed() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "peft" else find(name, *rest)
import models
from hf_prune import Pruner, PruningConfig, condense
model = models.tiny("bert")
pruner = Pruner(model, PruningConfig(pattern="head", criterion="magnitude"), 1)
pruner.step()
pruner.finish()
condense(model)
assert "peft" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0
