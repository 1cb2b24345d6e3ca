"""ONNX, by `torch.onnx`'s exporter, run and quantized by ONNX Runtime.

The file is `onnx/model.onnx`, with tokenizer and config beside the folder: where optimum, Transformers.js, sentence-transformers
and text-embeddings-inference look for it; an encoder-decoder that writes has two. Batch and length may have any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure.running import quietly, session
from ..settings.errors import ConfigError
from .compare import Run, one_sentence
from .graphs import Graph, Shapes, check_inputs

#: Of a graph's name, the name of its file.
FILE = "onnx/{}.onnx"
#: The oldest opset that the exporter writes.
OLDEST_OPSET = 18
#: What computes with a weight, and is quantized.
_QUANTIZED = ["MatMul", "Gemm", "Gather"]


def check_opset(opset: int | None) -> None:
    """Raise unless an opset can be written.

    Raises:
        ConfigError: it is older than the exporter writes, or newer than onnx knows.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ConfigError("opset", opset, f"must be from {OLDEST_OPSET} to {newest}.")


def write(graph: Graph, file: Path, opset: int | None = None) -> None:
    """Write a graph, with batch and length of any size.

    Args:
        graph: the graph, of a model as `as_exported` has it.
        file: the file to write; its folder is made.
        opset: the version of ONNX's operators; by default what the exporter recommends.

    Raises:
        ExportError: the exporter does not take the model; gives its reason.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    name = type(graph.module.model if graph.packed else graph.module).__name__
    with one_sentence(f"torch.onnx does not export {name}"), quietly():
        program: Any = torch.onnx.export(graph.module, (), **graph.options(), dynamo=True, opset_version=opset, verbose=False)
    ClearMetadataAndDocStringPass()(program.model)  # the lines of code that an operator came from, with their paths
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ConfigError("opset", opset, f"cannot express {name}; the exporter wrote opset {written}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    program.save(file)


def quantize(file: Path, how: str, batches: Sequence[Mapping[str, Tensor]] = ()) -> None:
    """Let a file's matrix products and embeddings be in int8.

    Args:
        file: what [`write`] wrote; it is replaced.
        how: `"int8-dynamic"`: the scale of activations is found for each batch; or `"int8"`: it is found once, from `batches`.
        batches: calibration rows, as the file takes them.
    """
    import onnx
    from onnxruntime import quantization

    with one_sentence("ONNX Runtime's quantizer does not take the model"), quietly():
        model: Any = onnx.load(file)
        del model.graph.value_info[:]  # the exporter's shapes, which are in the way of the quantizer's own
        common: dict[str, Any] = {
            "op_types_to_quantize": _QUANTIZED,
            "per_channel": True,
            "weight_type": quantization.QuantType.QInt8,
        }
        if how == "int8-dynamic":
            quantization.quantize_dynamic(model, file, **common)
        else:
            quantization.quantize_static(
                model,
                file,
                _reader(file, batches),
                activation_type=quantization.QuantType.QUInt8,
                extra_options={
                    "MatMulConstBOnly": True,  # not of queries with keys: that is slower and less exact
                    # nor what comes out: it is added up and normalized in float32 in any case, and has values far from all others
                    "OpTypesToExcludeOutputQuantization": _QUANTIZED,
                },
                **common,
            )


def _reader(file: Path, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    """Batches as the quantizer reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    names = [entry.name for entry in session(file).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[Any] = iter([{name: batch[name].numpy() for name in names} for batch in batches])

        def get_next(self) -> Any:
            return next(self.rows, None)

    return Reader()


def open_file(file: Path, threads: int = 0) -> tuple[Run, Shapes]:
    """A file in ONNX Runtime, on the CPU, and the shapes of its inputs; 0 threads: as many as it likes.

    Raises:
        ExportError: it does not load.
    """
    with one_sentence(f"ONNX Runtime does not load {file.name}"):
        opened = session(file, threads)
    shapes = {entry.name: tuple(entry.shape) for entry in opened.get_inputs()}
    outputs = [entry.name for entry in opened.get_outputs()]

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_inputs(shapes, batch)
        with one_sentence("ONNX Runtime does not run the file"):
            given = opened.run(outputs, {name: batch[name].cpu().numpy() for name in shapes})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, given)}

    return run, shapes
