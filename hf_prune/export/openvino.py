"""OpenVINO, converted from ONNX by OpenVINO itself, quantized by NNCF.

The file is `openvino/openvino_model.xml`, with its weights beside it: where optimum-intel and sentence-transformers look for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure.running import quietly
from .compare import Run, one_sentence
from .graphs import Shapes, check_inputs

#: Of a graph's name, the name of its file.
FILE = "openvino/openvino_{}.xml"


def write(source: Path, file: Path, batches: Sequence[Mapping[str, Tensor]] | None = None) -> None:
    """Convert an ONNX file.

    Args:
        source: the ONNX file.
        file: the `.xml` to write; its folder is made, and the weights go into a `.bin` beside it.
        batches: rows to find the scales of an int8 model by; without them it stays in float32.

    Raises:
        ExportError: OpenVINO or NNCF do not take it; gives their reason.
    """
    import openvino

    with one_sentence("OpenVINO does not convert the model"), quietly():
        model: Any = openvino.convert_model(source)
    if batches is not None:
        import nncf

        names = [entry.any_name for entry in model.inputs]
        rows = nncf.Dataset(list(batches), lambda batch: {name: batch[name].numpy() for name in names})
        with one_sentence("NNCF does not quantize the model"), quietly():
            model = nncf.quantize(model, rows, subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER)
    file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, file, compress_to_fp16=False)


def open_file(file: Path, threads: int = 0, precision: str = "f32") -> tuple[Run, Shapes]:
    """A file in OpenVINO, on the CPU, and the shapes of its inputs.

    Args:
        file: the `.xml`, or an ONNX file.
        threads: 0: as many as it likes.
        precision: what it computes in, `"f32"` or `"bf16"`; int8 where the file is.

    Raises:
        ExportError: it does not load.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    with one_sentence(f"OpenVINO does not load {file.name}"):
        request = openvino.compile_model(file, "CPU", settings).create_infer_request()
    model = request.get_compiled_model()
    shapes = {
        entry.any_name: tuple(size.get_length() if size.is_static else None for size in entry.partial_shape)
        for entry in model.inputs
    }
    outputs = [entry.any_name for entry in model.outputs]

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_inputs(shapes, batch)
        with one_sentence("OpenVINO does not run the file"):
            request.infer({name: batch[name].cpu().numpy() for name in shapes})
        return {name: torch.from_numpy(request.get_output_tensor(place).data.copy()) for place, name in enumerate(outputs)}

    return run, shapes
