"""Condensed models leave Python: ONNX, torch.export and torch.compile give what the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from hf_prune import condense

#: Family → task head. One encoder, one decoder, one of both; the rest is slow.
CASES = {"bert": "sequence-classification", "llama": "causal-lm", "t5": "seq2seq-lm"}
ALL = [
    pytest.param(family, head, marks=() if family in CASES else pytest.mark.slow)
    for family, head in ({family: models.heads_of(family)[-1] for family in models.FAMILIES} | CASES).items()
]


def condensed(family: str, head: str) -> PreTrainedModel:
    """Uneven sizes, nothing left in the first layer of each list but what its biases add."""
    model = models.tiny(family, head, use_cache=False)  # a cache in the output cannot be exported, of stock models neither
    models.prune_randomly(model)
    models.empty_layers(model, {0})
    return condense(model, verify=False)


def first(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**batch, return_dict=True)[0]
    return output


def separate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch; no tensor stands under two names."""
    return {name: value.clone() for name, value in batch.items()}


@pytest.mark.parametrize(("family", "head"), ALL)
def test_onnx(family: str, head: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = condensed(family, head)
    if family.startswith(("t5", "mistral")):
        model.set_attn_implementation(
            "eager"
        )  # the stock models too: the exporter fails for T5's sdpa, and Mistral's comes out wrong
    batch = separate(models.ragged_batch(model))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), str(path), kwargs=batch, dynamo=True, output_names=["first"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(["first"], {put.name: batch[put.name].numpy() for put in session.get_inputs()})[0]
    assert float((torch.from_numpy(given) - first(model, batch)).abs().max()) <= 1e-5


def test_onnx_takes_batches_of_any_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = condensed("bert", "sequence-classification")
    batch = models.ragged_batch(model)
    path, any_size = tmp_path / "model.onnx", {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes: dict[str, Any] = dict.fromkeys(batch, any_size)
    torch.onnx.export(model, (), str(path), kwargs=batch, dynamo=True, dynamic_shapes=shapes, output_names=["first"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, tokens in ((4, 11), (2, 5), (7, 20)):
        other = models.ragged_batch(model, rows, tokens)
        given = session.run(["first"], {name: value.numpy() for name, value in other.items()})[0]
        assert float((torch.from_numpy(given) - first(model, other)).abs().max()) <= 1e-5


@pytest.mark.parametrize(("family", "head"), ALL)
def test_torch_export(family: str, head: str) -> None:
    model = condensed(family, head)
    batch = separate(models.ragged_batch(model))
    with torch.no_grad():
        given = torch.export.export(model, (), kwargs=batch).module()(**batch)
    assert float((given[0] - first(model, batch)).abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "head"), ALL)
def test_torch_compile(family: str, head: str, backend: str) -> None:
    model = condensed(family, head)
    batch = models.ragged_batch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert float((first(compiled, batch) - first(model, batch)).abs().max()) <= 1e-5
