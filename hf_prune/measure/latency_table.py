"""The latency table: what a model's blocks cost at each size, measured on the device at hand.

Who wants a speed has to know what heads and neurons cost where the model will run, and no formula says that: neither numbers of
weights nor rules about round sizes (Kurtić, Frantar, Alistarh 2023, ZipLM, https://arxiv.org/abs/2302.04089, section 3.2). So
blocks are timed at many sizes, in the model itself and cut as `condense` cuts them: all alike at once, so that caches hold what
they will hold, and calls cost what they will cost.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import leave_mixed_precision
from ..condense import sample_batch
from ..condense.layers import layer_counts, outline, remove_layers
from ..condense.plan import check_plain, regroup
from ..condense.resize import keep_units
from ..condense.snapshot import unchanged
from ..files import read_object, write_text
from ..model import Block, find_blocks, spec_for
from ..model.blocks import body, layer_lists, out_features
from ..model.targets import computed_part
from ..model.wrappers import transformers_model
from ..settings.checks import check_count, check_name, is_number
from ..settings.errors import ConfigError
from ..version import __version__
from .latency import now, warm
from .running import BUILDING, as_loaded, check_runtime, prepared, put_in_files, still, tensors_in
from .tables import as_text, table_of_modules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: So many widths of a feed-forward block, each nine tenths of the one before it, as in ZipLM.
_WIDTHS, _RATIO = 43, 0.9
#: What kernels like widths to be a multiple of: with each width the multiple below it is measured.
_MULTIPLE = 64
#: So many alike layers are measured at once, at most: enough for no cache to hold more of them than it will of the whole model.
_LAYERS = 6
#: So many seconds of dense forwards are enough to know a speed-up. That comparisons agree is no reason to stop before: what else a
#: machine does lasts for seconds, and then all of them err alike.
_SECONDS = 10.0
#: So many turns of a model that is built for them, since it takes no turns with another.
_TURNS = 9
#: What every cost rests on is timed so often in a turn of all sizes: the dense model, and the model and the kinds without blocks.
_ANCHORS = 5


@dataclass(frozen=True)
class LatencyTable:
    """What a model's blocks cost at each size, in milliseconds of one forward, on one device and at one setting.

    Attributes:
        model: what the table holds true for: `class`, `model_type`, `hidden_size`, `vocab_size`, and of each of `blocks` its unit
            (head or neuron), how many `units` and `groups` of them there are, their `width`, and the `outputs` of the block.
        device: where it was measured: `type`, `name` of the processor or GPU, `cores`, `instructions`, and the versions of `torch`,
            `transformers` and `hf_prune`, and of `onnxruntime` where that runs the model.
        setting: `batch_size`, `length` (None for models that take no tokens), `dtype`, `threads`, `runtime`, `attn_implementation`,
            and the shapes of the `inputs`.
        total: milliseconds of the whole dense model.
        blocks: block's name, as in `sparsity_report` → units left → milliseconds. The dense size is there, and 0 units, which are
            0.0: the layer without the block.
        spread: half the interquartile range of a size's timings as a share of their median; the median over all sizes.
    """

    model: Mapping[str, Any]
    device: Mapping[str, Any]
    setting: Mapping[str, Any]
    total: float
    blocks: Mapping[str, Mapping[int, float]]
    spread: float = 0.0

    @property
    def fixed(self) -> float:
        """Milliseconds of all that is in no block: embeddings, norms, heads."""
        return self.total - sum(costs[max(costs)] for costs in self.blocks.values())

    def milliseconds(self, block: str, units: int) -> float:
        """What a block costs with so many heads or neurons left: as measured, or linear between the measured sizes beside it.

        Raises:
            ConfigError: the table has no such block, or the block never had so many units.
        """
        if block not in self.blocks:
            raise ConfigError("block", block, f"must be a block of the table, one of {', '.join(self.blocks)}.")
        costs = self.blocks[block]
        if units in costs:
            return costs[units]
        sizes = sorted(costs)
        place = bisect.bisect(sizes, units)
        if not 0 < place < len(sizes):
            raise ConfigError("units", units, f"must be from 0 to {sizes[-1]}, the size of {block}.")
        low, high = sizes[place - 1], sizes[place]
        return costs[low] + (costs[high] - costs[low]) * (units - low) / (high - low)

    def check(self, model: Any, elsewhere: bool = False) -> None:
        """Check that the table is one of this model, measured here.

        Args:
            model: the model, or an object that holds one.
            elsewhere: the table was given for another machine, which will run the model: only the model is compared.

        Raises:
            ConfigError: it is not; names what differs.
        """
        differences = list(_differences(self.model, model_facts(model)))
        if differences:
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
            raise ConfigError("latency_table", self.model.get("class"), f"was measured of another model: {shown}.")
        here = self.device if elsewhere else self._here(model)
        if differences := list(_differences(self.device, here)):
            allowed = (
                f"was measured elsewhere: {'; '.join(differences)}. Measure it here, or say that it is for a machine elsewhere."
            )
            raise ConfigError("latency_table", self.device.get("name"), allowed)

    def is_from_here(self, model: Any) -> bool:
        """Whether it was measured on this machine, on the model's device, with the versions that are installed."""
        return not list(_differences(self.device, self._here(model)))

    def _here(self, model: Any) -> dict[str, Any]:
        return device_facts(transformers_model(model).device, self.setting.get("runtime"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a JSON file, atomically; its folder is created."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what [`LatencyTable.save`] wrote; numbers are the same to the bit.

        Raises:
            ConfigError: there is no such file, or it holds no table; says what is wrong.
        """
        try:
            return cls.from_dict(read_object(path))
        except OSError as error:
            raise ConfigError("latency_table", str(path), f"cannot be read ({error.strerror}).") from None
        except ConfigError as error:
            raise ConfigError("latency_table", str(path), f"is damaged: {error}") from None
        except ValueError as error:  # no JSON
            raise ConfigError("latency_table", str(path), f"is damaged: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        """Each block at a few sizes: all of it, three quarters, half, a quarter."""
        said = [f"{name} {value}" for name, value in self.setting.items() if name != "inputs" and value is not None]
        title = f"{self.total:.2f} ms on {self.device['name']}, of which {self.fixed:.2f} ms are in no block"
        caption = f"{', '.join(said)}; timings spread by {self.spread:.1%}"
        table = table_of_modules(title, "block", "units", "ms", "3/4", "1/2", "1/4", caption=caption)
        for name, costs in self.blocks.items():
            units = max(costs)
            parts = (self.milliseconds(name, round(units * share)) for share in (1, 0.75, 0.5, 0.25))
            table.add_row(name, f"{units:,}", *(f"{cost:.3f}" for cost in parts))
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Build from what `to_dict` returned, or JSON made of it.

        Raises:
            ConfigError: a field is missing or cannot be right; names it.
        """
        for name in ("model", "device", "setting", "blocks"):
            if not isinstance(data.get(name), Mapping):
                raise ConfigError(name, data.get(name), "must be an object.")
        for name in ("total", "spread"):
            _check_cost(name, data.get(name))
        blocks = {}
        known = data["model"].get("blocks")
        if not isinstance(known, Mapping) or known.keys() != data["blocks"].keys():
            raise ConfigError("blocks", list(data["blocks"]), "must be those of `model`.")
        for block, costs in data["blocks"].items():
            if not isinstance(costs, Mapping) or not all(str(size).isdecimal() for size in costs):
                raise ConfigError(f"blocks.{block}", costs, "must be an object from numbers of units to milliseconds.")
            for size, cost in costs.items():
                _check_cost(f"blocks.{block}.{size}", cost)
            blocks[block] = {int(size): cost for size, cost in costs.items()}
            units = known[block].get("units") if isinstance(known[block], Mapping) else None
            if blocks[block].get(0) != 0 or max(blocks[block]) != units:
                raise ConfigError(f"blocks.{block}", costs, f"must have 0 units, at no cost, and all {units}.")
        return cls(data["model"], data["device"], data["setting"], data["total"], blocks, data["spread"])


def _check_cost(name: str, value: object) -> None:
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise ConfigError(name, value, "must be a number, 0 or more.")


def _differences(table: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs between two nested objects, in words."""
    if isinstance(table, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys((*table, *here)):
            yield from _differences(table.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif table != here:
        yield f"{name} is {table!r} in the table and {here!r} here"


def model_facts(model: Any) -> dict[str, Any]:
    """What of a model determines the sizes of its matrices."""
    inner = transformers_model(model)
    text = inner.config.get_text_config()
    return {
        "class": type(inner).__name__,
        "model_type": inner.config.model_type,
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "blocks": {
            block.name: {
                "unit": block.unit,
                "units": block.num_units,
                "groups": block.num_groups,
                "width": block.unit_width,
                "outputs": out_features(block.output.layer),
            }
            for block in find_blocks(model)
        },
    }


def device_facts(device: torch.device, runtime: str | None = None) -> dict[str, Any]:
    """What of this machine determines how long a forward takes."""
    cuda = device.type == "cuda"
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "instructions": "" if cuda else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "hf_prune": __version__,
        **({"onnxruntime": importlib.metadata.version("onnxruntime")} if runtime == "onnx" else {}),
    }


def _processor() -> str:
    """The name of the processor; Linux has it in a file only."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------------------------- measuring


#: What is timed: the index of a kind of blocks and how many units each has; or the whole model, with all blocks or with none.
Case = tuple[int, int]
DENSE, GONE = (-1, 1), (-1, 0)


@dataclass(frozen=True, eq=False)
class Kind:
    """Blocks that cost the same.

    Attributes:
        blocks: all of them.
        measured: those of them that are resized at once.
        removed: the layers that are absent meanwhile, by the path of their list.
    """

    blocks: tuple[Block, ...]
    measured: tuple[Block, ...]
    removed: Mapping[str, list[int]]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The numbers of units at which a block is measured, ascending."""
        block = self.measured[0]
        if block.unit == "neuron":
            widths = [round(block.num_units * _RATIO**power) for power in range(_WIDTHS)]
            return sorted({0, *widths, *(width // _MULTIPLE * _MULTIPLE for width in widths)})
        # under grouped queries, those at which no dead head has to stay
        return [size for size in range(block.num_units + 1) if len(_first(block, size)[0]) == size]


def latency_table(
    model: Any,
    batch_size: int = 8,
    length: int = 128,
    dtype: str = "float32",
    threads: int = 1,
    runtime: str = "torch",
    *,
    repeats: int = 5,
    progress: Callable[[range], Iterable[int]] = iter,
) -> LatencyTable:
    """Measure what a model's blocks cost at each size, on its device.

    Attention is measured at every number of heads that condensing can leave, a feed-forward block at 43 widths, each nine tenths of
    the one before, and at the multiples of 64 below them. A block costs at some size what the model takes with all blocks of its
    kind (at most those of six layers; other layers are absent) at this size, less what it takes without them, each its share. Where
    blocks of two kinds take longer together than apart, each bears half of that; see [`costs_of`]. Sizes take turns, in random
    order, so that whatever else the machine does meets all alike; medians count, see [`evened`]. The model is left as it was.

    Args:
        model: a transformers model, or an object that holds one (see `model/wrappers.py`), on the device that counts.
        batch_size, length: rows and tokens of the batch, random and full; images and sounds have sizes of their own.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of weights and computation.
        threads: of the CPU. One is measured in CPU time, which leaves out what other processes take; more, and CUDA, in time.
        runtime: `"torch"`; `"compile"` for a model under `torch.compile`, or `"onnx"` for one in ONNX Runtime, which is in float32,
            on the CPU, with eager attention. Both build something at every size: it takes long.
        repeats: how often each size has its turn.
        progress: wraps the turns, to show how far it is.

    Raises:
        ConfigError: a setting cannot be used, or the model cannot be condensed.
        ImportError: ONNX Runtime is not installed.
        ValueError: the family has no architecture spec, or a projection is no plain Linear or Conv1D.
    """
    check_count("batch_size", batch_size, "rows")
    check_count("length", length, "tokens")
    check_count("threads", threads, "threads")
    check_count("repeats", repeats, "turns")
    check_name("dtype", dtype, DTYPES)
    inner = transformers_model(model)
    check_runtime(runtime, dtype, inner.device)
    blocks = find_blocks(model)
    _check_blocks(blocks)
    facts = model_facts(model)
    with _at_rest(inner, DTYPES[dtype], threads, runtime, copied=True):
        inputs = _inputs(inner, batch_size, length)
        kinds = block_kinds(inner, blocks)
        times = _times(inner, kinds, inputs, runtime, repeats, progress)
    middles = {case: 1000 * statistics.median(values) for case, values in times.items()}
    often = _anchors(kinds, runtime)
    visits = {case: repeats * (_ANCHORS if same_model(kinds, case) in often else 1) for case in times}
    noise = _noise(times, visits)
    for number, kind in enumerate(kinds):
        cases = [(number, size) for size in kind.sizes[1:]]
        errors = [noise * middles[case] / math.sqrt(visits[case]) for case in cases]
        middles |= zip(cases, evened(kind.sizes[1:], [middles[case] for case in cases], errors))
    costs = {block.name: {0: 0.0} for block in blocks} | costs_of(kinds, middles)
    setting = table_setting(inner, batch_size, length, dtype, threads, runtime)
    spread = statistics.median(_spread(values) for values in times.values())
    return LatencyTable(facts, device_facts(inner.device, runtime), setting, middles[DENSE], costs, spread)


def table_setting(
    model: Any, batch_size: int, length: int, dtype: str = "float32", threads: int = 1, runtime: str = "torch"
) -> dict[str, Any]:
    """The `setting` of the [`LatencyTable`] that [`latency_table`] measures of a model with these arguments."""
    inner = transformers_model(model)
    return {
        "batch_size": batch_size,
        "length": length if inner.main_input_name == "input_ids" else None,
        "dtype": dtype,
        "threads": threads,
        "runtime": runtime,
        "attn_implementation": "eager" if runtime == "onnx" else inner.config._attn_implementation,
        "inputs": {name: list(value.shape) for name, value in _inputs(inner, batch_size, length).items()},
    }


def costs_of(kinds: list[Kind], milliseconds: Mapping[Case, float]) -> dict[str, dict[int, float]]:
    """The costs of the blocks of some kinds, by name and size.

    Without the blocks of one kind the others are cheaper, too, since less competes for the caches; so kind by kind more is saved
    than by all together. Let s be the share of the savings kind by kind that was counted twice, and let what two blocks cost for
    being together be proportional to the cost of both. When all blocks are at a share a of their cost in the dense model, one costs
    a - s·a·(2 - a) of it. So counted, all blocks together cost what the model takes more with them than without.
    """
    full = [milliseconds[number, kind.sizes[-1]] - milliseconds[number, 0] for number, kind in enumerate(kinds)]
    apart = sum(cost * len(kind.blocks) / len(kind.measured) for cost, kind in zip(full, kinds))
    twice = min(1 - (milliseconds[DENSE] - milliseconds[GONE]) / apart, 0.5) if apart > 0 else 0.0
    costs: dict[str, dict[int, float]] = {}
    for number, (kind, dense) in enumerate(zip(kinds, full)):
        own = {0: 0.0}
        for size in kind.sizes[1:]:
            share = (milliseconds[number, size] - milliseconds[number, 0]) / dense if dense > 0 else 0.0
            own[size] = max(dense * (share - twice * share * (2 - share)), 0.0) / len(kind.measured)
        costs |= {block.name: own for block in kind.blocks}
    return costs


def evened(sizes: Sequence[int], values: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Timings of sizes, drawn toward a curve of the second degree as far as chance explains that they are off it.

    On a busy machine the timings of all other sizes say more of one size than its own. Of what is off the curve the share
    τ²/(τ² + σ²) stays, with σ the error of the size and τ² what there is beyond errors (empirical Bayes, Efron and Morris 1973;
    τ² by moments, DerSimonian and Laird 1986): on a quiet machine nearly all, so that odd sizes cost what they cost.

    Args:
        sizes: ascending.
        values: of each size.
        errors: the standard error of each value, all 0 or all above.
    """
    free = len(sizes) - 3  # what three coefficients leave
    if free < 1 or not all(errors):
        return list(values)
    found, error = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    scale = error / error.max()
    basis, _ = np.linalg.qr(np.vander(np.asarray(sizes) / sizes[-1], 3) / scale[:, None])
    curve = scale * (basis @ (basis.T @ (found / scale)))
    leverage = np.square(basis).sum(axis=1)
    beyond = np.square((found - curve) / scale).sum() - free * error.max() ** 2
    own = max(beyond, 0.0) / ((1 - leverage) / scale**2).sum()
    drawn: list[float] = (curve + (own / (own + error**2) if own else 0.0) * (found - curve)).tolist()
    return drawn


def _noise(times: Mapping[Case, list[float]], visits: Mapping[Case, int]) -> float:
    """The standard error of a timing that was made once, as a share of it: of all sizes together, since each has few."""
    errors = [standard_error(found, visits[case]) / statistics.median(found) for case, found in times.items()]
    return math.sqrt(statistics.mean(error**2 * visits[case] for error, case in zip(errors, times)))


def measured_speedup(model: Any, setting: Mapping[str, Any], units: Mapping[str, int], *, repeats: int = 100) -> float:
    """How many times faster than now a model is with other sizes, both with weights as they are loaded; they take turns.

    Args:
        model: the model. It is left as it was.
        setting: at which it is measured, as a [`LatencyTable`] has it.
        units: block → how many of its heads or neurons are left; other blocks keep all.
        repeats: how often each has its turn; of a large model less often, but three times at least.
    """
    inner = transformers_model(model)
    sized = [block for block in find_blocks(model) if units.get(block.name, block.num_units) < block.num_units]
    # a size is built once
    repeats, turns = (1, min(repeats, _TURNS)) if setting["runtime"] in BUILDING else (repeats, 1)
    ratios: list[float] = []
    spent = 0.0
    smaller: list[Tensor] = []  # what was cut, once it lies in files
    with _at_rest(inner, DTYPES[setting["dtype"]], setting["threads"], setting["runtime"], copied=False), as_loaded(inner):
        inputs = _inputs(inner, setting["batch_size"], setting["length"] or 1)
        whole = set(tensors_in(inner))
        while len(ratios) < min(repeats, 3) or (len(ratios) < repeats and spent < _SECONDS):
            dense = statistics.median(_timed(inner, inputs, setting["runtime"], turns))
            spent += dense
            with unchanged(inner):
                for block in sized:
                    _cut([block], units[block.name])
                cut = [tensor for tensor in tensors_in(inner) if tensor not in whole]
                if not smaller:
                    put_in_files(cut)
                    smaller = [tensor.data for tensor in cut]
                for tensor, data in zip(cut, smaller):
                    tensor.data = data
                ratios.append(dense / statistics.median(_timed(inner, inputs, setting["runtime"], turns)))
    return statistics.median(ratios)


def standard_error(values: list[float], turns: int) -> float:
    """The standard error of the median of values from so many turns, were they normal: values of a turn count as one."""
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return (high - low) / 1.349 * math.sqrt(math.pi / 2 / turns)


def _spread(values: list[float]) -> float:
    """Half the interquartile range of values as a share of their median."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / 2 / middle


def _check_blocks(blocks: Iterable[Block]) -> None:
    for block in blocks:
        for part in block.projections:
            check_plain(part)
        if reason := computed_part(block):
            raise ConfigError("model", block.name, f"cannot be cut ({reason}), so it has no other size to be measured at.")


@contextlib.contextmanager
def _at_rest(model: PreTrainedModel, dtype: torch.dtype, threads: int, runtime: str, *, copied: bool) -> Iterator[None]:
    """A model in evaluation mode and of a dtype, and torch on so many threads; afterwards all is as it was.

    Where weights lie matters, see `running.as_loaded`: `copied` puts them where those are that are cut, so that sizes can be
    subtracted from each other.
    """
    before = torch.get_num_threads()
    with unchanged(model), still(runtime):
        leave_mixed_precision(model)
        model.eval()  # type: ignore[no-untyped-call]
        for tensor in tensors_in(model):
            if tensor.is_floating_point():  # not `model.to`, which changes gradients too
                tensor.data = tensor.data.to(dtype, copy=copied)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of full rows.

    Raises:
        ConfigError: the model cannot take so many rows or tokens.
    """
    inputs = sample_batch(model, batch_size, length, shortest=length)
    *_, rows, size = (1, *inputs[model.main_input_name].shape) if model.main_input_name == "input_ids" else (0, 0)
    if rows and rows != batch_size:
        raise ConfigError("batch_size", batch_size, f"must be {rows}: {type(model).__name__} has no padding token.")
    if size and size != length:
        raise ConfigError("length", length, f"must be at most {size}, what {type(model).__name__} has positions for.")
    return inputs


def block_kinds(model: PreTrainedModel, blocks: Iterable[Block]) -> list[Kind]:
    """The blocks of a model by kind: those with units, which differ neither in themselves nor in the layer around them."""
    found: dict[Hashable, list[Block]] = {}
    for block in blocks:
        if block.num_units:
            layer = body(model).get_submodule(block.layer)
            found.setdefault((re.sub(r"\d+", "*", block.layer), block.key, _description(layer)), []).append(block)
    kinds = []
    for members in found.values():
        removed = _removed(model, [block.layer for block in members])
        gone = {f"{path}.{index}" for path, indices in removed.items() for index in indices}
        measured = tuple(block for block in members if block.layer not in gone)
        kinds.append(Kind(tuple(members), measured, removed))
    return kinds


def _description(layer: nn.Module) -> Hashable:
    """What of a layer determines how long it takes: its modules, the shapes of its parameters, and all that they were told but
    which layer they are."""
    told = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and not key.endswith(("_idx", "_id"))
    )
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return tuple(outline(layer).items()), shapes, told


def _removed(model: PreTrainedModel, wanted: list[str]) -> dict[str, list[int]]:
    """The layers that can be absent while some are measured: all but the first of each list, which may differ from the others, and
    the first few wanted ones. Empty if layers share weights."""
    spec, staying = spec_for(model.config.model_type), set(wanted[:_LAYERS])
    try:
        paths = layer_counts(spec)
    except ConfigError:
        return {}
    lists = {path: layer_lists(model, path) for path in paths}
    absent = {
        path: [index for index in range(1, len(found[path])) if f"{path}.{index}" not in staying]
        for path, found in lists.items()
        if found
    }
    return {path: indices for path, indices in absent.items() if indices}


def _first(block: Block, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What condensing keeps, heads or neurons and their groups, if the first so many of them are alive."""
    return regroup(torch.arange(block.num_units, device="cpu") >= units, block.units_per_group)


def _times(
    model: PreTrainedModel,
    kinds: list[Kind],
    inputs: Mapping[str, torch.Tensor],
    runtime: str,
    repeats: int,
    progress: Callable[[range], Iterable[int]],
) -> dict[Case, list[float]]:
    """Seconds of forwards of each case, as if the machine had been as fast in each turn as in the middle one."""
    sizes: list[Case] = [DENSE, GONE, *((number, size) for number, kind in enumerate(kinds) for size in kind.sizes)]
    cases = list(dict.fromkeys(same_model(kinds, case) for case in sizes))
    together = 1
    if runtime in BUILDING:  # once a size
        repeats, together = 1, repeats
    everyone = cases + _anchors(kinds, runtime) * (_ANCHORS - 1)
    turns = [(turn, case) for turn in range(repeats) for case in random.Random(turn).sample(everyone, len(everyone))]
    times: dict[Case, list[list[float]]] = {case: [[] for _ in range(repeats)] for case in cases}
    for place in progress(range(len(turns))):
        turn, case = turns[place]
        with unchanged(model):
            resize(model, kinds, case)
            times[case][turn] += _timed(model, inputs, runtime, together)
    slow = slowness(times)
    even = {case: [value / by for values, by in zip(found, slow) for value in values] for case, found in times.items()}
    return {case: even[same_model(kinds, case)] for case in sizes}


def _anchors(kinds: Sequence[Kind], runtime: str) -> list[Case]:
    """What every cost rests on, once each."""
    if runtime in BUILDING:
        return []
    ends = ((number, size) for number, kind in enumerate(kinds) for size in (0, kind.sizes[-1]))
    return list(dict.fromkeys((DENSE, GONE, *(same_model(kinds, case) for case in ends))))


def same_model(kinds: Sequence[Kind], case: Case) -> Case:
    """The case that stands for all with the same model: of kinds at full size the first that lacks the same layers, or `DENSE`."""
    number, size = case
    if number < 0 or size < kinds[number].sizes[-1]:
        return case
    removed = kinds[number].removed
    first = next(place for place, kind in enumerate(kinds) if kind.removed == removed)
    return (first, kinds[first].sizes[-1]) if removed else DENSE


def _timed(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], runtime: str, turns: int = 1) -> list[float]:
    """Seconds of [`warm`] forwards."""
    run = prepared(model, inputs, runtime)
    clock = functools.partial(now, model.device, torch.get_num_threads())
    return [seconds for _ in range(turns) for seconds in warm(run, (clock,))[0]]


def slowness(times: Mapping[Case, list[list[float]]]) -> list[float]:
    """How much longer than on the whole the cases take in each turn."""
    ratios = []
    for found in times.values():
        middle = statistics.median(value for values in found for value in values)
        ratios.append([statistics.median(values) / middle for values in found])
    return [statistics.median(turn) for turn in zip(*ratios)]


def resize(model: PreTrainedModel, kinds: list[Kind], case: Case) -> None:
    """Make a model what it is in a case."""
    number, units = case
    if case == GONE:
        for kind in kinds:
            _cut(kind.blocks, 0)
    elif case != DENSE:
        remove_layers(model, spec_for(model.config.model_type), dict(kinds[number].removed))
        _cut(kinds[number].measured, units)


def _cut(blocks: Iterable[Block], units: int) -> None:
    """Leave so many units in each of some blocks."""
    for block in blocks:
        kept, groups = _first(block, units)
        own = None if block.own_units is None else [block.own_units[unit] for unit in kept.tolist()]
        keep_units(block, kept, groups, own_heads=own)
