"""Tables of the benchmarks on a terminal."""

import io

from rich.console import Console
from tables import print_lines


def test_a_terminal_narrower_than_the_table_cuts_no_cell() -> None:
    lines = [["cell", "last", "best"], ["five-min-target-coin-of-a-long-name", "130.1 ± 15.3", "140.2 ± 9.2"]]
    console = Console(file=io.StringIO(), width=20)
    print_lines(lines, "title", console)
    assert isinstance(console.file, io.StringIO)
    row = console.file.getvalue().splitlines()[-2]
    assert [cell.strip() for cell in row.strip("│").split("│")] == lines[1]
