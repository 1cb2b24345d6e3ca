"""The report counts what is there, and prints it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_bert
from models import ragged_batch
from torch import nn

from hf_prune import condense, sparsity_report
from hf_prune.report import benchmark, original_blocks


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


def test_the_benchmark_times_each_model_and_leaves_modes_alone() -> None:
    small, large = tiny_bert(num_hidden_layers=1), tiny_bert(num_hidden_layers=1).train()
    threads = torch.get_num_threads()
    times = benchmark({"small": small, "large": large}, ragged_batch(small), repeats=2)
    assert set(times) == {"small", "large"}
    assert min(times.values()) > 0
    assert large.training
    assert not small.training
    assert torch.get_num_threads() == threads
