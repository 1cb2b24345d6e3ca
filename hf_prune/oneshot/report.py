"""What `prune()` did, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..measure.tables import as_text, table_of_modules


@dataclass(frozen=True)
class PrunedModule:
    """One block or weight.

    Errors are of what it gives, on rows that were held out, relative to what the dense model gives there: 0 is the same, and 1 is
    giving nothing. None where no row was held out, or where the module lies outside the layers.

    Attributes:
        name: of the block or weight.
        units, units_left: how many there were and are.
        error_masked: with zeros and nothing else.
        error: as it is now.
        updated: whether the update was taken; it is not where it would make the held-out error larger.
    """

    name: str
    units: int
    units_left: int
    error_masked: float | None = None
    error: float | None = None
    updated: bool = False


@dataclass(frozen=True)
class PruneReport:
    """What `prune()` did.

    Attributes:
        target: the share of the named weights that was to go; of a target in costs, the share of what their units cost.
        sparsity: the share of them that is zero.
        budget: of a target in costs, what it became as far as costs can tell: `speedup`, `parameters`, `flops` or `bytes`.
        predicted_error: the rise of the loss that the scores add up to, before anything was changed: in nats a row under criterion
            `obs`, else in the criterion's own unit; only comparable between prunings by the same criterion.
        searched: budget whose allocation was searched → the divergence of the model that the units as they were scored lead to, and
            of the one that was found; on rows that weights were solved with, each weight as if all before it were dense.
        held_out_error: KL divergence of the model's predictions from the dense model's on held-out rows, in nats a prediction; of a
            model without logits the relative squared error of its output. None if no row was held out.
        seconds: of wall time.
        extra_bytes: the most memory that was taken at a time for copies, streams and statistics.
        modules: one by one.
        skipped: module → why it was not pruned.
    """

    target: float
    sparsity: float
    budget: Mapping[str, float]
    predicted_error: float
    searched: Mapping[str, tuple[float, float]]
    held_out_error: float | None
    seconds: float
    extra_bytes: int
    modules: tuple[PrunedModule, ...]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        error = "" if self.held_out_error is None else f"; held-out error {self.held_out_error:.4g}"
        costs = "".join(f"; {name} {value:,.6g}" for name, value in self.budget.items())
        title = f"{self.sparsity:.2%} of the named weights are zero{costs}{error}"
        table = table_of_modules(title, "module", "kept", "error, masked", "error", "", caption=f"{self.seconds:.0f} seconds")
        for module in self.modules:
            errors = ("" if value is None else f"{value:.4f}" for value in (module.error_masked, module.error))
            table.add_row(
                module.name, f"{module.units_left:,} of {module.units:,}", *errors, "" if module.updated else "masked only"
            )
        for name, reason in self.skipped.items():
            table.add_row(name, "skipped", "", "", reason)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())
