"""How fast a model and the dense one are in each runtime and type, side by side, what that costs, and which file is best here."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..condense import sample_batch
from ..measure.latency import warm
from ..measure.latency_table import device_facts
from ..measure.memory import weight_bytes
from ..measure.running import as_exported
from ..measure.sparsity import stock_twin
from ..measure.tables import as_text
from ..oneshot.data import read_file, row_length, text_columns
from ..settings.errors import ConfigError, closest
from . import onnx, openvino
from .compare import QUANTIZED, Agreement, ExportError, Run, compare, one_sentence
from .folder import check_export
from .graphs import whole
from .inputs import example_batches, outputs_of

#: Runtime → the types that a model is measured in there, each with what `hf-prune export` is told for the file.
RUNTIMES: dict[str, dict[str, str | None]] = {
    "torch": {"float32": None, "bfloat16": None},
    "compile": {"float32": None, "bfloat16": None},
    "onnx": {
        "float32": "--format onnx",
        "int8-dynamic": "--format onnx --quantize int8-dynamic",
        "int8": "--format onnx --quantize int8",
    },
    "openvino": {
        "float32": "--format openvino",
        "bfloat16": "--format openvino",
        "int8": "--format openvino --quantize int8",
    },
}
#: By how much the metric may be below that of the dense model for a file to be called best.
_LOST = 0.015
#: What in the flags of a processor says how fast few bits are.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
#: Columns that hold the label.
_LABELS = ("label", "labels")


@dataclass(frozen=True)
class RuntimeRow:
    """One model in one runtime and type.

    Attributes:
        model: `"dense"` or `"model"`.
        runtime, dtype: of `RUNTIMES`.
        bytes: of the weights, or of the file.
        cpu, wall: milliseconds of CPU time and of time that a batch takes, by its shape, such as `"8x128"`.
        agreement: with the same model in PyTorch in float32, on a batch of the calibration rows, or on random ones.
        metric: on the labelled rows, if there are some.
        speedup: times as fast as the dense model in PyTorch in float32, by shape.
        command: options of `hf-prune export` that write the file; None where there is none.
    """

    model: str
    runtime: str
    dtype: str
    bytes: int
    cpu: Mapping[str, float]
    wall: Mapping[str, float]
    agreement: Agreement
    metric: float | None
    speedup: Mapping[str, float]
    command: str | None

    @property
    def name(self) -> str:
        """What tables and pictures call it."""
        return f"{self.model}, {self.runtime} {self.dtype}"

    @property
    def fast(self) -> float:
        """The geometric mean of its speedups."""
        return math.exp(statistics.fmean(math.log(value) for value in self.speedup.values()))


@dataclass(frozen=True)
class RuntimeReport:
    """Models in runtimes. Prints as a table.

    Attributes:
        rows: every model in every runtime and type that could be measured.
        left_out: what could not → why.
        metric: what `RuntimeRow.metric` is; None without labelled rows.
        machine: the processor, with its flags for few bits, and versions.
        protocol: how it was measured, in words.
    """

    rows: tuple[RuntimeRow, ...]
    left_out: Mapping[str, str]
    metric: str | None
    machine: Mapping[str, Any]
    protocol: str

    @property
    def best(self) -> RuntimeRow | None:
        """The fastest row over all shapes; see [`RuntimeReport.best_at`]."""
        return self._fastest(lambda row: row.fast)

    def best_at(self, shape: str) -> RuntimeRow | None:
        """The fastest row of the model at a shape, such as `"8x128"`, that loses at most 1.5 points against the dense one in
        PyTorch, and that `hf-prune export` would not refuse; None if there is none."""
        return self._fastest(lambda row: row.speedup[shape])

    def _fastest(self, speed: Callable[[RuntimeRow], float]) -> RuntimeRow | None:
        floor = (self.rows[0].metric or 0.0) - _LOST
        kept = [row for row in self.rows if row.model == "model" and row.agreement.error <= QUANTIZED]
        fine = [row for row in kept if row.metric is None or row.metric >= floor]
        return max(fine, key=speed, default=None)

    def advice(self, path: str) -> str:
        """What to do for the fastest file of a model, at each shape: a line or two for each file."""
        shapes: dict[str, list[str]] = {}
        for shape in self.rows[0].cpu:
            if row := self.best_at(shape):
                shapes.setdefault(row.name, []).append(shape)
        if not shapes:
            return (
                f"No row is within {100 * _LOST:g} points of the dense model, and agrees with PyTorch as far as an export has to."
            )
        return "\n".join(_told(row, path, shapes[row.name]) for row in self.rows if row.name in shapes)

    def points(self) -> dict[str, tuple[float, float]]:
        """Milliseconds of the largest batch and the metric of each row, by its name, for a picture."""
        shape = list(self.rows[0].cpu)[-1]
        return {row.name: (row.cpu[shape], row.metric) for row in self.rows if row.metric is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = {"best": self.best} | {f"best at {shape}": self.best_at(shape) for shape in self.rows[0].cpu}
        return {**asdict(self), **{name: None if row is None else asdict(row) for name, row in rows.items()}}

    def __rich__(self) -> Table:
        table = Table(title="Times as fast as the dense model in PyTorch in float32", caption=self.protocol)
        shapes = list(self.rows[0].cpu)
        columns = ("model", "runtime", "type", "MB", *shapes, "error", *([self.metric] if self.metric else []))
        for place, column in enumerate(columns):
            table.add_column(column, justify="left" if place < 3 else "right")
        for row in self.rows:
            times = [f"{row.speedup[shape]:.2f} ({row.cpu[shape]:.1f} ms)" for shape in shapes]
            metric = [] if row.metric is None else [f"{row.metric:.4f}"]
            values = (f"{row.bytes / 1e6:.1f}", *times, f"{row.agreement.error:.1e}", *metric)
            table.add_row(row.model, row.runtime, row.dtype, *values, style="bold" if row is self.best else None)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def _told(row: RuntimeRow, path: str, shapes: Sequence[str]) -> str:
    """That a row is best at some shapes, and what writes its file."""
    times = ", ".join(f"{row.speedup[shape]:.2f} at {shape}" for shape in shapes)
    start = f"Best: {row.runtime} {row.dtype}, times as fast as dense PyTorch in float32: {times}."
    if row.command is None:
        return f"{start} The checkpoint is all it needs."
    told = " --data FILE" if row.dtype == "int8" else ""
    hint = ' (compile it with {"INFERENCE_PRECISION_HINT": "bf16"})' if row.dtype == "bfloat16" else ""
    return f"{start}\nhf-prune export {path} OUT {row.command}{told}{hint}"


def check_runtimes(runtimes: Sequence[str]) -> None:
    """Raise unless all runtimes are known and installed.

    Raises:
        ConfigError: one is unknown, or there are none.
        ImportError: one is not installed; says what to install.
    """
    for name in runtimes or ("",):
        if name not in RUNTIMES:
            raise ConfigError("runtimes", name, f"must be of {', '.join(RUNTIMES)}.", closest(name, RUNTIMES))
        if any(RUNTIMES[name].values()):
            check_export(name)


def benchmark_runtimes(
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    runtimes: Sequence[str] = ("torch", "onnx", "openvino"),
    *,
    batch_sizes: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (32, 128),
    calibration: Sequence[Mapping[str, Tensor]] = (),
    labelled: Sequence[tuple[Mapping[str, Tensor], Tensor]] = (),
    metric: Callable[[Run, Sequence[tuple[Mapping[str, Tensor], Tensor]]], float | None] | None = None,
    threads: int = 1,
    repeats: int = 15,
    track: Callable[[range], Iterable[int]] = iter,
) -> RuntimeReport:
    """Measure a model and the dense one in runtimes and types: time, size, agreement with PyTorch and, with labels, accuracy.

    All are in one process and take turns, as in [`benchmark`]; medians count.

    Args:
        model: the pruned or condensed model, on the CPU.
        dense: what to compare with; by default a random model of the sizes before it was condensed.
        runtimes: of `RUNTIMES`.
        batch_sizes, lengths: of the batches of full rows, each with each.
        calibration: rows without labels, for the scales of `int8`; without them that type is left out.
        labelled: rows with their labels.
        metric: of a model in a runtime on these, the more the better; by default [`accuracy`], of a classifier.
        threads: of the CPU. Speedups are of CPU time on one thread, and of time on more.
        repeats: turns.
        track: wraps the rounds of measuring, to show progress.

    Raises:
        ConfigError, ImportError: see [`check_runtimes`].
        ExportError: a model is not exported; see [`export_model`].
    """
    check_runtimes(runtimes)
    metric = metric or accuracy
    if "torch" not in runtimes:
        runtimes = ("torch", *runtimes)  # what all others are compared with
    models = {"dense": stock_twin(model) if dense is None else dense, "model": model}
    given = next((batch.keys() for batch in (*calibration, *(batch for batch, _ in labelled))), None)
    batches = {
        f"{rows}x{tokens}": _batch(model, rows, tokens, given) for rows in sorted({*batch_sizes}) for tokens in sorted({*lengths})
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    entries: dict[tuple[str, str, str], tuple[Run, int, Agreement]] = {}
    left: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, one in models.items():
                found, reasons = _measured(one, Path(folder, name), runtimes, given, calibration, threads)
                entries |= {(name, *key): entry for key, entry in found.items()}
                left |= reasons
            with torch.inference_mode():
                cpu, wall = _times({key: entry[0] for key, entry in entries.items()}, batches, repeats, track)
                metrics = {key: metric(entry[0], labelled) for key, entry in entries.items()}
    finally:
        torch.set_num_threads(before)
    clock = cpu if threads == 1 else wall
    base = clock["dense", "torch", "float32"]
    rows = tuple(
        RuntimeRow(
            model=key[0],
            runtime=key[1],
            dtype=key[2],
            bytes=size,
            cpu=cpu[key],
            wall=wall[key],
            agreement=agreement,
            metric=metrics[key],
            speedup={shape: base[shape] / value for shape, value in clock[key].items()},
            command=RUNTIMES[key[1]][key[2]],
        )
        for key, (_, size, agreement) in entries.items()
    )
    clock_name = "CPU time" if threads == 1 else "time"
    words = f"{threads} thread{'s' * (threads > 1)}, {clock_name}, median of warm forwards in {repeats} turns"
    return RuntimeReport(rows, left, metric.__name__.replace("_", " ") if labelled else None, machine_facts(), words)


def machine_facts() -> dict[str, Any]:
    """The processor, with its flags for few bits, and versions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    said = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return {**device_facts(torch.device("cpu")), "flags": [flag for flag in _FLAGS if flag in said]}


