"""From a model's folder to that of a smaller one: prune, condense, save with card and companions, reload, compare."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from ..condense import condense, condense_plan, nothing_to_cut
from ..condense.verify import all_outputs, tolerance
from ..files import new_folder
from ..hub import CardFacts, write_made_from
from ..hub.card import budget_facts
from ..measure.sparsity import BlockSize, original_blocks, total_sparsity
from ..measure.tables import as_text
from ..model import find_blocks
from ..model.loading import load_model
from ..settings.config import PruningConfig, PruningRule
from .calibration import complete
from .driver import prune
from .report import PruneReport


@dataclass(frozen=True)
class PrunedFolder:
    """What was written. Prints as a table.

    Attributes:
        parameters_before, parameters: of the model.
        sparsity: share of the weights of the model's body that are zero, or gone since pruning started.
        condensed: whether heads, neurons or layers were cut out.
        note: why not, where nothing was to be cut out.
        difference: the most by which an output or hidden state of the reloaded model differs from that of the model in memory.
        original_blocks: the blocks of the dense model, with how many of their heads or neurons are alive.
        left_out: file beside the dense model → why it was left behind.
        report: see [`prune`].
    """

    parameters_before: int
    parameters: int
    sparsity: float
    condensed: bool
    note: str | None
    difference: float
    original_blocks: tuple[BlockSize, ...]
    left_out: Mapping[str, str]
    report: PruneReport

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        report = self.report
        table = Table("", "", title=f"{report.sparsity:.2%} of the named weights are pruned", show_header=False)
        table.add_row("parameters", f"{self.parameters_before:,} → {self.parameters:,}")
        for name, value in report.budget.items():
            table.add_row(f"{name}, as predicted", f"{value:,.6g}")
        for before, after in report.searched.values():
            table.add_row("error by search", f"{before:.4g} → {after:.4g}")
        table.add_row("weights removed", f"{self.sparsity:.2%} of the model's body")
        for kind in dict.fromkeys(block.kind for block in self.original_blocks):
            blocks = [block for block in self.original_blocks if block.kind == kind]
            alive, units = sum(block.alive for block in blocks), sum(block.units for block in blocks)
            table.add_row(f"{kind} kept", f"{alive:,} of {units:,}")
        if report.held_out_error is not None:
            table.add_row("held-out error", f"{report.held_out_error:.4g}")
        table.add_row("seconds", f"{report.seconds:.0f}")
        table.add_row("difference after reloading", f"{self.difference:.1e}")
        for reason, number in Counter(report.skipped.values()).items():
            names = [name for name, why in report.skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (f" and {number - 3} more" if number > 3 else "")
            table.add_row(f"not pruned: {shown}", reason)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def heads_and_neurons(model: PreTrainedModel) -> list[PruningRule]:
    """Rules that share a target: attention heads, or key and value heads with those that share them, and neurons."""
    attentions = [block for block in find_blocks(model) if block.unit == "head"]
    grouped = all(1 < block.num_groups < block.num_units for block in attentions)
    return [PruningRule(pattern="kv_group" if attentions and grouped else "head"), PruningRule(pattern="neuron")]


def prune_to_folder(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PruningConfig,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    cut: bool = True,
    seed: int = 0,
    search: int = 0,
    base_model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> PrunedFolder:
    """Prune a model in place, condense it, and save it beside the one that it was loaded from; all or nothing on disk.

    Args:
        model: dense, as `source` has it.
        source: its folder. Tokenizer and all else that belongs to a model come along.
        out: the folder to write.
        config: what to prune and how much.
        batches: calibration rows, as the model's forward takes them.
        cut: condense it, where there is anything to cut out; otherwise weights that are pruned stay as zeros.
        seed, search: of [`prune`].
        base_model: what the card says pruning started from.
        settings: what else the card lists.
        progress: see [`prune`].

    Raises:
        ConfigError: see [`prune`].
        RuntimeError: the reloaded model computes something else, or see [`condense`].
        ValueError: there is something at `out`, or something in `source` cannot be read.
    """
    config, facts, before = complete(config), CardFacts.load(source), model.num_parameters()
    with new_folder(out) as folder:
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        report = prune(model, config, batches, calibration_rows=rows, seed=seed, search=search, progress=progress)
        note = nothing_to_cut(model, None) if cut and condense_plan(model).empty else None
        condensed = cut and note is None
        if condensed:
            condense(model)
        error = "none measured" if report.held_out_error is None else f"{report.held_out_error:.4g}"
        listed = {"rows": rows, "seed": seed, "held-out error": error, "seconds": f"{report.seconds:.0f}"}
        listed |= {"search": f"{search} tries"} if search else {}
        predicted = next(iter(report.budget.values()), None)
        facts = facts.of_child(base_model, calibration={**(settings or {}), **listed}, budget=budget_facts(config, predicted))
        left = write_made_from(model, source, folder, config, facts)
        difference = reloading_difference(model, folder)
    return PrunedFolder(
        parameters_before=before,
        parameters=model.num_parameters(),
        sparsity=total_sparsity(model),
        condensed=condensed,
        note=note,
        difference=difference,
        original_blocks=original_blocks(model),
        left_out=left,
        report=report,
    )


def reloading_difference(model: PreTrainedModel, folder: str | os.PathLike[str]) -> float:
    """The most by which an output or hidden state of a saved model, loaded again, differs from that of the one in memory.

    Raises:
        RuntimeError: rounding does not explain it.
    """
    again: Any = load_model(folder)
    here, there = (all_outputs(one) for one in (model, again.to(model.device)))
    gaps = {name: float((value.double() - there[name].double()).abs().max()) for name, value in here.items()}
    wrong = {name: gap for name, gap in gaps.items() if not gap <= tolerance(here[name], model.dtype)}
    if wrong:
        name = max(wrong, key=lambda name: wrong[name])
        raise RuntimeError(f"the model differs by {wrong[name]:.2e} in {name} when it is loaded again; nothing was written.")
    return max(gaps.values(), default=0.0)
