"""Tables, written as Markdown, LaTeX (booktabs), HTML, CSV and for the terminal, all from one and the same cells."""

import csv
import dataclasses
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Mark = Literal["", "best", "highest"]
"""best: better than all others, beyond its interval and theirs; highest: the highest, but not beyond them."""


class Cell(NamedTuple):
    """A cell's text and how it is marked."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table: the first `labels` columns are words, the others numbers."""

    name: str
    """A short name, for labels and anchors: letters and hyphens."""
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str
    """A sentence or two: what the figures are."""
    labels: int = 1
    marks: str = ""
    """Sentences on what marks mean, for texts that show them; "": no cell has one, or they need no word."""

    @property
    def whole_note(self) -> str:
        """The note, with what marks mean."""
        return f"{self.note} {self.marks}".strip()

    def markdown(self) -> str:
        """A table of GitHub's Markdown, under its title, with its note below."""
        marks = {"": "{}", "best": "**{}**", "highest": "_{}_"}
        lines = [f"| {' | '.join(map(_markdown, self.header))} |"]
        lines.append("|" + "|".join([":--"] * self.labels + ["--:"] * (len(self.header) - self.labels)) + "|")
        lines += [f"| {' | '.join(marks[c.mark].format(_markdown(c.text)) for c in row)} |" for row in self.rows]
        return f"## {_markdown(self.title)}\n\n" + "\n".join(lines) + f"\n\n{_markdown(self.whole_note)}\n"

    def latex(self) -> str:
        """A table of LaTeX with booktabs' rules, its note as the caption."""
        marks = {"": "{}", "best": r"\textbf{{{}}}", "highest": r"\underline{{{}}}"}
        columns = "l" * self.labels + "r" * (len(self.header) - self.labels)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(f'{self.title}. {self.whole_note}')}}}"]
        lines += [rf"\label{{tab:{self.name}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, self.header)) + r" \\", r"\midrule"]
        lines += [" & ".join(marks[c.mark].format(_latex(c.text)) for c in row) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def html(self) -> str:
        """A table of HTML in a box that scrolls by itself where the screen is narrow."""
        kinds = ["l"] * self.labels + ["n"] * (len(self.header) - self.labels)
        head = "".join(
            f'<th scope="col" class="{kind}">{html.escape(name)}</th>'
            for kind, name in zip(kinds, self.header, strict=True)
        )
        body = "\n".join(
            "<tr>"
            + self._row_header(i)
            + "".join(f'<td class="{kind}">{_html(cell)}</td>' for kind, cell in zip(kinds[1:], row[1:], strict=True))
            + "</tr>"
            for i, row in enumerate(self.rows)
        )
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(self.title)}"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
            f'<p class="note">{html.escape(self.whole_note)}</p>'
        )

    def _row_header(self, i: int) -> str:
        """The first cell of a row in HTML; it stands for the rows below that have none."""
        cell = self.rows[i][0]
        if i and not cell.text:
            return ""
        below = next((n for n, row in enumerate(self.rows[i + 1 :], 1) if row[0].text), len(self.rows) - i)
        span = f' rowspan="{below}"' if below > 1 else ""
        return f'<th scope="row" class="l"{span}>{_html(cell)}</th>'

    def rich(self) -> "RichTable":
        """A table for the terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if i < self.labels else "right", overflow="fold")
        styles = {"": "", "best": "bold", "highest": "underline"}
        for row in self.rows:
            table.add_row(*(Text(cell.text, style=styles[cell.mark]) for cell in row))
        return table

    def within(self, width: int) -> "Table | None":
        """The table as it fits a terminal of a width, without some of its numbers' columns; None where none fits.

        The last column stays where it can, and the first ones of numbers as far as they fit.
        """
        from diffrl.support.console import Console

        console = Console(width=10_000)
        most = len(self.header) - 1
        with_last = [[*range(kept), most] for kept in range(most, self.labels - 1, -1)]
        without = [[*range(kept)] for kept in range(most, self.labels, -1)]
        for places in [*with_last, *without]:
            cut = dataclasses.replace(
                self, header=[self.header[i] for i in places], rows=[[row[i] for i in places] for row in self.rows]
            )
            if console.measure(cut.rich()).maximum <= width:
                return cut
        return None

    def width(self) -> int:
        """Letters of a terminal's line that the table needs."""
        columns = zip(self.header, *((cell.text for cell in row) for row in self.rows), strict=True)
        return sum(max(map(len, column)) + 2 for column in columns)


def to_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A CSV text of rows; floats are written in full, and nan as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(value, float) and value != value else value for value in row])
    return text.getvalue()


def _html(cell: Cell) -> str:
    text = html.escape(cell.text)
    return f"<b>{text}</b>" if cell.mark == "best" else f"<u>{text}</u>" if cell.mark == "highest" else text


def _markdown(text: str) -> str:
    """A text that Markdown shows as it stands."""
    special = "\\`*_<>|#[]" if "](" in text else "\\`*_<>|#"
    return "".join(f"\\{letter}" if letter in special else letter for letter in text)


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
}


def _latex(text: str) -> str:
    """A text that LaTeX shows as it stands."""
    return "".join(_LATEX.get(letter, letter) for letter in text)
