"""Tables for people: rich prints them in a terminal, `as_text` makes them a string."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def as_text(table: Table) -> str:
    """A table as plain text, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=10_000, record=True)
    console.print(table, width=console.measure(table).maximum)
    return console.export_text()
