"""The figures of a report: learning curves, aggregates, performance profiles, probabilities of improvement."""

import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffrl.runs.study.protocols import Curve, time_unit
from diffrl.runs.study.statistics import Interval
from diffrl.runs.study.summary import AGGREGATES, Summary
from diffrl.support.plots import DISTINCT, finish, new_figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6
"""Inches: at its own size, so with text of its own size, on a phone."""
INK, QUIET = "#1d1f22", "#9a9da1"
"""Colours of text and of axes; a page replaces them by its own, and so those of lines."""
_LINES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
"""Of the agents that have each colour the first time, the second, ..."""
_LONG = 16
"""Letters of the longest name that stands at the end of its line."""
MOST_TASKS = 40
"""Tasks that have figures of their own; of more tasks, the first."""
_MOST_PAIRS = 15
"""Pairs of agents that are compared in a figure; of more, those with the first."""


@dataclass(frozen=True)
class Drawn:
    """A figure that is drawn when it is asked for."""

    name: str
    """Its file's name, without suffix."""
    alt: str
    """What it shows, for who cannot see it."""
    draw: Callable[[], "Figure"]

    @cached_property
    def figure(self) -> "Figure":
        """The figure, drawn and laid out once."""
        figure = self.draw()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure

    @cached_property
    def svg(self) -> str:
        """The figure as SVG."""
        return svg(self.figure)


def colour(summary: Summary, agent: str) -> str:
    """An agent's colour, the same in all figures."""
    return DISTINCT[summary.scores.agents.index(agent) % len(DISTINCT)]


def _score(summary: Summary) -> str:
    """What scores are called on axes."""
    return "score" if summary.fractions else "score x100"


def _round(summary: Summary, agent: str) -> int:
    """How often an agent's colour was given before."""
    return summary.scores.agents.index(agent) // len(DISTINCT) % len(_LINES)


def _line(summary: Summary, agent: str) -> str:
    return _LINES[_round(summary, agent)]


@contextmanager
def _style() -> Iterator[None]:
    """Text and axes in our colours; names are shown as they stand, a dollar is no formula."""
    import matplotlib

    names = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: dict[Any, Any] = {**dict.fromkeys(names, INK), **dict.fromkeys(lines, QUIET), "text.parse_math": False}
    with matplotlib.rc_context({**style, "font.size": 10, "axes.titlesize": 10.5}):
        yield


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _folded(name: str, width: int) -> str:
    """A name in lines of so many letters, four at most: settings at a long name's end tell agents apart."""
    return "\n".join(textwrap.wrap(name, width, max_lines=4, placeholder=" …"))


def _size(labels: Sequence[str]) -> float:
    """The size of labels' letters, in points."""
    return 8 if any("\n" in label for label in labels) else 10


def _height(labels: Sequence[str]) -> float:
    """Inches that rows with these labels take."""
    return len(labels) * (0.17 + 0.13 * max(label.count("\n") + 1 for label in labels))


