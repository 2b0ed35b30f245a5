"""The report as one page of HTML that needs no other file: its words, tables and figures put into the template."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from diffrl.runs.study import published
from diffrl.runs.study.contents import tables
from diffrl.runs.study.figures import MOST_TASKS, Drawn, inline
from diffrl.runs.study.protocols import PROTOCOLS
from diffrl.runs.study.statistics import BOOTSTRAP_SEED, DRAWS
from diffrl.runs.study.summary import Summary
from diffrl.support.errors import joined

MARK = '<meta name="generator" content="diffrl report">'
"""What every page of ours has, so that it may be written anew."""


@dataclass(frozen=True)
class Figures:
    """The figures of a report, by the section in which they stand."""

    steps: Sequence[Drawn]
    minutes: Sequence[Drawn]
    aggregates: Sequence[Drawn]
    profiles: Sequence[Drawn]
    improvements: Sequence[Drawn]

    def __iter__(self) -> Iterator[Drawn]:
        return iter([*self.steps, *self.minutes, *self.aggregates, *self.profiles, *self.improvements])


def page(summary: Summary, figures: Figures, interval: bool, title: str) -> str:
    """The page's HTML. Everything that comes from files is escaped."""
    made = {table.name: table for table in tables(summary, interval)}
    sections = [_section("results", "Results", made["results"].html()), _care(summary)]

    def add(name: str, title: str, drawn: Sequence[Drawn], words: str = "", table: str = "") -> None:
        parts = [f"<p>{words}</p>" if words else "", _figures(drawn)]
        parts.append(made[table].html() if table in made else "")
        if drawn or table in made:
            sections.append(_section(name, title, "".join(parts)))

    share = f"{100 * summary.fraction:g}&nbsp;%"
    add("aggregates", "Aggregates over tasks", figures.aggregates, table="aggregates")
    add(
        "profiles",
        "Performance profiles",
        figures.profiles,
        "The share of runs that score more than &tau;, a mean over tasks: a line above another is better at every "
        "level. Bands are 95&nbsp;% intervals, where there are seeds to draw." + _coinciding(summary),
    )
    add("improvement", "Probability of improvement", figures.improvements, table="improvement")
    band = "The mean over seeds at the steps that all of them have; the band is a standard error to either side."
    if len(summary.scores.tasks) > MOST_TASKS:
        band += f" Shown are the first {MOST_TASKS} tasks."
    add("curves", "Learning curves over steps", figures.steps, band)
    whole = "Time is what a run had worked, all its seeds at once, evaluations included. Compare runs of one machine."
    add("minutes", "Learning curves over time", figures.minutes, whole)
    add("efficiency", "Sample efficiency", [], f"How soon {share} of a final score was reached.", "efficiency")
    add("protocols", "By other protocols", [], table="protocols")
    if "published" in made:
        sections.append(_section("published", "Beside published scores", made["published"].html() + _sources()))
    sections += [_section("methods", "What the figures are", _methods(summary)), _runs(summary)]
    names = {name: head for name, head, _ in (part for part in sections if part)}
    fewest, most = summary.seeds
    lead = (
        f"{_count(len(summary.scores.agents), 'agent')}, {_count(len(summary.scores.tasks), 'task')}, "
        f"{fewest if fewest == most else f'{fewest} to {most}'} seed{'s' * (most > 1)} each, "
        f"{len(summary.scores.rows):,} evaluations. Shown: {summary.protocol}, {PROTOCOLS[summary.protocol]}."
    )
    from importlib.metadata import version

    folder = files("diffrl.runs.study").joinpath("page")
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        lead=html.escape(lead),
        contents="".join(f'<a href="#{name}">{head}</a>' for name, head in names.items()),
        sections="\n".join(text for _, _, text in sections),
        footer=f"Made by diffrl {html.escape(version('diffrl'))}. This page needs no other file and no network.",
    )


def _coinciding(summary: Summary) -> str:
    """A sentence on agents whose profiles are one line, of which the figure shows the last; "" where there are none."""
    lines: dict[bytes, list[str]] = {}
    for agent, found in summary.profiles[1].items():
        lines.setdefault(found.value.tobytes(), []).append(agent)
    same = [joined(agents) for agents in lines.values() if len(agents) > 1]
    return f" One line lies on the other: those of {html.escape('; of '.join(same))}." if same else ""


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _section(name: str, head: str, body: str, kind: str = "") -> tuple[str, str, str]:
    return name, head, f'<section id="{name}"{kind}><h2>{head}</h2>\n{body}\n</section>'


def _figures(drawn: Sequence[Drawn]) -> str:
    if not drawn:
        return ""
    return f'<div class="figures">{"".join(f"<figure>{inline(one)}</figure>" for one in drawn)}</div>'


def _care(summary: Summary) -> tuple[str, str, str]:
    notes = "".join(
        f"<li><b>{html.escape(note.about)}.</b> {html.escape(note.sentence)}</li>" for note in summary.caveats()
    )
    body = f"<ul>{notes}</ul>" if notes else "<p>Nothing out of the ordinary was found.</p>"
    return _section("care", "Read with care", body, ' class="care"')


def _sources() -> str:
    items = "".join(f"<li><b>{name}.</b> {html.escape(said)}</li>" for name, said in published.SOURCES.items())
    return f'<div class="sources note"><p>Sources:</p><ul>{items}</ul></div>'


def _methods(summary: Summary) -> str:
    what: dict[str, str] = {name: f"{said[0].upper()}{said[1:]}." for name, said in PROTOCOLS.items()}
    what["± and intervals"] = "± is the standard error over seeds. Intervals of single tasks are Student's, at 95 %."
    if summary.shared.tasks:
        what |= _of_aggregates(summary.target)
    return f"<dl>{''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in what.items())}</dl>"


def _of_aggregates(target: float) -> dict[str, str]:
    """How the figures over several tasks are made, by what they are called."""
    return {
        "bootstrap": "Each task's seeds are drawn anew with replacement, tasks stay: a stratified bootstrap, its "
        f"percentiles at 95 %, {DRAWS:,} draws (2,000 for profiles), seed {BOOTSTRAP_SEED}. So it says what other "
        "seeds would give, not other tasks.",
        "IQM": "The mean of the middle half of all runs of all tasks.",
        "median, mean": "Over tasks, of the mean over seeds.",
        "optimality gap": f"How far runs stay below {target:g} on average; what is above it does not make up for "
        "others.",
        "P(X > Y)": "The probability that a run of X scores more than one of Y on a task: Mann-Whitney's U / (m n), a "
        "mean over tasks; a tie counts one half.",
        "source": "Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice "
        "(arXiv 2108.13264).",
    }


def _runs(summary: Summary) -> tuple[str, str, str]:
    """The runs that were read, and the folders that were not."""
    read = sorted({row.run for row in summary.scores.rows if row.run})
    body = "".join(f"<p>{html.escape(said)}</p>" for said in summary.scores.left_out)
    items = "".join(f"<li><code>{html.escape(path)}</code></li>" for path in read)
    return _section(
        "runs", "Runs", body + f"<details open><summary>{len(read)} read</summary><ul>{items}</ul></details>"
    )
