"""From a model to a folder for another runtime: file, config, tokenizer and companions, compared with PyTorch; all or nothing."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from ..files import check_new_folder, new_folder
from ..hub.files import carry_over
from ..measure.memory import megabytes
from ..measure.running import ONNX_PACKAGES, as_exported
from ..measure.tables import as_text
from ..model.changeable import check_changeable
from ..oneshot.calibration import calibration
from ..oneshot.data import load_tokenizer
from ..settings.checks import check_installed
from ..settings.errors import ConfigError, closest
from . import gguf, onnx, openvino, per_layer_config
from .compare import Agreement, compare
from .graphs import Graph, graphs_of, joined
from .inputs import check_finite, example_batches, outputs_of

#: One batch of so many is held out: no scale is chosen by it.
_HELD_OUT = 10


@dataclass(frozen=True)
class Job:
    """What is to be written: the model as `as_exported` has it and as it is, its config, batches of the inputs that the file takes,
    the folder, and how."""

    model: Any
    original: PreTrainedModel
    config: Any
    examples: Sequence[dict[str, Tensor]]
    folder: Path
    quantize: str | None
    batches: Sequence[Mapping[str, Tensor]]
    opset: int | None

    def expected(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PyTorch gives."""
        return outputs_of(self.model, batch)

    def calibration_of(self, graph: Graph) -> list[dict[str, Tensor]]:
        """What scales of a graph are chosen by, as its file takes it; nothing where they are found for each batch."""
        if self.quantize != CALIBRATED:
            return []
        kept = [batch for place, batch in enumerate(self.batches) if place % _HELD_OUT]
        return [graph.feed(batch) for batch in kept or self.batches]

    @property
    def compared(self) -> list[Mapping[str, Tensor]]:
        """What the file is compared on: rows that no scale was chosen by, and for any file batches of several shapes."""
        held_out = self.batches[::_HELD_OUT] if self.quantize == CALIBRATED else self.batches
        return [*held_out] if self.quantize and held_out else [*self.examples, *held_out]


@dataclass(frozen=True)
class Format:
    """A format: what it needs, what it can be, and what writes it.

    Attributes:
        runtime: the package that the file is compared in.
        packages: all that have to be there.
        extra: what `pip install hf-prune[…]` calls them.
        quantizations: what a file can be quantized to → what packages that needs besides.
        write: writes below the job's folder and compares; returns the file's name and how it agrees.
        check: raises if it cannot take a model.
    """

    runtime: str
    packages: tuple[str, ...]
    extra: str
    quantizations: Mapping[str, tuple[str, ...]]
    write: Callable[[Job], tuple[str, Agreement]]
    check: Callable[[PreTrainedModel], None] = check_changeable


#: What needs calibration rows.
CALIBRATED = "int8"


def _onnx(job: Job) -> tuple[str, Agreement]:
    for graph in graphs_of(job.model, job.examples[0]):
        file = job.folder / onnx.FILE.format(graph.name)
        onnx.write(graph, file, job.opset)
        if job.quantize:
            onnx.quantize(file, job.quantize, job.calibration_of(graph))
    run = joined(file, onnx.open_file)
    return file.relative_to(job.folder).as_posix(), compare(run, job.expected, job.compared, bool(job.quantize))


def _openvino(job: Job) -> tuple[str, Agreement]:
    with tempfile.TemporaryDirectory(dir=job.folder.parent) as beside:
        for graph in graphs_of(job.model, job.examples[0]):
            source, file = Path(beside, f"{graph.name}.onnx"), job.folder / openvino.FILE.format(graph.name)
            onnx.write(graph, source)
            openvino.write(source, file, job.calibration_of(graph) if job.quantize else None)
    run = joined(file, openvino.open_file)
    return file.relative_to(job.folder).as_posix(), compare(run, job.expected, job.compared, bool(job.quantize))


def _gguf(job: Job) -> tuple[str, Agreement]:
    tokenizer = load_tokenizer(job.folder)
    file = gguf.write(job.model, job.folder, job.quantize, tokenizer)
    prompts = gguf.prompts_of([*job.batches, *job.examples])
    return gguf.FILE, gguf.compare(job.model, tokenizer, file, prompts, job.quantize == "q8_0")


def _per_layer_config(job: Job) -> tuple[str, Agreement]:
    per_layer_config.write(job.original, job.config, job.folder)
    run, exact = per_layer_config.open_folder(job.folder), job.original.dtype == torch.float32
    return per_layer_config.FILE, compare(run, job.expected, job.compared, quantized=not exact)


