"""Tables and progress for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

# Where the output is no terminal rich would squeeze tables into 80 columns. What looks
# like markup, or like the code of an emoji, is part of the name of a file.
console = Console(
    width=None if Console().is_terminal else 140, markup=False, emoji=False
)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """Iterate with a bar, where there is a terminal to show it."""
    show = dict(console=console, transient=True, disable=not console.is_terminal)
    return track(items, escape(what), total, **show)


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    """Print dicts with the same keys as a table."""
    console.print(f'\n{title}', style='bold', highlight=False)
    table = Table()
    for key in rows[0]:
        table.add_column(str(key), justify='right')
    for row in rows:
        table.add_row(*(_format(value) for value in row.values()))
    console.print(table)


def _format(value: object) -> str:
    return f'{value:.3g}' if isinstance(value, float) else str(value)
