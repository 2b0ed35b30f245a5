"""What a person sees while something runs: a live bar on a terminal, plain lines of text elsewhere."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.errors import MarkupError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typing_extensions import override

from diffrl.support.errors import counted, printable

STYLES = ("yellow", "green", "red", "bold", "bold red", "bold yellow", "dim", "cyan")
"""The styles that our texts name in brackets."""
_OURS = {*STYLES, "/"}


class Terminal(Console):
    """A console that shows texts and cells of tables as they are, whoever chose the names in them.

    Only `STYLES` are tags: other brackets stay brackets, and `:x:` is no picture. Control characters are not printed
    (`printable`).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        text = text if text.isprintable() else printable(text)
        if options.get("markup") is not False:
            marked = _BRACKETS.sub(_as_text, text)
            for tried in (marked, marked.replace("[/]", r"\[/]", max(0, marked.count("[/]") - 1))):
                with suppress(MarkupError):  # a name with [/] in it: only the last one is ours
                    return super().render_str(tried, **options)
            options["markup"] = False
        return super().render_str(text, **options)


_BRACKETS = re.compile(r"(\\*)\[([a-z#/@][^[]*?)]")
"""What rich takes for a tag, with the backslashes before it."""


def _as_text(tag: re.Match[str]) -> str:
    """A tag, if it is ours or is escaped; else one that rich shows as it stands."""
    return tag[0] if tag[2] in _OURS or len(tag[1]) % 2 else f"{tag[1]}\\{tag[0][len(tag[1]) :]}"


console = Terminal(stderr=True, highlight=False, soft_wrap=True)

LINE_EVERY = 20.0
"""Seconds between lines, where there is no terminal to draw a bar on."""
FIRST_LINE = 5.0
"""Seconds before the first line of a long loop's steps, which tells how long it takes."""


def _rate(speed: float) -> str:
    """Digits that tell something of slow work too: `0.21`, `3.4`, `1,234`."""
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


class _Speed(ProgressColumn):
    """A column of the bar that says how fast it goes, as `123 steps/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate of the last minute; once all is done, that of the whole."""
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", self.unit)
        return Text("" if speed is None else f"{_rate(speed)} {unit}/s", style="cyan")


def _bar(unit: str, quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Speed(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        speed_estimate_period=60,
    )


@contextmanager
def work(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[float, int], None]]:
    """Show how far some work is, as a bar or as lines; yields the function that is told (done, total), in `unit`s."""
    with _bar(unit, quiet) as bar:
        task = bar.add_task(title, total=None, note="")
        began = written = time.monotonic()
        first: float | None = None

        def update(done: float, total: int) -> None:
            nonlocal began, written, first
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if first is None:  # the rate is of the work, not of what was made ready before the first piece
                first, began = done, now
            if not quiet and not console.is_terminal and now - written > LINE_EVERY and done > first:
                rate = (done - first) / (now - began)
                left = (total - done) / rate / 60
                console.print(f"{title} {math.floor(done):,}/{total:,}  {_rate(rate)} {unit}/s  {left:.1f} min left")
                written = now

        yield update