FORMATS: dict[str, Format] = {
    "onnx": Format("onnxruntime", ONNX_PACKAGES, "onnx", {"int8": (), "int8-dynamic": ()}, _onnx),
    "openvino": Format("openvino", ("onnx", "onnxscript", "openvino"), "openvino", {"int8": ("nncf",)}, _openvino),
    "gguf": Format("xllamacpp", ("gguf", "xllamacpp"), "gguf", dict.fromkeys(gguf.QUANTIZATIONS, ()), _gguf, gguf.check_model),
    "per-layer-config": Format("transformers", (), "", {}, _per_layer_config, per_layer_config.check_model),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written. Prints as a table.

    Attributes:
        format: of `FORMATS`.
        quantize: to what, if at all.
        file: the file, below the folder.
        bytes: of that file and what belongs to it.
        runtime: what it was compared in, with its version.
        agreement: how it compares with PyTorch.
        left_out: file beside the model → why it was left behind.
    """

    format: str
    quantize: str | None
    file: str
    bytes: int
    runtime: str
    agreement: Agreement
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        found = self.agreement
        table = Table("", "", title=self.file, show_header=False)
        table.add_row("size", megabytes(self.bytes))
        table.add_row("compared in", f"{self.runtime}, on {found.rows:,} rows")
        table.add_row("largest difference", f"{found.difference:.1e} {found.unit}")
        table.add_row("error", f"{found.error:.1e} {found.unit}, root mean square")
        if found.same is not None:
            table.add_row("same predictions as PyTorch", f"{found.same:.2%}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def check_export(format: str, quantize: str | None = None, has_rows: bool = False, opset: int | None = None) -> None:
    """Raise unless a format can be written here; see [`export_model`].

    Raises:
        ConfigError: the format or what to quantize to is unknown, rows are missing, or an opset is no ONNX's.
        ImportError: a package is not installed; says what to install.
    """
    if format not in FORMATS:
        raise ConfigError("format", format, f"must be one of {', '.join(FORMATS)}.", closest(format, FORMATS))
    known = FORMATS[format]
    if quantize is not None and quantize not in known.quantizations:
        allowed = (
            f"must be one of {', '.join(known.quantizations)} for {format}." if known.quantizations else f"{format} has no such."
        )
        raise ConfigError("quantize", quantize, allowed, closest(quantize, known.quantizations))
    if quantize == CALIBRATED and not has_rows:
        others = [name for name in known.quantizations if name != CALIBRATED]
        hint = f", or take {others[0]!r}" if others else ""
        raise ConfigError("quantize", quantize, f"finds its scales by calibration rows; give data{hint}.")
    if opset is not None and format != "onnx":
        raise ConfigError("opset", opset, f"is a setting of onnx; {format} has none.")
    needed = (*known.packages, *(known.quantizations[quantize] if quantize else ()))
    check_installed(f"format={format!r}", needed, known.extra)
    if format == "onnx":
        onnx.check_opset(opset)


def export_model(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "onnx",
    *,
    quantize: str | None = None,
    batches: Sequence[Mapping[str, Tensor]] = (),
    opset: int | None = None,
) -> ExportReport:
    """Write a model for another runtime, open the file there, and compare what it computes with PyTorch; all or nothing on disk.

    The folder has the model's config (that of a stock model: nothing is loaded by it) and the companions of `source`: tokenizer,
    processors, the modules of a sentence-transformers model, files of unknown kinds.

    Args:
        model: dense, pruned or condensed, with any head; it stays as it is.
        source: its folder.
        out: the folder to write.
        format: of `FORMATS`. `"onnx"`: `onnx/model.onnx`, batch and length of any size; a decoder that writes takes and gives its
            cache, an encoder-decoder that writes is `onnx/encoder_model.onnx` and `onnx/decoder_model.onnx`. `"openvino"`:
            `openvino/openvino_model.xml`, likewise. `"gguf"`: `model.gguf` of a Llama, Mistral or Qwen2, for llama.cpp.
            `"per-layer-config"`: a checkpoint whose config has transformers' `per_layer_config`, for vLLM.
        quantize: what weights and activations become. ONNX, OpenVINO: `"int8"`, with scales found from `batches` once. ONNX:
            `"int8-dynamic"`, with scales found for each batch. GGUF: `"f16"` or `"q8_0"`, of weights. By default all is float32.
        batches: rows of the task, as the model's forward takes them. A tenth of them finds no scales; on it the file is compared.
            By default a file is compared on random rows.
        opset: of ONNX; by default what its exporter recommends.

    Raises:
        ConfigError: a setting cannot be used, the model is quantized, sharded, has adapters or no weights, or gives NaN, or rows
            are fewer than 8, longer than the model has positions for, or of other inputs than it takes.
        ImportError: a package is not installed; says what to install.
        ExportError: exporter or runtime do not take the model, or the file computes something else; names the reason. The bound of
            what differs is 1e-4 of an output's largest value, for quantized files 0.3 of the output in root mean square; of a
            log-probability in llama.cpp 0.02, in eight bits 0.5.
        ValueError: there is something at `out`, or something in `source` cannot be read.
    """
    check_export(format, quantize, bool(batches), opset)
    check_new_folder(out)
    known = FORMATS[format]
    for check in (check_changeable, known.check):
        check(model)
    config = copy.deepcopy(model.config)
    if batches:
        batches = calibration(model, batches, sum(len(next(iter(batch.values()))) for batch in batches), 0.0, False, 0).batches
    with new_folder(out) as folder:
        left = carry_over(source, folder)
        save_config(model, folder)
        before = set(folder.rglob("*"))
        with as_exported(model) as plain:
            examples = example_batches(plain, batches[0].keys() if batches else tokenizer_inputs(source))
            check_finite(plain, [*examples, *batches])
            name, agreement = known.write(Job(plain, model, config, examples, folder, quantize, batches, opset))
        size = sum(file.stat().st_size for file in set(folder.rglob("*")) - before if file.is_file())
    version = importlib.metadata.version(known.runtime)
    return ExportReport(format, quantize, name, size, f"{known.runtime} {version}", agreement, left)


def tokenizer_inputs(source: str | os.PathLike[str]) -> Collection[str] | None:
    """What the tokenizer in a folder gives; None without one."""
    try:
        return load_tokenizer(source).model_input_names
    except ConfigError:
        return None


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Save the config of a model that other runtimes read, of its labels and the like, without what loads weights; and how it
    generates."""
    config: Any = copy.deepcopy(model.config)
    for name in ("hf_prune", "auto_map"):
        vars(config).pop(name, None)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
