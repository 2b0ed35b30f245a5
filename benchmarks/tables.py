"""Tables of the benchmarks: on the terminal, and in Markdown."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffrl.support.files import atomic_path

Lines = list[list[str]]
"""A table, its head first."""


def console_of(width: int) -> Console:
    """The terminal, as wide as it is; in a file, where nothing need be folded, `width` characters."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_lines(lines: Lines, title: str, console: Console, left: int = 2) -> None:
    """A table on the terminal, its first `left` columns aligned to the left.

    No cell is cut: where the terminal is narrower than the table, the console is made as wide as the table.
    """
    table = Table(title=title)
    for i, column in enumerate(lines[0]):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line)
    console.width = max(console.width, Console(width=sys.maxsize).measure(table).maximum)
    console.print(table)


def markdown(lines: Lines) -> str:
    """A table as Markdown."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]) + "\n"


def fill(page: Path, marker: str, text: str) -> None:
    """Replace what stands between a page's markers of that name; markers that are missing are added at its end."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    old = page.read_text() if page.exists() else ""
    if begin not in old:
        old += f"\n{begin}{end}\n"
    head, rest = old.split(begin, 1)
    with atomic_path(page) as temporary:
        temporary.write_text(head + begin + text + end + rest.split(end, 1)[1])
