"""Tables of the benchmarks: on the terminal, and in Markdown."""

from rich.console import Console
from rich.table import Table

Lines = list[list[str]]
"""A table, its head first."""


def print_lines(lines: Lines, title: str, console: Console, left: int = 2) -> None:
    """A table on the terminal, its first `left` columns aligned to the left."""
    table = Table(title=title)
    for i, column in enumerate(lines[0]):
        table.add_column(column, justify="left" if i < left else "right")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


def markdown(lines: Lines) -> str:
    """The same as Markdown."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]) + "\n"
