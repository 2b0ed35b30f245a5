"""A report of many runs, written as files: the page, its tables for papers, its figures, its numbers."""

from pathlib import Path

from diffrl.runs.study import figures as draw
from diffrl.runs.study.contents import aggregates_csv, main_table, results_csv, scores_csv, tables
from diffrl.runs.study.page import MARK, Figures, page
from diffrl.runs.study.summary import Summary
from diffrl.runs.study.tables import Table
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, beginning, or_removed
from diffrl.support.plots import save_pdf
from diffrl.support.schema import held

PAGE = "index.html"
"""The page's file in a report's folder."""
FILES = ("scores.csv", "results.csv", "aggregates.csv", "tables.md", "tables.tex", "figures.pdf", "figures")
"""What else is in it."""


def write_report(summary: Summary, out: Path | str, interval: bool = False, title: str = "") -> tuple[Path, Table]:
    """Write a report into the folder `out`; give the page's path and the main table.

    It has index.html, which needs no other file; tables.md and tables.tex (booktabs); scores.csv, which is every
    evaluation, results.csv and aggregates.csv; figures.pdf, a page a figure, and figures/, each as SVG. A report that
    is there is replaced.

    interval: show 95 % intervals in the main table, and not standard errors. Raises UserError where `out` is a file, or
    has files of these names that are no report's.
    """
    out = Path(held(out, Path, "out"))
    old = _old(out)
    drawn = Figures(
        draw.learning_curves(summary, "steps"),
        draw.learning_curves(summary, "minutes"),
        draw.aggregates(summary),
        draw.profiles(summary),
        draw.improvements(summary),
    )
    made = tables(summary, interval)
    texts = {
        PAGE: page(summary, drawn, interval, title or _title(summary)),  # first: it tells that the others are ours
        "scores.csv": scores_csv(summary),
        "results.csv": results_csv(summary),
        "aggregates.csv": aggregates_csv(summary),
        "tables.md": "\n".join(table.markdown() for table in made),
        "tables.tex": _preamble(drawn) + "\n".join(table.latex() for table in made),
    }
    with or_removed(out):
        for name, text in texts.items():
            with atomic_path(out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        for path in old:
            path.unlink(missing_ok=True)
        for one in drawn:
            with atomic_path(out / "figures" / f"{one.name}.svg") as temporary:
                temporary.write_text(one.svg, encoding="utf-8")
        if figures := [one.figure for one in drawn]:
            save_pdf(figures, out / "figures.pdf")
    return out / PAGE, main_table(summary, interval)


def _preamble(drawn: Figures) -> str:
    """What LaTeX needs for the tables, and which page of figures.pdf is which figure: comments."""
    pages = [rf"% \includegraphics[page={i}]{{figures.pdf}}  {one.name}" for i, one in enumerate(drawn, 1)]
    return "\n".join([r"% \usepackage{booktabs,graphicx}", *pages]) + "\n\n"


def _title(summary: Summary) -> str:
    tasks, agents = summary.scores.tasks, summary.scores.agents
    where = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    what = " and ".join(agents) if len(agents) <= 2 else f"{len(agents)} agents"
    return f"{what} on {where}"


def _old(out: Path) -> list[Path]:
    """The figures of the report that is in `out`, which may have others than the new one; [] where there is none.

    Raises UserError where no report may be written there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and the report is to be a folder: choose another --out.")
    if (out / "run.json").exists():
        raise UserError(f"{out} is a run's folder, and the report is to have its own: choose another --out.")
    page = out / PAGE
    if page.is_file() and MARK in beginning(page):
        drawn = [path for path in (out / "figures").glob("*.svg") if draw.named_by_us(path.stem)]
        return [out / "figures.pdf", *drawn]
    if there := next((out / name for name in (PAGE, *FILES) if (out / name).exists()), None):
        raise UserError(f"{there} is no report of ours, and is not overwritten: choose another --out.")
    return []
