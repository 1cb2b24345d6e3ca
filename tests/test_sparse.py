"""Sparse kernels compute what the dense layer does, run only where they are faster, and leave checkpoints plain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune import to_sparse
from hf_prune.measure import sparse
from hf_prune.measure.sparse import SparseLinear

#: Format → blocks of zeros that suit it.
BLOCKS = {"csr": (4, 1), "bsr": (8, 8), "onednn": (1, 1)}


def ranked(*kernels: str) -> Callable[..., dict[str, float]]:
    """Stands in for the clock: what is named first is fastest, the rest takes as long as dense."""
    return lambda models, *_: {name: 1.0 - 0.1 * (name in kernels and len(kernels) - kernels.index(name)) for name in models}


@torch.no_grad()
def zero_blocks(weight: Tensor, block: tuple[int, int], share: float, seed: int = 0) -> None:
    rows, columns = weight.shape[0] // block[0], weight.shape[1] // block[1]
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= share
    weight.mul_(kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", BLOCKS)
@torch.no_grad()
def test_sparse_linear(format: str, bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(40, 64, bias=bias)
    zero_blocks(dense.weight, BLOCKS[format], 0.7)
    layer = SparseLinear(dense, format)
    for shape in ((40,), (3, 40), (2, 3, 40)):
        batch = torch.randn(shape)
        torch.testing.assert_close(layer(batch), dense(batch))
    assert layer.sparse_weight() is layer.sparse_weight()
    assert layer.state_dict().keys() == dense.state_dict().keys()
    dense.weight[0] += 1  # the same parameter
    torch.testing.assert_close(layer(batch), dense(batch))
    torch.testing.assert_close(copy.deepcopy(layer)(batch), dense(batch))
    torch.testing.assert_close(layer.double()(batch.double()), dense(batch.double()))


@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle", "assigned"])
def test_edits_of_data_are_noticed(copied: str) -> None:
    dense = nn.Linear(16, 8)
    zero_blocks(dense.weight, (4, 1), 0.5)
    layer, batch = SparseLinear(dense, "csr"), torch.randn(3, 16)
    with torch.no_grad():
        layer(batch)
        if copied == "deepcopy":
            layer = copy.deepcopy(layer)
        elif copied == "pickle":
            layer = pickle.loads(pickle.dumps(layer))
        elif copied == "assigned":
            layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
        layer(batch)
        layer.weight.data[0] = 3
        torch.testing.assert_close(layer(batch), nn.functional.linear(batch, layer.weight, layer.bias))
        assert layer.sparse_weight() is layer.sparse_weight()
        layer.weight.data += 1  # as PEFT merges
        torch.testing.assert_close(layer(batch), nn.functional.linear(batch, layer.weight, layer.bias))
    assert isinstance(layer.weight, nn.Parameter)
    assert type(layer.state_dict()["weight"]) is Tensor
    layer(batch).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


@torch.no_grad()
def test_the_prepacked_layer_runs_dense_in_other_types() -> None:
    dense, batch = nn.Linear(16, 8), torch.randn(3, 16)
    layer = SparseLinear(dense, "onednn")
    torch.testing.assert_close(layer(batch), dense(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch).equal(dense(batch))
    assert layer.bfloat16()(batch.bfloat16()).equal(dense(batch.bfloat16()))


def test_training_is_dense() -> None:
    dense = nn.Linear(16, 8)
    zero_blocks(dense.weight, (4, 1), 0.5)
    layer, batch = SparseLinear(dense, "csr"), torch.randn(3, 16, requires_grad=True)
    layer(batch).square().sum().backward()
    assert dense.weight.grad is not None
    assert batch.grad is not None


def pruned(share: float = 0.6) -> PreTrainedModel:
    """A BERT of one layer, most of its FFN zero, its queries with a tenth of zeros."""
    model = models.tiny("bert", num_hidden_layers=1)
    layer = model.bert.encoder.layer[0]
    for module in (layer.intermediate.dense, layer.output.dense):
        zero_blocks(module.weight, (8, 8), share)
    zero_blocks(layer.attention.self.query.weight, (1, 1), 0.1)
    return model


SPARSE = ["attention.self.query", "intermediate.dense", "output.dense"]


def test_layers_and_the_model_are_decided_by_measuring() -> None:
    model = pruned()
    training = {name: module.training for name, module in model.named_modules()}
    report = to_sparse(model)
    for layer in report.layers:
        assert bool(layer.milliseconds) == (layer.sparsity > 0)
        if layer.milliseconds:
            limit = 0.95 * layer.milliseconds["dense"]
            others = {kernel: ms for kernel, ms in layer.milliseconds.items() if kernel != "dense"}
            assert set(others) == {"csr", "onednn"}
            assert layer.kernel == "dense" or layer.milliseconds[layer.kernel] <= limit
            assert (layer.reason == "dense is as fast") == (min(others.values()) > limit)
    assert report.speedup >= 1 / 0.95 or all(layer.kernel == "dense" for layer in report.layers)
    assert {name: module.training for name, module in model.named_modules()} == training


@pytest.mark.parametrize("format", BLOCKS)
def test_sparse_model_is_equal_and_its_checkpoint_plain(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "benchmark", ranked(format))
    model = pruned()
    batch, state = models.ragged_batch(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(**batch).logits
        report = to_sparse(model, format)
        after = model(**batch).logits
    rows = {row["name"].removeprefix("bert.encoder.layer.0."): row for row in report.to_dict()["layers"]}
    assert [name for name, row in rows.items() if row["kernel"] == format] == SPARSE
    assert {row["reason"] for row in rows.values() if row["kernel"] == "dense"} == {"no zeros"}
    assert report.speedup == report.to_dict()["speedup"] == pytest.approx(1 / 0.9)
    for text in (str(report), capsys.readouterr().out):
        assert "3 of 7 layers run another kernel; the model is 1.11 times as fast" in " ".join(text.split())
    swapped = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    assert swapped == [f"bert.encoder.layer.0.{name}" for name in SPARSE]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(saved[name].equal(value) for name, value in state.items())
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, SparseLinear) for module in loaded.modules())


@pytest.mark.parametrize(
    ("ms", "kernel", "reason"),
    [
        ({"csr": 0.96, "onednn": 0.96}, "dense", "dense is as fast"),
        ({"csr": 0.94, "onednn": 1.0}, "csr", ""),
        ({"csr": 0.94, "onednn": 0.9}, "onednn", ""),
        ({"csr": 0.9, "onednn": 0.9, "fastest": 0.96, "whole": 0.96}, "dense", "the whole model gains nothing"),
    ],
)
def test_dense_stays_where_it_is_faster(ms: dict[str, float], kernel: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(models: dict[str, nn.Module], *args: Any) -> dict[str, float]:
        whole = any(isinstance(model, PreTrainedModel) for model in models.values())
        return {name: ms.get("whole" if whole else name, ms.get(name, 0.8)) if name != "dense" else 1.0 for name in models}

    monkeypatch.setattr(sparse, "benchmark", measured)
    model = pruned()
    report = to_sparse(model, "csr")
    assert {layer.kernel for layer in report.layers if layer.sparsity} == {kernel}
    assert {layer.reason for layer in report.layers if layer.sparsity} == {reason}
    swapped = {module.format for module in model.modules() if isinstance(module, SparseLinear)}
    assert swapped == {kernel} - {"dense"}
    assert (report.speedup == 1.0) == (kernel == "dense")


def test_a_kernel_that_fails_or_gives_something_else_leaves_the_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(sparse.FORMATS, "csr", broken)
    monkeypatch.setitem(sparse.FORMATS, "onednn", lambda weight: torch.ops.mkldnn._reorder_linear_weight(2 * weight, None))
    layers = [layer for layer in to_sparse(pruned()).layers if layer.sparsity]
    assert {layer.kernel for layer in layers} == {"dense"}
    assert {layer.reason for layer in layers} == {"csr: no such kernel; onednn: the kernel gives something else"}


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "benchmark", ranked())
    model = pruned()
    with pytest.raises(ValueError, match="format='coo': allowed are 'csr', 'bsr', 'semi_structured', 'onednn'"):
        to_sparse(model, "coo")
    reasons = {layer.reason for layer in to_sparse(model, "semi_structured").layers}
    assert reasons == {"no zeros", "dense is as fast; semi_structured: it is not 2:4 sparse"}
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.view(-1, 4)[:, :2] = 0
    if not torch.cuda.is_available():
        assert to_sparse(model, "semi_structured").layers[5].reason.endswith("the kernel for 2:4 needs CUDA")
    odd = models.tiny("gpt2")
    with torch.no_grad():
        odd.transformer.h[0].mlp.c_fc.weight[0] = 0
    assert {layer.kernel for layer in to_sparse(odd, "bsr").layers} == {"dense"}
