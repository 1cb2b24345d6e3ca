"""From a model's folder to that of one with fewer layers or experts, or narrower ones: shrink, save, reload, compare."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from ..condense import smaller
from ..files import new_folder
from ..hub import CardFacts, write_made_from
from ..measure.tables import as_text
from ..oneshot.calibration import calibration
from ..oneshot.driver import still
from ..oneshot.folder import reloading_difference
from ..oneshot.sensitivity import divergence, predictions
from ..oneshot.walk import Rows
from ..settings.config import CONFIG_NAME, PruningConfig
from ..settings.errors import ConfigError, within
from .depth import check_depth, shrink_depth
from .expert_neurons import check_expert_neurons, shrink_expert_neurons
from .experts import check_experts, shrink_experts
from .hidden import check_size, shrink_hidden

#: One batch of so many is held out: nothing is chosen by it.
_HELD_OUT = 10


@dataclass(frozen=True)
class ShrunkFolder:
    """What was written. Prints as a table.

    Attributes:
        parameters_before, parameters: of the model.
        removed_layers: indices of the layers that are gone since the original model, by the name of their list.
        smaller: what there is less of → how much now, and in the original model.
        held_out_error: how far the predictions are from those before, on rows that nothing was chosen by; see `PruneReport`.
        difference: the most by which an output of the reloaded model differs from that of the model in memory.
        left_out: file beside the old model → why it was left behind.
    """

    parameters_before: int
    parameters: int
    removed_layers: Mapping[str, list[int]]
    smaller: Mapping[str, tuple[int, int]]
    held_out_error: float | None
    difference: float
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table("", "", title="a smaller model", show_header=False)
        table.add_row("parameters", f"{self.parameters_before:,} → {self.parameters:,}")
        for path, indices in self.removed_layers.items():
            table.add_row(f"gone from {path}", ", ".join(map(str, indices)))
        for name, (now, before) in self.smaller.items():
            table.add_row(name, f"{before:,} → {now:,}")
        if self.held_out_error is not None:
            table.add_row("held-out error", f"{self.held_out_error:.4g}")
        table.add_row("difference after reloading", f"{self.difference:.1e}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def shrink_to_folder(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    num_layers: int | dict[str, int] | None = None,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    moe_intermediate_size: int | None = None,
    criterion: str = "greedy_removal",
    rotate: bool = False,
    base_model: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ShrunkFolder:
    """Shrink a model in place, layers first, experts last, and save it beside the one that it came from, all or nothing.

    Args:
        model: as `source` has it.
        source: its folder. Tokenizer and all else that belongs to a model come along.
        out: the folder to write.
        batches: calibration rows, as the model's forward takes them; one batch of ten is held out, if there are several.
        num_layers, criterion: see [`shrink_depth`].
        hidden_size, rotate: see [`shrink_hidden`].
        num_experts: see [`shrink_experts`].
        moe_intermediate_size: see [`shrink_expert_neurons`].
        base_model: what the card says the model was made from.
        settings: what else the card lists.

    Raises:
        ConfigError: nothing is asked for, or see [`shrink_depth`], [`shrink_hidden`], [`shrink_experts`] and
            [`shrink_expert_neurons`].
        RuntimeError: the reloaded model computes something else.
        ValueError: there is something at `out`, or something in `source` cannot be read.
    """
    if all(size is None for size in (num_layers, hidden_size, num_experts, moe_intermediate_size)):
        raise ConfigError("num_layers", None, "must be given, or hidden_size, num_experts or moe_intermediate_size.")
    if num_layers is not None:
        check_depth(model, num_layers)
    if hidden_size is not None:
        with within("hidden_"):
            check_size(model, hidden_size)
    if num_experts is not None:
        check_experts(model, num_experts)
    if moe_intermediate_size is not None:
        check_expert_neurons(model, moe_intermediate_size)
    rows = calibration(model, batches, sum(len(next(iter(batch.values()))) for batch in batches), 0.0, labels=False, seed=0)
    chosen = [batch for index, batch in enumerate(batches) if index % _HELD_OUT]
    held_out = Rows(rows.batches[::_HELD_OUT], [~part for part in rows.held_out[::_HELD_OUT]]) if chosen else Rows([], [])
    facts, parameters = CardFacts.load(source), model.num_parameters()
    config = PruningConfig.from_pretrained(source) if Path(source, CONFIG_NAME).is_file() else None
    with new_folder(out) as folder:
        with still(model), torch.no_grad():
            dense = predictions(model, held_out)
        if num_layers is not None:
            shrink_depth(model, num_layers, chosen or batches, criterion=criterion)
        if hidden_size is not None:
            shrink_hidden(model, hidden_size, chosen or batches, rotate=rotate)
        if num_experts is not None:
            shrink_experts(model, num_experts, chosen or batches)
        if moe_intermediate_size is not None:
            shrink_expert_neurons(model, moe_intermediate_size, chosen or batches)
        with still(model), torch.no_grad():
            error = divergence(model, held_out, dense)
        listed = {} if error is None else {"held-out error": f"{error:.4g}"}
        facts = facts.of_child(base_model, calibration={**(settings or {}), **listed})
        left = write_made_from(model, source, folder, config, facts)
        difference = reloading_difference(model, folder)
    entry = getattr(model.config, "hf_prune", None) or {}
    return ShrunkFolder(
        parameters_before=parameters,
        parameters=model.num_parameters(),
        removed_layers=entry.get("removed_layers", {}),
        smaller=smaller(model.config),
        held_out_error=error,
        difference=difference,
        left_out=left,
    )
