"""Tables: rich prints them in a terminal, `as_text` makes them a string."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def table_of_modules(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table whose first column has names of modules: long ones are folded, none is cut, and numbers stay on one line."""
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def as_text(table: RenderableType) -> str:
    """A table, or several, as plain text, as wide as it needs to be."""
    # Not as for Jupyter, where rich would display what it is only to record.
    console = Console(file=io.StringIO(), width=10_000, record=True, markup=False, force_jupyter=False)
    console.print(table, width=console.measure(table).maximum)
    return console.export_text()
