"""The report counts what is there, and prints it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import transformers
from helpers import tiny_bert
from models import ragged_batch, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

from hf_prune import ConfigError, Pruner, PruningConfig, condense, sparsity_report
from hf_prune.hub import model_card
from hf_prune.measure.latency import benchmark
from hf_prune.measure.sparsity import original_blocks, total_sparsity


def test_counts_equal_the_weights() -> None:
    model = tiny_bert(num_hidden_layers=2)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight[:, 8:24] = 0
        layer.output.dense.weight[:, ::4] = 0
        layer.attention.self.query.weight[0, 0] = 0
        model.classifier.weight.zero_()
    report = sparsity_report(model)
    body = {name: module for name, module in model.bert.named_modules(prefix="bert") if isinstance(module, nn.Linear)}
    assert {module.name: (module.zeros, module.parameters) for module in report.modules} == {
        name: (int((module.weight == 0).sum()), module.weight.numel()) for name, module in body.items()
    }
    zeros = 32 * 16 + 32 * 10 + 1
    assert report.sparsity == pytest.approx(zeros / sum(module.weight.numel() for module in body.values()))
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [(block.kind, block.units, block.alive) for block in report.blocks][:2] == [("heads", 4, 2), ("neurons", 40, 30)]
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["alive"] == 2
    condense(model.eval())
    assert [(block.units, block.alive) for block in sparsity_report(model).blocks][:2] == [(2, 2), (30, 30)]


def test_units_that_are_constant_are_dead_as_condense_sees_them() -> None:
    model = tiny_bert()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.self.value.weight[:8] = 0
        layer.intermediate.dense.weight[5:12] = 0
    assert [block.alive for block in sparsity_report(model).blocks][:2] == [3, 33]
    assert [block.alive for block in original_blocks(condense(model.eval()))][:2] == [3, 33]


def test_it_prints_every_module_and_block() -> None:
    report = sparsity_report(tiny_bert(num_hidden_layers=1))
    text = str(report)
    for row in (*report.modules, *report.blocks):
        assert row.name in text
    assert "4 of 4 heads" in text


def test_shared_weights_are_counted_once() -> None:
    model = tiny_bert(num_hidden_layers=2)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    before = sum(module.parameters for module in sparsity_report(model).modules)
    second.weight = first.weight
    assert sum(module.parameters for module in sparsity_report(model).modules) == before - first.weight.numel()


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_the_benchmark_times_each_model_and_leaves_modes_alone(runtime: str) -> None:
    small, large = tiny_bert(num_hidden_layers=1), tiny_bert(num_hidden_layers=1).train()
    threads = torch.get_num_threads()
    times = benchmark({"small": small, "large": large}, ragged_batch(small), repeats=2, runtime=runtime)
    assert set(times) == {"small", "large"}
    assert min(times.values()) > 0
    assert large.training
    assert not small.training
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------- what counts and cannot be pruned


def experts() -> PreTrainedModel:
    """A tiny Mixtral: the weights of its experts are two 3-dimensional parameters a layer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return transformers.MixtralForCausalLM(config)


def counted(model: PreTrainedModel) -> dict[str, int]:
    """Zeros and elements of all that is multiplied in a model's body, as a stranger would count them."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [one for one in model.base_model.parameters() if one.ndim > 1 and one.shape[0] > 1 and id(one) not in tables]
    return {"zeros": sum(int((one == 0).sum()) for one in weights), "elements": sum(one.numel() for one in weights)}


def test_experts_count_and_are_listed_as_left_out() -> None:
    model = experts()
    pruner = Pruner(model, PruningConfig(pattern="1x1", criterion="magnitude", schedule="constant"), total_steps=2)
    pruner.step()
    truth, report = counted(model), sparsity_report(model)
    assert sum(module.parameters for module in report.modules) == truth["elements"]
    assert [report.sparsity, total_sparsity(model)] == pytest.approx([truth["zeros"] / truth["elements"]] * 2)
    assert pruner.reached_sparsity() == pytest.approx(0.5, abs=1e-4)
    names = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "experts.gate_up_proj", "experts.down_proj")}
    assert {module.name for module in report.modules if module.left_out} == names
    assert names == {name for name, reason in pruner.plan().left_out.items() if "not a linear or convolutional layer" in reason}
    pruner.finish()
    for text in (str(report), str(model_card(model)), str(pruner.plan())):
        assert "belongs to MixtralExperts, which is not a linear or convolutional layer" in text
    with pytest.raises(ConfigError, match=r"names 'model\.layers\.0\.mlp\.experts\.down_proj', but it belongs to"):
        Pruner(model, PruningConfig(pattern="1x1", target_modules=["experts.down_proj"]), total_steps=2)


def by_parametrize(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def by_prune(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def by_hook(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("compute", [by_parametrize, by_prune, by_hook])
@pytest.mark.parametrize(
    "pattern", ["1x1", "2:4", "4x1", "1xchannel", "channelx1", "head", "neuron", "auto", "block", "keep_zeros"]
)
def test_a_computed_weight_is_left_out_with_the_reason(pattern: str, compute: Callable[[nn.Module], None]) -> None:
    model = tiny_bert(num_hidden_layers=2)
    names = ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.intermediate.dense"]
    for name in names:
        compute(model.get_submodule(name))
    settings = {"keep_zeros": True} if pattern == "keep_zeros" else {"pattern": pattern, "criterion": "magnitude"}
    pruner = Pruner(model, PruningConfig(**settings, schedule="constant"), total_steps=2)
    pruner.step()
    left_out = pruner.plan().left_out
    reasons = [reason for reason in left_out.values() if "its weight is not a parameter but computed from" in reason]
    assert len(reasons) >= 2
    assert set(names) <= set(left_out)
    pruner.release()
    modules = {module.name: module for module in sparsity_report(model).modules}
    for name in names:
        weight = model.get_submodule(name).weight
        assert (modules[name].zeros, modules[name].parameters) == (int((weight == 0).sum()), weight.numel())
        assert modules[name].left_out in reasons
    assert "computed from" in str(model_card(model))
    if pattern in ("1x1", "keep_zeros"):
        with pytest.raises(ConfigError, match="is not a parameter but computed from"):
            Pruner(model, PruningConfig(**settings, target_modules=names), total_steps=2)


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-stable"])
def test_sound_has_reports_cards_and_smaller_models(family: str) -> None:
    model = tiny(family)
    loose = [module for module in sparsity_report(model).modules if module.left_out]
    assert [module.name for module in loose] == ["wav2vec2.encoder.pos_conv_embed.conv"]
    assert loose[0].parameters == model.wav2vec2.encoder.pos_conv_embed.conv.weight.numel()
    pruner = Pruner(model, PruningConfig(pattern="head", criterion="magnitude", schedule="constant"), total_steps=2)
    pruner.step()
    pruner.finish()
    before = total_sparsity(model)
    condense(model)
    assert total_sparsity(model) == pytest.approx(before, abs=1e-2)
    assert "parametrizations.weight.original0" in str(model_card(model))


def test_names_that_keep_zeros_alone_does_not_find() -> None:
    with pytest.raises(ConfigError, match=r"target_modules='qery'.*Did you mean 'query'"):
        Pruner(tiny_bert(num_hidden_layers=1), PruningConfig(keep_zeros=True, target_modules=["qery"]), total_steps=2)