class StepsBar:
    """What is shown of a long loop of steps: a bar with numbers beside it on a terminal; elsewhere lines of text.

    bar: in which to show it. total, start: the steps in all, and those made before. shown: the names of the numbers
    beside the bar. quiet: show nothing.
    """

    def __init__(self, bar: Progress, total: int, start: int, shown: Sequence[str], quiet: bool) -> None:
        self._bar, self._total, self._start, self._shown, self._quiet = bar, total, start, shown, quiet
        self._steps = bar.add_task("Training", total=total, completed=start, note="")
        self._asides: dict[str, _Aside] = {}
        self._began = self._drawn = self._written = time.monotonic()
        self._underway = self._said = False
        self._stepped = self._began

    def progress(self, step: int) -> None:
        """So many steps have been made; drawn ten times a second at most, as a step is much shorter."""
        self._stepped = now = time.monotonic()
        if not self._underway:  # the rate is of steps, not of what was made ready before the first
            self._start, self._began, self._underway = step, now, True
        if now - self._drawn > 0.1 or step == self._total:
            self._bar.update(self._steps, completed=step)
            self._drawn = now
        if not self._said and step < self._total and now - self._began > FIRST_LINE:
            self._line(step, now, "")

    def metrics(self, step: int, means: dict[str, list[float]]) -> None:
        """Numbers by name, each a list of values to be averaged: shown beside the bar, or as a line."""
        note = self._short(means)
        self._bar.update(self._steps, note=note)
        now = time.monotonic()
        if now - self._written > LINE_EVERY:
            self._line(step, now, note)

    def _line(self, step: int, now: float, note: str) -> None:
        """The steps made, their rate, and the time left, as a line, where there is no terminal to draw a bar on."""
        self._said = True
        if self._quiet or console.is_terminal:
            return
        rate = max(step - self._start, 1) / (now - self._began)
        left = (self._total - step) / rate / 60
        console.print(f"step {step:,}/{self._total:,}  {_rate(rate)} steps/s  {left:.1f} min left  {note}".rstrip())
        self._written = now

    def _short(self, means: dict[str, list[float]]) -> str:
        """The means of the finite values, of what is shown."""
        finite = {name: [x for x in means[name] if math.isfinite(x)] for name in self._shown if name in means}
        return "  ".join(f"{name} {sum(values) / len(values):.3g}" for name, values in finite.items() if values)

    def message(self, text: str) -> None:
        """A sentence, above the bar."""
        if not self._quiet:
            self._bar.console.print(text)

    def episodes(self, finished: float, total: int) -> None:
        """So many episodes of `total` are finished, parts of one counted: see `aside`."""
        self.aside("evaluating", finished, total, "episodes")

    def aside(self, what: str, done: float, total: int, unit: str) -> None:
        """So much is done, in `unit`s, of work of `total` beside the steps: a bar of its own, while there is any left.

        what: the work, such as "evaluating". As lines where no steps are made in the meantime: else those say that
        something goes on.
        """
        now = time.monotonic()
        if (aside := self._asides.get(what)) is None:
            bar = self._bar.add_task(f"{what[0].upper()}{what[1:]}", total=None, note="", visible=False, unit=unit)
            aside = self._asides[what] = _Aside(bar)
        if aside.since is None:
            aside.since = now, done
            self._bar.reset(aside.bar, total=total)
        if done >= total or now - aside.drawn > 0.1:
            self._bar.update(aside.bar, completed=done, total=total, visible=done < total)
            aside.drawn = now
        since, first = aside.since
        if done >= total:
            aside.since = None
        elif not self._quiet and not console.is_terminal and now - max(self._written, self._stepped) > LINE_EVERY:
            said = f"{what}: {math.floor(done):,}/{total:,} {unit}, {done / total:.0%} in all"
            if done > first:
                said += f"  {(total - done) * (now - since) / (done - first) / 60:.1f} min left"
            console.print(said)
            self._written = now


@dataclass
class _Aside:
    """Work beside the steps of a `StepsBar`: its bar, when that was last drawn, and when it began with how much done.

    since: None while none is under way.
    """

    bar: TaskID
    drawn: float = -math.inf
    since: tuple[float, float] | None = None


@contextmanager
def steps_bar(steps: int, start: int, title: str, shown: Sequence[str], quiet: bool) -> Iterator[StepsBar]:
    """Show a `StepsBar` while the block runs; print `title` first, and how many steps were made before."""
    if not quiet:
        console.print(title)
        if start:
            console.print(f"Resuming after {counted(start, 'steps')}.")
    with _bar("steps", quiet) as bar:
        yield StepsBar(bar, steps, start, shown, quiet)