def _label_ends(ax: "Axes", ends: Sequence[tuple[str, float, str]], size: float = 9) -> None:
    """Names at the right of their lines' ends (name, y, colour), moved apart where they would overlap."""
    low, high = ax.get_ylim()
    figure = ax.get_figure(root=True)
    assert figure is not None
    gap = size * 1.25 / 72 / (0.72 * figure.get_size_inches()[1])
    places: list[float] = []
    ordered = sorted(ends, key=lambda end: end[1])
    for _, y, _ in ordered:
        at = (y - low) / (high - low)
        places.append(max(at, places[-1] + gap) if places else at)
    if places and places[-1] > 1:  # push down from the top
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for (name, _, shade), at in zip(ordered, places, strict=True):
        ax.annotate(
            name,
            (1, at),
            (5, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=shade,
            fontsize=size,
            annotation_clip=False,
        )


def _legend_height(names: Collection[str]) -> float:
    """Inches that a legend of these names takes."""
    return 0.2 * -(-len(names) // _columns(names))


def _columns(names: Collection[str]) -> int:
    return 1 if max(map(len, names), default=0) > 24 else 2


def _legend(ax: "Axes") -> None:
    """A legend below the plot."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=_columns(labels), frameon=False, fontsize=9, handlelength=3
    )


def learning_curves(summary: Summary, over: Literal["steps", "minutes"]) -> list[Drawn]:
    """A figure a task: the mean over seeds and a band of a standard error, over steps or minutes; [] if not known."""
    found = []
    for task in summary.scores.tasks[:MOST_TASKS]:
        of_task = {agent: c for (name, agent), c in summary.curves.items() if name == task and len(c.steps)}
        if over == "minutes":
            of_task = {agent: c for agent, c in of_task.items() if np.isfinite(c.minutes).all()}
        if of_task:
            unit = _score(summary) if summary.scores.unit(task) == "score" else "return"
            along = _over(of_task, over)[0]
            alt = f"{unit} over {along} on {task}, a line an agent: {', '.join(of_task)}"
            name = f"curve-{over}-{summary.scores.tasks.index(task) + 1}"
            found.append(Drawn(name, alt, _curves(summary, task, of_task, over, unit)))
    return found


def _over(curves: dict[str, Curve], over: Literal["steps", "minutes"]) -> tuple[str, float]:
    """What stands below the axis of curves over steps or minutes, and by how much their places on it are multiplied."""
    if over == "steps":
        return "training steps", 1
    return time_unit(np.concatenate([one.minutes for one in curves.values()]))


def _curves(
    summary: Summary, task: str, curves: dict[str, Curve], over: Literal["steps", "minutes"], unit: str
) -> Callable[[], "Figure"]:
    def draw() -> "Figure":
        from matplotlib.ticker import EngFormatter

        along, times = _over(curves, over)
        direct = max(map(len, curves)) <= _LONG and len(curves) <= len(DISTINCT)
        below = 0.0 if direct else _legend_height(curves)
        with _style():
            figure, ax = new_figure(WIDTH, 3 + below)
            for agent, one in curves.items():
                x = one.steps if over == "steps" else times * one.minutes
                shade, mean = colour(summary, agent), one.scores.mean(0)
                if len(one.scores) > 1:
                    error = one.scores.std(0, ddof=1) / np.sqrt(len(one.scores))
                    ax.fill_between(x, mean - error, mean + error, color=shade, alpha=0.18, linewidth=0)
                    if len(x) == 1:  # of one point a band is nothing
                        ax.errorbar(x, mean, error, color=shade, alpha=0.5)
                again = _round(summary, agent)
                ax.plot(
                    x,
                    mean,
                    _line(summary, agent),
                    color=shade,
                    linewidth=1.8,
                    marker=_MARKERS[again],
                    markersize=(2.5 if len(x) > 1 else 5) + 1.5 * (again > 0),  # corners are told from a point
                    clip_on=False,  # the last point lies on the frame
                    label=agent,
                )
            ax.set_title(_short(task, 44), loc="left", fontweight="bold")
            ax.set(xlabel=along, ylabel=unit)
            ax.set_xlim(left=0)
            if over == "steps":
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if unit != "return":
                ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
            ax.margins(x=0.02)
            finish(ax, None)
            if direct:
                ends = [(agent, float(one.scores.mean(0)[-1]), colour(summary, agent)) for agent, one in curves.items()]
                _label_ends(ax, ends)
            else:
                _legend(ax)
        return figure

    return draw


def named_by_us(name: str) -> bool:
    """Whether a figure of some report is called so, without suffix: see `Drawn.name`."""
    others = ("profiles", "improvement", *map(_aggregate, AGGREGATES))
    return name in others or re.fullmatch(r"curve-(steps|minutes)-[0-9]+", name) is not None


def _aggregate(name: str) -> str:
    return f"aggregate-{name.lower().replace(' ', '-')}"


def aggregates(summary: Summary) -> list[Drawn]:
    """A figure an aggregate: agents as rows, the best first, each with its interval."""

    def figure_of(name: str) -> Callable[[], "Figure"]:
        def draw() -> "Figure":
            with _style():
                labels = [_folded(agent, 24) for agent in summary.ranked]
                figure, ax = new_figure(WIDTH, 0.85 + _height(labels))
                for i, agent in enumerate(summary.ranked):
                    _point(ax, i, summary.aggregates[agent][name], colour(summary, agent))
                _rows(ax, labels)
                less = " (less is better)" if name == "optimality gap" else ""
                ax.set_title(f"{name}{less}", loc="left", fontweight="bold")
            return figure

        return draw

    return [
        Drawn(_aggregate(name), f"{name} of each agent, with intervals", figure_of(name))
        for name in AGGREGATES
        if summary.ranked
    ]


def _point(ax: "Axes", row: float, found: Interval, shade: str) -> None:
    value, low, high = map(float, found)
    if not np.isnan(low):
        ax.plot([low, high], [row, row], color=shade, linewidth=7, alpha=0.35, solid_capstyle="butt")
    ax.plot(value, row, "o", color=shade, markersize=6)


def _rows(ax: "Axes", labels: Sequence[str]) -> None:
    ax.set_yticks(range(len(labels)), labels, fontsize=_size(labels))
    ax.set_ylim(len(labels) - 0.5, -0.5)
    finish(ax, None)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def profiles(summary: Summary) -> list[Drawn]:
    """The performance profile; [] where agents share no task."""

    def draw() -> "Figure":
        taus, found = summary.profiles
        with _style():
            figure, ax = new_figure(WIDTH, 3.0 + _legend_height(found))
            for agent, (value, low, high) in found.items():
                shade = colour(summary, agent)
                if not np.isnan(low).any():
                    ax.fill_between(taus, low, high, color=shade, alpha=0.15, linewidth=0, step="post")
                style = _line(summary, agent)
                ax.plot(taus, value, style, color=shade, linewidth=1.8, label=agent, drawstyle="steps-post")
            ax.set(xlabel=f"{_score(summary)}, τ", ylabel="share of runs with score > τ", ylim=(0, 1.02))
            ax.margins(x=0)
            finish(ax, None)
            _legend(ax)
        return figure

    return [Drawn("profiles", "The share of runs above each score, a line an agent", draw)] if summary.ranked else []


def improvements(summary: Summary) -> list[Drawn]:
    """The probability that an agent beats another, a row a pair; of many agents, the first against the others."""
    pairs = summary.improvements
    if len(pairs) > _MOST_PAIRS:
        pairs = [pair for pair in pairs if pair[0] == summary.ranked[0]]
    if not pairs:
        return []

    def draw() -> "Figure":
        with _style():
            left, right = [_folded(x, 20) for x, _, _ in pairs], [_folded(y, 20) for _, y, _ in pairs]
            figure, ax = new_figure(WIDTH, 0.95 + _height([*left, *right]) / 2)
            for i, (x, _, found) in enumerate(pairs):
                _point(ax, i, found, colour(summary, x))
            ax.axvline(0.5, color=QUIET, linewidth=1, linestyle="--")
            _rows(ax, left)
            others = ax.twinx()
            others.set_ylim(ax.get_ylim())
            others.set_yticks(range(len(pairs)), right, fontsize=_size(right))
            others.tick_params(axis="y", length=0)
            others.spines[["top", "left", "right"]].set_visible(False)
            ax.set(xlim=(-0.02, 1.02), xlabel="P(a run of X scores more than one of Y)")
            ax.set_title("X", loc="left")
            ax.set_title("Y", loc="right")
        return figure

    return [Drawn("improvement", "The probability that each agent X beats another, Y", draw)]


def inline(drawn: Drawn) -> str:
    """A figure as SVG within a page: in the page's colours, light or dark, and as wide as there is room."""
    text = drawn.svg
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    # Other figures of the page have the same names for their parts.
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{drawn.name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{drawn.name}-", text)
    text = text.replace(INK, "currentColor").replace(QUIET, "var(--quiet)")
    for i, shade in enumerate(DISTINCT):
        text = text.replace(shade, f"var(--c{i})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    size = re.search(r'viewBox="0 0 ([\d.]+)', text)
    # A little more than its own size, where there is room.
    wide = round(1.2 * float(size[1]) * 4 / 3) if size else 600
    label = drawn.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{label}" style="max-width: {wide}px"'
    return _sized(text, head)


def _sized(text: str, head: str) -> str:
    """An <svg> element without a size of its own, which begins with `head`."""
    begin, rest = text.split(">", 1)
    begin = re.sub(r' (?:width|height)="[^"]*"', "", begin)
    return f"{head}{begin.removeprefix('<svg')}>{rest}"
