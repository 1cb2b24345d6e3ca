"""Latency and memory of a model, compared with another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ..condense import sample_batch
from ..settings.checks import check_types, dataclass_from_dict
from ..settings.errors import within
from .memory import activation_bytes, megabytes, weight_bytes
from .running import prepared, still
from .sparsity import stock_twin
from .tables import as_text

#: A model's turn takes so many seconds, but at most so many forwards beside the first.
_SECONDS, _FORWARDS = 0.05, 16
#: Bytes. After a block of nearly 32 MiB was freed, glibc keeps what is freed; before, it gives it back to the system after each
#: forward, and faults it in again in the next: an eighth of the time of MiniLM at 8 × 128, in a fresh process alone.
_LARGEST_BLOCK = (32 << 20) - (64 << 10)


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: how many it has, zeros included.
        weight_bytes: of its parameters and buffers, in memory and on disk.
        activation_bytes: peak memory of one forward pass beyond the weights.
        milliseconds: of one forward, see [`benchmark`].
    """

    parameters: int
    weight_bytes: int
    activation_bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """A model compared with the dense one. Prints as a table.

    Attributes:
        dense, model: what each costs.
        reference: what the dense model is.
        protocol: how it was measured, in words.
    """

    dense: Cost
    model: Cost
    reference: str
    protocol: str

    @property
    def latency_ratio(self) -> float:
        """How many times faster the model is than the dense one."""
        return self.dense.milliseconds / self.model.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "latency_ratio": self.latency_ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Build from what `to_dict` returned.

        Raises:
            ConfigError: a field is missing, unknown, or of another type.
        """
        costs = {}
        for name in ("dense", "model"):
            with within(f"{name}."):
                costs[name] = dataclass_from_dict(Cost, data.get(name))
                check_types(costs[name])
        rest = {name: value for name, value in data.items() if name != "latency_ratio"}
        comparison = dataclass_from_dict(cls, rest | costs)
        check_types(comparison)
        return comparison

    def __rich__(self) -> Table:
        table = Table(title=f"{self.latency_ratio:.2f} times as fast as {self.reference}", caption=self.protocol)
        for column in ("", "parameters", "weights", "activations", "latency"):
            table.add_column(column, justify="right" if column else "left")
        for name, cost in (("dense", self.dense), ("model", self.model)):
            sizes = (f"{cost.parameters:,}", megabytes(cost.weight_bytes), megabytes(cost.activation_bytes))
            table.add_row(name, *sizes, f"{cost.milliseconds:.2f} ms")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def compare(
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    reference: str | None = None,
    rows: int = 8,
    tokens: int = 128,
    repeats: int = 10,
    track: Callable[[range], Iterable[int]] = iter,
    threads: int = 1,
    runtime: str = "torch",
) -> Comparison:
    """Measure latency and memory of a model and of the dense one it came from, in turn, on a batch of full rows of random inputs.

    Args:
        model: the pruned or condensed model.
        dense: what to compare with; by default a random model of the sizes that the model had before it was condensed.
        reference: what the dense model is, in words.
        rows: batch size; 1 for a decoder that classifies and has no padding token.
        tokens: length of the rows, but no more than the model has positions for; images and sounds have sizes of their own.
        repeats: turns of each model.
        track: wraps the rounds of measuring, to show progress.
        threads, runtime: of the CPU, and what runs the models there; see [`benchmark`].
    """
    reference = reference or ("the dense model" if dense is not None else "a random model of the sizes before condensing")
    twin: Any = stock_twin(model) if dense is None else dense
    models = {"dense": twin.to(model.device), "model": model}
    inputs = sample_batch(model, rows, tokens, shortest=tokens)  # the dense one may have more tokens, never fewer
    times = benchmark(models, inputs, repeats, track, threads, runtime)
    costs = {
        name: Cost(one.num_parameters(), weight_bytes(one), activation_bytes(one, inputs), times[name])
        for name, one in models.items()
    }
    return Comparison(costs["dense"], costs["model"], reference, protocol_of(model, inputs, repeats, threads, runtime))


def protocol_of(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], repeats: int, threads: int = 1, runtime: str = "torch"
) -> str:
    """How [`benchmark`] measures models like this one, in words."""
    shape = " × ".join(str(size) for size in inputs[model.main_input_name].shape)
    clock = "CPU time" if model.device.type == "cpu" and threads == 1 else "time"
    place = model.device.type if runtime == "torch" else f"{model.device.type} ({runtime})"
    run = f"{model.dtype}, {place}, {'one thread' if threads == 1 else f'{threads} threads'}, {clock}"
    return f"batch of {shape}, {run}, median of warm forwards in {repeats} turns"


def benchmark(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
    repeats: int = 10,
    track: Callable[[range], Iterable[int]] = iter,
    threads: int = 1,
    runtime: str = "torch",
) -> dict[str, float]:
    """Milliseconds that each model takes for a batch, the median over `repeats` turns: of CPU time on one thread; on more, and on
    CUDA, of time.

    The models take turns, so that whatever else the machine does meets all of them alike, and CPU time leaves out what other
    processes take. What counts of a turn says [`warm`]; what runs the models, `runtime`, is one of `measure.running.RUNTIMES`.
    """
    before, device = torch.get_num_threads(), next(iter(inputs.values())).device
    seconds: dict[str, list[float]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    torch.set_num_threads(threads)
    try:
        with still(runtime):
            runs = {name: prepared(model.eval(), inputs, runtime) for name, model in models.items()}
            for _ in track(range(repeats)):
                for name, run in runs.items():
                    seconds[name] += warm(run, (partial(now, device, threads),))[0]
    finally:
        torch.set_num_threads(before)
        for name, model in models.items():
            model.train(training[name])
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def warm(forward: Callable[[], object], clocks: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Seconds of forwards by each clock, as a model takes them that runs again and again and not in turn with others.

    A turn is one forward and, for a twentieth of a second by the first clock, 1 to 16 more. The second half of those counts: a
    small model needs some forwards until what the model before left in the caches is gone.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8)  # and freed at once

    def once() -> list[float]:
        started = [clock() for clock in clocks]
        forward()
        return [clock() - start for clock, start in zip(clocks, started)]

    number = max(1, min(_FORWARDS, math.ceil(_SECONDS / max(once()[0], 1e-9))))
    found = [once() for _ in range(number)][number // 2 :]
    return [list(seconds) for seconds in zip(*found)]


def now(device: torch.device, threads: int = 1) -> float:
    """Seconds of this process's CPU time, or of time on several threads and on CUDA, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if threads == 1 else time.perf_counter()
