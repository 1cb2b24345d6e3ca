"""What a model weighs and how long it takes: zeros, parameters, heads and neurons left, latency, memory."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .architectures import AttentionBlock, Block, find_blocks, spec_for
from .architectures.families import SPECS
from .condense import block_key, dead_units, sample_batch, stock_config
from .config import check_types, dataclass_from_dict, within
from .masks import count_zeros
from .pruner import Pruner
from .tables import as_text, table_of_modules
from .targets import body_weights
from .wrappers import bare_model, transformers_model


@dataclass(frozen=True)
class ModuleSparsity:
    """Counts of one layer's weight, or of a parameter that is like one; `left_out` says why it cannot be pruned, `""` if it can.

    A weight that can be pruned has the shape `(out, in)`, another one its own.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    zeros: int
    left_out: str = ""

    @property
    def sparsity(self) -> float:
        """Share of true zeros."""
        return self.zeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class BlockSize:
    """Heads of an attention block or neurons of a feed-forward block: how many there are and how many are alive.

    Dead is what [`condense_plan`] says.
    """

    name: str
    kind: str
    units: int
    alive: int


@dataclass(frozen=True)
class SparsityReport:
    """True zeros in the weights of the model's body, each shared weight once, module by module and in total.

    Weights that cannot be pruned count too; embeddings do not.
    """

    modules: tuple[ModuleSparsity, ...]
    blocks: tuple[BlockSize, ...]
    parameters: int
    #: What the model lacks because its pruning ended early, if it did.
    shortfall: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of true zeros over all modules."""
        total = sum(module.parameters for module in self.modules)
        return sum(module.zeros for module in self.modules) / total if total else 0.0

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Why some weights, though counted, cannot be pruned: reason → their names."""
        found: dict[str, list[str]] = {}
        for module in self.modules:
            if module.left_out:
                found.setdefault(module.left_out, []).append(module.name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "sparsity": self.sparsity,
            "parameters": self.parameters,
            "modules": [{**asdict(module), "sparsity": module.sparsity} for module in self.modules],
            "blocks": [asdict(block) for block in self.blocks],
            "shortfall": self.shortfall,
        }

    def __rich__(self) -> Table:
        title = f"{self.sparsity:.2%} of the body's weights are zero; {self.parameters:,} parameters in all"
        table = table_of_modules(title, "module", "shape", "parameters", "zeros", "sparsity", caption=self.shortfall)
        if self.left_out:
            table.add_column("left out of pruning, because")
        for module in self.modules:
            shape = "x".join(str(size) for size in module.shape)
            reason = [module.left_out] if module.left_out else []
            table.add_row(module.name, shape, f"{module.parameters:,}", f"{module.zeros:,}", f"{module.sparsity:.2%}", *reason)
        for block in self.blocks:
            table.add_row(
                block.name,
                f"{block.alive} of {block.units} {block.kind}",
                "",
                "",
                f"{1 - block.alive / max(block.units, 1):.2%}",
            )
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def sparsity_report(model: Any, pruner: Pruner | None = None) -> SparsityReport:
    """Count the true zeros of a model's body, and the heads and neurons left where its architecture is known.

    Under LoRA, the zeros of the merged weights count.

    Args:
        model: the model, or what holds it (a SentenceTransformer, a SetFitModel; see `wrappers.py`).
        pruner: what pruned it, asked whether it came to its end.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one, or there are several transformers models.
    """
    inner = transformers_model(model)
    modules = []
    for weight in body_weights(model):
        zeros, parameters = count_zeros([weight])
        modules.append(ModuleSparsity(weight.name, weight.shape, parameters, zeros, weight.left_out))
    known = getattr(getattr(inner, "config", None), "model_type", "") in SPECS
    sizes = tuple(_block_size(block) for block in find_blocks(model)) if known else ()
    total = sum(parameter.numel() for parameter in bare_model(model).parameters())
    return SparsityReport(tuple(modules), sizes, total, pruner.shortfall if pruner else None)


def print_sparsity(model: Any) -> None:
    """Print how many of the body's weights are zero, in a line, as in the logs, the report and the card.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one.
    """
    report = sparsity_report(model)
    zeros, weights = (sum(getattr(module, name) for module in report.modules) for name in ("zeros", "parameters"))
    print(f"zero weights: {zeros:,} || body weights: {weights:,} || sparsity%: {100 * report.sparsity:.4f}")


def _block_size(block: Block) -> BlockSize:
    kind, units = ("heads", block.num_heads) if isinstance(block, AttentionBlock) else ("neurons", block.num_neurons)
    return BlockSize(block.name, kind, units, alive=units - int(dead_units(block).sum()))


def stock_twin(model: Any, device: str = "cpu") -> PreTrainedModel:
    """A random model of the same class with the sizes that the model had before it was condensed.

    It takes the time that the dense model takes. On device `"meta"` it has shapes and no weights.
    """
    model = transformers_model(model)
    condensed = getattr(model.config, "hf_prune", None) is not None
    config = stock_config(model.config, spec_for(model.config.model_type)) if condensed else copy.deepcopy(model.config)
    with torch.device(device):
        twin: Any = type(model)(config)
    twin.to(model.dtype).eval()
    return twin  # type: ignore[no-any-return]


