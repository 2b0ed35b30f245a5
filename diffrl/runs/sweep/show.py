"""What a person sees of a sweep: on a terminal a live table of what runs, is done, is best; elsewhere plain lines."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from diffrl.runs.sweep.plan import SweepRun
from diffrl.runs.sweep.state import (
    Result,
    State,
    by_setting,
    incomparable,
    progress,
    rated,
    result_of,
    setting_of,
    task_of,
)
from diffrl.support.console import LINE_EVERY, console
from diffrl.support.errors import joined


class Board:
    """Hears of the runs of a sweep, and shows them.

    folder: the sweep's. runs: all of them, to which a search adds. states: how far each is; kept up to date here.
    total: how many there will be in all.
    """

    def __init__(self, folder: Path, runs: Sequence[SweepRun], states: dict[str, State], total: int) -> None:
        self._folder, self._total, self.states = folder, max(total, len(runs)), states
        self._began = self._written = time.monotonic()
        self._active: dict[str, tuple[SweepRun, int, float]] = {}
        self._steps = {run.name: run.config.steps for run in runs}
        self._made = 0
        self._best = ("", -float("inf"))
        self._groups = by_setting(runs)
        self._results: dict[str, Result] = {}
        self._incomparable: dict[str, str] = {}
        self.told: dict[str, str] = {}
        """By run, what it was said here to have failed by."""
        self._comparing = len({task_of(run.config) for run in runs}) < 2
        """Whether all runs are of one task: the best of several says nothing."""
        self._live: Live | None = None
        for run in runs:
            self._look(run)

    @contextlib.contextmanager
    def shown(self) -> Iterator["Board"]:
        """In the block, the table is on the screen."""
        if not console.is_terminal:
            yield self
            return
        with Live(self.table(), console=console, transient=True, auto_refresh=False) as live:
            self._live = live
            yield self
        self._live = None

    def started(self, run: SweepRun, state: State) -> None:
        """A run's process has been started, at the step where the run was."""
        self._steps[run.name] = run.config.steps
        self._active[run.name] = (run, state.step, time.monotonic())
        self.states[run.name] = state
        if state.step:
            self._say(f"goes on  {run.name}  from step {state.step:,}")
        else:
            self._say(f"started  {run.name}")

    def ended(self, run: SweepRun, state: State) -> None:
        """A run's process has ended."""
        _, before, _ = self._active.pop(run.name)
        self._made += max(state.step - before, 0)
        self.states[run.name] = state
        self._look(run)
        words = {"done": "done    ", "failed": "[red]FAILED  [/]"}.get(state.kind, f"cut at {state.step:,}")
        tail = f"  {escape(self._failure(run, state))}" if state.kind == "failed" else self._scores(run)
        self._say(f"{words} {run.name}{tail}  ({self._so_far()})")

    def tick(self) -> None:
        """Draw the table anew; or print a line, three times a minute."""
        now = time.monotonic()
        if self._live is not None:
            if now - self._written > 0.5:
                self._live.update(self.table(), refresh=True)
                self._written = now
        elif now - self._written > LINE_EVERY and self._active:
            console.print(f"running  {self._so_far()}")
            self._written = now

    def table(self) -> Table:
        """What runs now, a row each, and below it how far the sweep is."""
        table = Table(box=None, padding=(0, 2, 0, 0), caption=self._so_far(), caption_justify="left")
        for heading in ("running", "step", "of", "steps/s", "min left", "last"):
            table.add_column(heading, justify="left" if heading == "running" else "right", overflow="fold")
        now = time.monotonic()
        for run, before, began in self._active.values():
            step, total = progress(self._folder / run.name), run.config.steps
            rate = max(step - before, 0) / max(now - began, 1e-9)
            left = f"{(total - step) / rate / 60:.1f}" if rate else ""
            result = result_of(self._folder, run)
            last = "" if result is None else f"{result.last:z.1f}"
            table.add_row(run.name, f"{step:,}", f"{total:,}", f"{rate:,.0f}" if rate else "", left, last)
        return table

    def _say(self, text: str) -> None:
        """A line, above the table."""
        console.print(text)
        self._written = time.monotonic()

    def _look(self, run: SweepRun) -> None:
        """Remember the setting of a run that is the best so far: see `rated`."""
        if not self._comparing or self.states.get(run.name, State("waiting")).kind != "done":
            return
        group = self._groups.setdefault(setting_of(run), [run])  # a search adds its own
        result = result_of(self._folder, run)
        if result is None:
            return
        self._results[run.name] = result
        if why := incomparable(self._folder, run, result):
            self._incomparable[run.name] = why
        last = rated(group, self.states, self._results, self._incomparable)
        if last is None or last < self._best[1]:
            return
        name = run.name if len(group) == 1 else run.unseeded
        tie = last == self._best[1] and self._best[0] not in ("", name)
        self._best = ("several" if tie else name, last)

    def _failure(self, run: SweepRun, state: State) -> str:
        """What a run failed by; of an error that was said of another run before, which run."""
        others = (name for name, error in self.told.items() if error == state.error and name != run.name)
        first = next(others, None)
        self.told[run.name] = state.error
        return state.error if first is None else f"as {first}"

    def _scores(self, run: SweepRun) -> str:
        result = result_of(self._folder, run)
        return "" if result is None else f"  last {result.last:z.1f}, best {result.best:z.1f}"

    def _so_far(self) -> str:
        """How many runs are done, failed and left, the time left at the rate so far, and the best."""
        counts = Counter(state.kind for state in self.states.values())
        words = [f"{counts['done']}/{self._total} done"]
        if self._active:
            words.append(f"{len(self._active)} running")
        if counts["failed"]:
            words.append(f"{counts['failed']} failed")
        if minutes := self._minutes_left():
            words.append(f"{minutes:.1f} min left")
        if self._best[0]:
            words.append(f"best {self._best[1]:z.1f} by {self._best[0]}")
        return ", ".join(words)

    def _minutes_left(self) -> float:
        """Minutes until all runs are done, at the rate of steps since this began; 0 where it is not known yet."""
        under_way = sum(max(progress(self._folder / name) - before, 0) for name, (_, before, _) in self._active.items())
        rate = (self._made + under_way) / max(time.monotonic() - self._began, 1e-9)
        there = {name: state.step for name, state in self.states.items()}
        left = sum(
            total - there.get(name, 0)
            for name, total in self._steps.items()
            if self.states.get(name, State("waiting")).kind in ("waiting", "cut") or name in self._active
        )
        unborn = (self._total - len(self._steps)) * (sum(self._steps.values()) / max(len(self._steps), 1))
        return max(left + unborn - under_way, 0) / rate / 60 if rate else 0.0


def tell(states: Mapping[str, State], told: Mapping[str, str]) -> list[str]:
    """A line for each error that runs have failed by, with their names, but for what has been `told` by run."""
    runs: dict[str, list[str]] = {}
    for name, state in states.items():
        if state.kind == "failed" and told.get(name) != state.error:
            runs.setdefault(state.error, []).append(name)
    return [f"failed: {joined(names)}: {error}" for error, names in runs.items()]