def labelled_batches(
    model: PreTrainedModel, tokenizer: Any, file: str | Path, columns: Sequence[str] = (), batch_size: int = 16
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The rows of a file with their labels, for a model that classifies whole rows.

    Raises:
        ConfigError: the model is no such, the file has no column of labels, or see [`text_columns`].
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ConfigError("evaluate", str(file), f"needs a model that classifies rows, and {type(model).__name__} does not.")
    data: Dataset = read_file(file)
    column = next((name for name in _LABELS if name in data.column_names), None)
    if column is None:
        raise ConfigError("evaluate", str(file), f"has no column {' or '.join(_LABELS)}, but {', '.join(data.column_names)}.")
    names, ids = text_columns(data, columns), model.config.label2id or {}
    length, collate, found = row_length(model, tokenizer), DataCollatorWithPadding(tokenizer), []
    for start in range(0, len(data), batch_size):
        part = data[start : start + batch_size]
        encoded = tokenizer(*(part[name] for name in names), truncation=True, max_length=length)
        labels = [ids[label] if isinstance(label, str) and label in ids else int(label) for label in part[column]]
        found.append((dict(collate([dict(zip(encoded, row)) for row in zip(*encoded.values())])), torch.tensor(labels)))
    return found


def accuracy(run: Run, labelled: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> float | None:
    """The share of rows whose label has the largest logit; None without rows."""
    right = sum(int((run(batch)["logits"].argmax(-1) == labels).sum()) for batch, labels in labelled)
    return right / sum(len(labels) for _, labels in labelled) if labelled else None


class _Files:
    """The files of a model, each written when it is first needed."""

    def __init__(self, model: Any, folder: Path, example: dict[str, Tensor], calibration: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.folder, self.example, self.calibration = model, folder, example, calibration

    def onnx(self, quantize: str | None = None) -> Path:
        file = self.folder / f"{quantize}.onnx"
        if not file.exists():
            if quantize is None:
                onnx.write(whole(self.model, self.example), file)
            else:
                file.write_bytes(self.onnx().read_bytes())
                onnx.quantize(file, quantize, self.calibration)
        return file

    def openvino(self, quantize: str | None = None) -> Path:
        file = self.folder / f"{quantize}.xml"
        if not file.exists():
            openvino.write(self.onnx(), file, self.calibration if quantize else None)
        return file


def _measured(
    model: PreTrainedModel,
    folder: Path,
    runtimes: Sequence[str],
    given: Iterable[str] | None,
    calibration: Sequence[Mapping[str, Tensor]],
    threads: int,
) -> tuple[dict[tuple[str, str], tuple[Run, int, Agreement]], dict[str, str]]:
    """A model in each runtime and type, with its bytes and how it agrees; and why some are left out."""
    found, left = {}, {}
    folder.mkdir()
    with as_exported(model) as plain:

        def expected(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return outputs_of(plain, batch)

        examples = example_batches(plain, None if given is None else [*given])
        files = _Files(plain, folder, examples[0], calibration)
        for runtime in runtimes:
            for dtype in RUNTIMES[runtime]:
                try:
                    run, size = _opened(files, runtime, dtype, threads)
                    agreement = compare(run, expected, calibration[:1] or examples, None)
                except (ExportError, ConfigError, ImportError) as error:
                    left[f"{runtime} {dtype}"] = str(error)
                else:
                    found[runtime, dtype] = run, size, agreement
    return found, left


def _opened(files: _Files, runtime: str, dtype: str, threads: int) -> tuple[Run, int]:
    """A model in a runtime and type, and its bytes."""
    if dtype == "int8":
        check_export(runtime, "int8", bool(files.calibration))
    quantize = dtype if dtype.startswith("int8") else None
    if runtime == "onnx":
        file = files.onnx(quantize)
        return onnx.open_file(file, threads)[0], file.stat().st_size
    if runtime == "openvino":
        file = files.openvino(quantize)
        size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
        return openvino.open_file(file, threads, "bf16" if dtype == "bfloat16" else "f32")[0], size
    module: Any = copy.deepcopy(files.model).to(getattr(torch, dtype))
    module.set_attn_implementation("sdpa" if module._supports_sdpa else "eager")
    called = torch.compile(module) if runtime == "compile" else module

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with one_sentence(f"{runtime} does not run the model"):
            given = called(**batch)
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    return run, weight_bytes(module)


def _batch(model: PreTrainedModel, rows: int, tokens: int, given: Iterable[str] | None) -> dict[str, Tensor]:
    batch = sample_batch(model, rows, tokens, shortest=tokens)
    return {name: value for name, value in batch.items() if given is None or name != "token_type_ids" or name in given}


def _times(
    runs: Mapping[tuple[str, str, str], Run],
    batches: Mapping[str, Mapping[str, Tensor]],
    repeats: int,
    track: Callable[[range], Iterable[int]],
) -> tuple[dict[tuple[str, str, str], dict[str, float]], dict[tuple[str, str, str], dict[str, float]]]:
    """Milliseconds of CPU time and of time of each run on each batch: medians."""
    seen: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {key: {shape: [] for shape in batches} for key in runs}
    for _ in track(range(repeats)):
        for key, run in runs.items():
            for shape, batch in batches.items():
                seen[key][shape] += zip(*warm(partial(run, batch), (time.process_time, time.perf_counter)))
    cpu, wall = (
        {
            key: {shape: 1000 * statistics.median(pair[clock] for pair in pairs) for shape, pairs in by.items()}
            for key, by in seen.items()
        }
        for clock in (0, 1)
    )
    return cpu, wall