def original_blocks(model: Any) -> tuple[BlockSize, ...]:
    """The blocks of the model that pruning started from, with how many of their heads or neurons are alive in this one.

    A family without an architecture spec has none.
    """
    model = transformers_model(model)
    if model.config.model_type not in SPECS:
        return ()
    removed = (getattr(model.config, "hf_prune", None) or {}).get("removed_layers", {})
    alive = {(block.layer, block_key(block)): _block_size(block).alive for block in find_blocks(model)}
    sizes = []
    for block in find_blocks(stock_twin(model, "meta")):
        path, _, number = block.layer.rpartition(".")
        gone = removed.get(path, [])
        now = f"{path}.{int(number) - sum(index < int(number) for index in gone)}"
        left = 0 if int(number) in gone else alive[now, block_key(block)]
        kind, units = ("heads", block.num_heads) if isinstance(block, AttentionBlock) else ("neurons", block.num_neurons)
        sizes.append(BlockSize(block.name, kind, units, left))
    return tuple(sizes)


def total_sparsity(model: Any) -> float:
    """Share of the body's weights that are zero, or gone since pruning started."""
    model = transformers_model(model)
    left = sum(module.parameters - module.zeros for module in sparsity_report(model).modules)
    return 1 - left / sum(math.prod(weight.shape) for weight in body_weights(stock_twin(model, "meta")))


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: how many it has, zeros included.
        weight_bytes: of its parameters and buffers in memory; on disk it is as much.
        activation_bytes: the most that one forward holds besides.
        milliseconds: of one forward, see [`benchmark`].
    """

    parameters: int
    weight_bytes: int
    activation_bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one. Prints as a table.

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
            PruningConfigError: a field is missing, unknown, or of another type.
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


def megabytes(count: int) -> str:
    """A number of bytes for people; a megabyte is 10⁶ bytes."""
    return f"{count / 1e6:,.2f} MB"


def compare(
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    reference: str | None = None,
    rows: int = 8,
    tokens: int = 128,
    repeats: int = 30,
    track: Callable[[range], Iterable[int]] = iter,
) -> Comparison:
    """Time and weigh a model beside the dense one it came from, on one batch of full rows of random inputs, in turn.

    Args:
        model: the pruned or condensed model.
        dense: what to compare with; by default a random model of the sizes that the model had before it was condensed.
        reference: what the dense model is, for people.
        rows: batch size; 1 for a decoder that classifies and has no padding token.
        tokens: length of the rows, at most half of the positions that the model has; images and sounds have sizes of their own.
        repeats: forwards of each model that count.
        track: wraps the rounds of measuring, to show progress.
    """
    reference = reference or ("the dense model" if dense is not None else "a random model of the sizes before condensing")
    twin: Any = stock_twin(model) if dense is None else dense
    models = {"dense": twin.to(model.device), "model": model}
    inputs = sample_batch(models["dense"], rows, tokens, shortest=tokens)
    times = benchmark(models, inputs, repeats, track)
    costs = {name: Cost(one.num_parameters(), _bytes(one), _activations(one, inputs), times[name]) for name, one in models.items()}
    shape = " × ".join(str(size) for size in inputs[model.main_input_name].shape)
    clock = "time" if model.device.type == "cuda" else "CPU time"
    protocol = f"batch of {shape}, {model.dtype}, {model.device.type}, one thread, {clock}, median of {repeats} forwards in turn"
    return Comparison(costs["dense"], costs["model"], reference, protocol)


def evaluated(logged: Mapping[str, float]) -> dict[str, float]:
    """The metrics in what a Trainer logs or returns of an evaluation: without `eval_`, and without times."""
    named = {name.removeprefix("eval_"): value for name, value in logged.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if not name.endswith(("runtime", "_per_second", "_time", "epoch"))}


def _bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


_weak: Any = StorageWeakRef


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations made and that are still there; `most` is the maximum so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[Any, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {_weak(part.untyped_storage()) for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)}
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor) and (storage := _weak(part.untyped_storage())) not in before:
                self.sizes[storage] = part.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        return made


def _activations(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """The most bytes of tensors that one forward holds at once, besides weights and inputs."""
    training, held = model.training, _Held()
    with torch.no_grad(), held:
        model.eval()(**inputs)
    model.train(training)
    return held.most


def benchmark(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
    repeats: int = 30,
    track: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Milliseconds of CPU time (CUDA: of time) that each model takes for a batch: the median of `repeats` forwards on one thread.

    The models take turns, so that whatever else the machine does meets all of them alike, and CPU time leaves out what other
    processes take. The first turn warms up and is not counted.
    """
    threads, device = torch.get_num_threads(), next(iter(inputs.values())).device
    seconds: dict[str, list[float]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in track(range(repeats + 1)):
                for name, model in models.items():
                    model.eval()
                    start = _now(device)
                    model(**inputs)
                    seconds[name].append(_now(device) - start)
    finally:
        torch.set_num_threads(threads)
        for name, model in models.items():
            model.train(training[name])
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}


def _now(device: torch.device) -> float:
    """Seconds of this process's CPU time, or on CUDA of time, when all work given to the device is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
