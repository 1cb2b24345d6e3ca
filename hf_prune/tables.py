"""Tables for people: rich prints them in a terminal, `as_text` makes them a string."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(table: RenderableType) -> str:
    """A table, or several, as plain text, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=10_000, record=True)
    console.print(table, width=console.measure(table).maximum)
    return console.export_text()
