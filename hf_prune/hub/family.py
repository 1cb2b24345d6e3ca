"""The record of a family: the models that one run made, what was asked of each, and what it became. Lies in `family.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import read_object, write_text
from ..measure.tables import as_text
from ..settings.checks import check_types, dataclass_from_dict
from ..settings.errors import within

FAMILY_NAME = "family.json"


@dataclass(frozen=True)
class Member:
    """A model of a family.

    Attributes:
        folder: its folder, in that of the run.
        step: the optimizer step after which it was complete.
        asked: the value of the target.
        predicted: what that became by the costs of the units that are left; a number, also where a share was asked for.
        measured: what it is of the condensed model: counted, or, of a speed-up, timed; None where it could not be timed here.
        parameters: of the condensed model.
        metrics: of the condensed model, without `eval_`.
    """

    folder: str
    step: int
    asked: float
    predicted: float
    measured: float | None
    parameters: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Family:
    """The models of a run to several targets. Prints as a table.

    Attributes:
        target: the field of the config, such as `target_speedup`.
        dense: what the model that the run started from has: 1.0, or how many parameters, operations or bytes.
        members: from the first target to the last, as far as the run has come.
    """

    target: str
    dense: float
    members: tuple[Member, ...] = ()

    @property
    def cost(self) -> str:
        """What the target is of: `speedup`, `parameters`, `flops` or `bytes`."""
        return self.target.removeprefix("target_")

    def points(self, metric: str) -> dict[str, tuple[float, float]]:
        """Folder → what the member has (measured, or else predicted) and its metric; members without it are left out."""
        found = {}
        for member in self.members:
            if metric in member.metrics:
                reached = member.predicted if member.measured is None else member.measured
                found[member.folder] = (reached, member.metrics[metric])
        return found

    def with_member(self, member: Member, targets: Mapping[int, float]) -> Family:
        """The family with one more member, the last: those that a resumed run made later, or another run made, are dropped.

        Args:
            member: the new one.
            targets: step → what was asked of the member that the run has after it.
        """
        kept = (each for each in self.members if each.step < member.step and targets.get(each.step) == each.asked)
        return replace(self, members=(*kept, member))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "members": [asdict(member) for member in self.members]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Family:
        """Build from what `to_dict` returned.

        Raises:
            ConfigError: a field is missing, unknown, or of another type.
        """
        members = []
        for place, each in enumerate(data.get("members") or ()):
            with within(f"members[{place}]."):
                members.append(dataclass_from_dict(Member, each))
                check_types(members[-1])
        return dataclass_from_dict(cls, {**data, "members": tuple(members)})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `family.json` into a folder, atomically."""
        write_text(Path(folder, FAMILY_NAME), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Family | None:
        """Read `family.json` from a folder, or None if there is none.

        Raises:
            ConfigError, ValueError: it is damaged; says where.
        """
        path = Path(folder, FAMILY_NAME)
        if not path.is_file():
            return None
        with within(f"{FAMILY_NAME}: "):
            return cls.from_dict(read_object(path))

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of its members."""
        return list(dict.fromkeys(name for member in self.members for name in member.metrics))

    @property
    def header(self) -> list[str]:
        """What the columns of its table are of."""
        return ["folder", "asked", "predicted", "measured", "parameters", *self.metrics]

    @property
    def rows(self) -> list[list[str]]:
        """The rows of its table, a member each, as text."""
        rows = []
        for member in self.members:
            values = (member.predicted, member.measured, member.parameters, *(member.metrics.get(name) for name in self.metrics))
            rows.append([member.folder, f"{member.asked:,.6g}", *map(number, values)])
        return rows

    def __rich__(self) -> Table:
        table = Table(title=f"A family of {len(self.members)} by {self.cost}; the dense model has {number(self.dense)}")
        for column in self.header:
            table.add_column(column, justify="left" if column == "folder" else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def folder_name(target: str, value: float) -> str:
    """The name of a member's folder, such as `speedup-2.0`, `parameters-0.5` or `parameters-1000000`."""
    counts = target != "target_speedup" and value >= 1 and value == int(value)
    return f"{target.removeprefix('target_')}-{int(value) if counts else float(value)}"


def number(value: float | None) -> str:
    """A cost or a metric, as tables show it."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
