"""What a person sees while something runs: a live bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=True)

SHOWN = ("loss", "bc_loss", "critic_loss", "q", "episode_return", "kl", "accuracy")
"""Metrics shown beside the bar."""
LINE_EVERY = 20.0
"""Seconds between lines, where there is no terminal to draw a bar on."""


class _Speed(ProgressColumn):
    """Rate, as `123 steps/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate of the last while, or of the whole."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self.unit}/s", style="cyan")


def _bar(unit: str, quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Speed(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        speed_estimate_period=60,
    )


@contextmanager
def work(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar for a loop, or lines where there is no terminal; yields a function to call with (done, total)."""
    with _bar(unit, quiet) as bar:
        task = bar.add_task(title, total=None, note="")
        began = written = time.monotonic()
        first: int | None = None

        def update(done: int, total: int) -> None:
            nonlocal written, first
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            first = done if first is None else first
            if not quiet and not console.is_terminal and now - written > LINE_EVERY and done > first:
                rate = (done - first) / (now - began)
                left = (total - done) / rate / 60
                console.print(f"{title} {done:,}/{total:,}  {rate:,.0f} {unit}/s  {left:.1f} min left")
                written = now

        yield update


def _short(means: dict[str, list[float]]) -> str:
    """The means over the seeds that are still trained: a frozen one's are nan."""
    finite = {name: [value for value in means[name] if math.isfinite(value)] for name in SHOWN if name in means}
    shown = {name: sum(values) / len(values) for name, values in finite.items() if values}
    return "  ".join(f"{name} {value:.3g}" for name, value in shown.items())


class TrainingObserver:
    """Who watches a training run (`training.loop.Observer`): a bar on a terminal; elsewhere lines."""

    def __init__(self, bar: Progress, total: int, start: int, quiet: bool) -> None:
        self.bar, self.total, self.start, self.quiet = bar, total, start, quiet
        self.task = bar.add_task("Training", total=total, completed=start, note="")
        self.episodes = bar.add_task("Evaluating", total=None, note="", visible=False)
        self.began = self.drawn = self.written = time.monotonic()
        self.underway = False

    def progress(self, step: int) -> None:
        """Drawn ten times a second at most: a step is much shorter."""
        now = time.monotonic()
        if not self.underway:  # rates are of steps, not of workers starting and losses compiling
            self.start, self.began, self.underway = step, now, True
        if now - self.drawn > 0.1 or step == self.total:
            self.bar.update(self.task, completed=step)
            self.drawn = now

    def metrics(self, step: int, means: dict[str, list[float]]) -> None:
        """Beside the bar, or as a line."""
        self.bar.update(self.task, note=_short(means))
        now = time.monotonic()
        if not self.quiet and not console.is_terminal and now - self.written > LINE_EVERY:
            rate = max(step - self.start, 1) / (now - self.began)
            left = (self.total - step) / rate / 60
            console.print(f"step {step:,}/{self.total:,}  {rate:.0f} steps/s  {left:.1f} min left  {_short(means)}")
            self.written = now

    def message(self, text: str) -> None:
        """Above the bar."""
        if not self.quiet:
            self.bar.console.print(text)

    def rollout(self, finished: int, total: int) -> None:
        """Episodes of an evaluation under way."""
        self.bar.update(self.episodes, completed=finished, total=total, visible=finished < total)


@contextmanager
def training_observer(steps: int, start: int, title: str, quiet: bool) -> Iterator[TrainingObserver]:
    """The observer of a training run, its bar shown while the block runs."""
    if not quiet:
        console.print(title)
        if start:
            console.print(f"Resuming after {start:,} steps.")
    with _bar("steps", quiet) as bar:
        yield TrainingObserver(bar, steps, start, quiet)
