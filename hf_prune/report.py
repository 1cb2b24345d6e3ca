"""What a model weighs and how long it takes: zeros, parameters, heads and neurons left, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from .architectures import AttentionBlock, Block, blocks
from .architectures.blocks import unwrapped
from .architectures.families import SPECS
from .masks import count_zeros
from .pruner import Pruner
from .tables import as_text
from .targets import body_prefix, prunable_modules, weight_target


@dataclass(frozen=True)
class ModuleSparsity:
    """Counts of one layer's weight."""

    name: str
    shape: tuple[int, int]
    parameters: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of true zeros."""
        return self.zeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class BlockSize:
    """Heads of an attention block or neurons of a feed-forward block: how many there are and how many are alive."""

    name: str
    kind: str
    units: int
    alive: int


@dataclass(frozen=True)
class SparsityReport:
    """True zeros in the weights of the model's body, each shared weight once, module by module and in total."""

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
        table = Table(
            title=f"{self.sparsity:.2%} of the body's weights are zero; {self.parameters:,} parameters in all",
            caption=self.shortfall,
        )
        for column in ("module", "shape", "parameters", "zeros", "sparsity"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for module in self.modules:
            shape = "x".join(str(size) for size in module.shape)
            table.add_row(module.name, shape, f"{module.parameters:,}", f"{module.zeros:,}", f"{module.sparsity:.2%}")
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


def sparsity_report(model: nn.Module, pruner: Pruner | None = None) -> SparsityReport:
    """Count the true zeros of a model's body, and the heads and neurons left where its architecture is known.

    Under LoRA, the zeros of the merged weights count.

    Args:
        model: the model.
        pruner: what pruned it, asked whether it came to its end.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one.
    """
    prefix = body_prefix(model)
    modules = []
    for name, module in prunable_modules(model):
        if name.startswith(prefix):
            target = weight_target(name, module)
            zeros, parameters = count_zeros([target])
            modules.append(ModuleSparsity(name, target.shape, parameters, zeros))
    spec = SPECS.get(getattr(getattr(unwrapped(model), "config", None), "model_type", ""))
    sizes = tuple(_block_size(block) for block in blocks(model, spec)) if spec else ()
    total = sum(parameter.numel() for parameter in model.parameters())
    return SparsityReport(tuple(modules), sizes, total, pruner.shortfall if pruner else None)


def _block_size(block: Block) -> BlockSize:
    """A unit is alive when it still reaches the block's output: some weight of its columns there is not zero."""
    projection, size, kind, units = (
        (block.output, block.head_size, "heads", block.num_heads)
        if isinstance(block, AttentionBlock)
        else (block.down, 1, "neurons", block.num_neurons)
    )
    matrix = weight_target(projection.name, projection.module).weight()
    alive = int((matrix.view(matrix.shape[0], units, size) != 0).any(dim=2).any(dim=0).sum()) if units else 0
    return BlockSize(block.name, kind, units, alive)


def benchmark(models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], repeats: int = 30) -> dict[str, float]:
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
            for _ in range(repeats + 1):
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
