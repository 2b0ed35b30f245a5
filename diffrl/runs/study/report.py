"""A report of many runs, written as files: the page, its tables for papers, its figures, its numbers."""

from collections.abc import Callable
from pathlib import Path

from diffrl.runs.study import figures as draw
from diffrl.runs.study.contents import aggregates_csv, main_table, results_csv, scores_csv, tables
from diffrl.runs.study.page import MARK, Figures, page
from diffrl.runs.study.summary import Summary
from diffrl.runs.study.tables import Table
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.plots import save_pdf

PAGE = "index.html"
"""The page's file in a report's folder."""


def write_report(
    summary: Summary, out: Path, interval: bool = False, title: str = "", say: Callable[[str], None] = lambda text: None
) -> tuple[Path, Table]:
    """Write a report into the folder `out`; give the page's path and the main table.

    It has index.html, which needs no other file; tables.md and tables.tex (booktabs); scores.csv, which is every
    evaluation, results.csv and aggregates.csv; and figures/, each figure as PDF. A report that is there is replaced.

    interval: show 95 % intervals in the main table, and not standard errors. say: hears what is being done. Raises
    UserError where `out` is a file, or has a page that is not a report's.
    """
    _refuse_others(out)
    drawn = Figures(
        draw.learning_curves(summary, "steps"),
        draw.learning_curves(summary, "minutes"),
        draw.aggregates(summary),
        draw.profiles(summary),
        draw.improvements(summary),
    )
    say("Drawing the page.")
    made = tables(summary, interval)
    texts = {
        "scores.csv": scores_csv(summary),
        "results.csv": results_csv(summary),
        "aggregates.csv": aggregates_csv(summary),
        "tables.md": "\n".join(table.markdown() for table in made),
        "tables.tex": "% \\usepackage{booktabs}\n\n" + "\n".join(table.latex() for table in made),
        PAGE: page(summary, drawn, interval, title or _title(summary)),
    }
    for name, text in texts.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    say("Drawing the figures as PDF.")
    folder = out / "figures"
    for old in folder.glob("*.pdf"):  # of a report with more tasks
        old.unlink()
    for one in drawn:
        save_pdf(one.figure, folder / f"{one.name}.pdf")
    return out / PAGE, main_table(summary, interval)


def _title(summary: Summary) -> str:
    tasks, agents = summary.scores.tasks, summary.scores.agents
    where = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    what = " and ".join(agents) if len(agents) <= 2 else f"{len(agents)} agents"
    return f"{what} on {where}"


def _refuse_others(out: Path) -> None:
    """Raise UserError where a report may not be written into `out`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and the report is to be a folder: choose another --out.")
    if (out / PAGE).exists() and MARK not in (out / PAGE).read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UserError(f"{out / PAGE} is no report of ours, and is not overwritten: choose another --out.")
