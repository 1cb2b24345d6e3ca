"""Sparsity: true zeros, parameters, and the heads and neurons left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from ..condense import dead_units, is_condensed, stock_config
from ..condense.format import present_name
from ..model import Block, find_blocks
from ..model.families import SPECS
from ..model.passes import count_nonzero
from ..model.targets import Target, Weight, body_weights
from ..model.wrappers import bare_model, transformers_model
from .tables import as_text, table_of_modules


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
    #: Why there are no `blocks`, and what to do about it, if the family has no record.
    no_record: str | None = None

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
            "no_record": self.no_record,
        }

    def __rich__(self) -> Table:
        caption = "\n".join(filter(None, (self.shortfall, self.no_record)))
        title = f"{self.sparsity:.2%} of the body's weights are zero; {self.parameters:,} parameters in all"
        table = table_of_modules(title, "module", "shape", "parameters", "zeros", "sparsity", caption=caption or None)
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


def count_zeros(counted: Iterable[Target | Weight]) -> tuple[int, int]:
    """`(zeros, elements)` over weights and biases, counted from the values; under LoRA those of the merged weight."""
    zeros = elements = 0
    for value in (item.value() for item in counted):
        elements += value.numel()
        zeros += value.numel() - count_nonzero(value)
    return zeros, elements


def sparsity_report(model: Any, shortfall: str | None = None) -> SparsityReport:
    """Count the true zeros of a model's body, and the heads and neurons left where its architecture is known; where it is not, the
    report says how to make it so, as that takes longer than to count.

    Under LoRA, the zeros of the merged weights count.

    Args:
        model: the model, or a wrapper around it (a SentenceTransformer, a SetFitModel; see `model/wrappers.py`).
        shortfall: what it lacks because its pruning ended early, see `Pruner.shortfall`.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one, or there are several transformers models.
    """
    inner = transformers_model(model)
    modules = []
    for weight in body_weights(model):
        zeros, parameters = count_zeros([weight])
        modules.append(ModuleSparsity(weight.name, weight.shape, parameters, zeros, weight.left_out))
    model_type = getattr(getattr(inner, "config", None), "model_type", "")
    sizes = tuple(_block_size(block) for block in find_blocks(model)) if model_type in SPECS else ()
    no_record = None if model_type in SPECS else _no_record(model_type)
    total = sum(parameter.numel() for parameter in bare_model(model).parameters())
    return SparsityReport(tuple(modules), sizes, total, shortfall, no_record)


def _no_record(model_type: str) -> str:
    """What a report says in place of heads and neurons."""
    return (
        f"no record of {model_type or 'this model'}, so heads and neurons are not counted; pruning and condensing infer one, and "
        "so does hf_prune.infer_architecture, for register_architecture"
    )


def print_sparsity(model: Any) -> None:
    """Print how many of the body's weights are zero, in a line, as in the logs, the report and the card.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one.
    """
    report = sparsity_report(model)
    zeros, weights = (sum(getattr(module, name) for module in report.modules) for name in ("zeros", "parameters"))
    print(f"zero weights: {zeros:,} || body weights: {weights:,} || sparsity%: {100 * report.sparsity:.4f}")


def _block_size(block: Block) -> BlockSize:
    return BlockSize(block.name, f"{block.unit}s", block.num_units, alive=block.num_units - int(dead_units(block).sum()))


def stock_twin(model: Any, device: str = "cpu") -> PreTrainedModel:
    """A random model of the same class with the sizes that the model had before it was condensed, or lost tokens.

    It is as slow as the dense model. On device `"meta"` it has shapes and no weights.
    """
    model = transformers_model(model)
    with torch.device(device):
        twin: Any = type(model)(stock_config(model.config))
    twin.to(model.dtype).eval()
    return twin  # type: ignore[no-any-return]


def original_blocks(model: Any) -> tuple[BlockSize, ...]:
    """The blocks of the model that pruning started from, with how many of their heads or neurons are alive in this one.

    A family without an architecture spec has none.
    """
    model = transformers_model(model)
    if model.config.model_type not in SPECS:
        return ()
    entry = getattr(model.config, "hf_prune", None) or {}
    alive = {(block.layer, block.key): _block_size(block).alive for block in find_blocks(model)}
    sizes = []
    for block in find_blocks(stock_twin(model, "meta")):
        now = present_name(entry, block.layer)
        left = 0 if now is None else alive[now, block.key]
        sizes.append(BlockSize(block.name, f"{block.unit}s", block.num_units, left))
    return tuple(sizes)


def lacks_units(model: PreTrainedModel) -> bool:
    """Whether layers of a model have fewer heads or neurons than when pruning started; layers, channels and tokens aside."""
    if not is_condensed(model.config):
        return False
    now = {(block.layer, block.key): block.num_units for block in find_blocks(model)}
    for block in find_blocks(stock_twin(model, "meta")):
        layer = present_name(model.config.hf_prune, block.layer)
        if layer is not None and now[layer, block.key] < block.num_units:
            return True
    return False


def total_sparsity(model: Any) -> float:
    """Share of the body's weights that are zero, or gone since pruning started."""
    model = transformers_model(model)
    left = sum(module.parameters - module.zeros for module in sparsity_report(model).modules)
    return 1 - left / sum(math.prod(weight.shape) for weight in body_weights(stock_twin(model, "meta")))


def evaluated(logged: Mapping[str, float]) -> dict[str, float]:
    """The metrics in what a Trainer logs or returns of an evaluation: without `eval_`, and without times."""
    named = {name.removeprefix("eval_"): value for name, value in logged.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if not name.endswith(("runtime", "_per_second", "_time", "epoch"))}
