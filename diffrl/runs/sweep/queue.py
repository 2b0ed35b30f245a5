"""The queue of a sweep on this machine: so many runs at a time, each a process of its own, the next when one has ended.

A run's process is `diffrl sweep --task`, which trains the run or goes on with it. It ends with the queue, saved: see
`task.watched`. So whatever is killed, and when, the same command goes on from what stands in the runs' folders.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffrl.runs.sweep.plan import SweepRun
from diffrl.runs.sweep.state import LOG, State, state_of
from diffrl.runs.sweep.task import Full
from diffrl.support import failure
from diffrl.support.stopping import Interrupted, stop_signals

COMMAND = (sys.executable, "-m", "diffrl", "sweep")
"""What a run's process is started by, before its own words."""
_FULL = 2**20
"""Bytes: with less space than that, a run that ended without a word of why was ended by the full disk."""


class Source(Protocol):
    """Where the queue's runs come from."""

    def next(self) -> tuple[int, SweepRun] | None:
        """The next run to start and its place in the sweep; None where none is left, or all that is left waits."""

    def ended(self, run: SweepRun, state: State) -> None:
        """Hears how a run has ended."""


class Watcher(Protocol):
    """Who is told of what happens, for a person to see."""

    def started(self, run: SweepRun, state: State) -> None:
        """A run's process has been started; how far the run was before."""

    def ended(self, run: SweepRun, state: State) -> None:
        """A run's process has ended; how far the run is."""

    def tick(self) -> None:
        """Some time has passed."""


class InOrder:
    """The runs of a grid, one after the other."""

    def __init__(self, runs: Iterable[tuple[int, SweepRun]]) -> None:
        self._left = deque(runs)

    def next(self) -> tuple[int, SweepRun] | None:
        """The next run and its place; None after the last."""
        return self._left.popleft() if self._left else None

    def ended(self, run: SweepRun, state: State) -> None:
        """Nothing follows from how a run has ended: the others go on."""


def to_run(runs: Sequence[SweepRun], states: Mapping[str, State], retry: bool) -> list[tuple[int, SweepRun]]:
    """The runs that are not done, with their places; those that failed are among them where `retry` asks for it."""
    wanted = ("waiting", "cut", "failed") if retry else ("waiting", "cut")
    return [(i, run) for i, run in enumerate(runs) if states[run.name].kind in wanted]


def environment() -> dict[str, str]:
    """The environment of a run's process: this one's, with one thread unless it says otherwise."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}


def words(folder: Path, place: int) -> list[str]:
    """The command of a run's process."""
    return [*COMMAND, "--task", str(place), "--out", str(folder)]


@dataclass(frozen=True)
class _Child:
    run: SweepRun
    process: "subprocess.Popen[bytes]"


def start(folder: Path, place: int, run: SweepRun) -> "subprocess.Popen[bytes]":
    """Start the process of a run, which hears no signal of the terminal's and ends, saved, when this one does."""
    path = folder / run.name
    path.mkdir(exist_ok=True)
    with (path / LOG).open("ab") as log:
        return subprocess.Popen(
            [*words(folder, place), "--watched"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(),
        )


def judged(folder: Path, run: SweepRun, code: int) -> State:
    """How far a run is whose process has ended by this code; one that was killed (SIGKILL) has failed.

    Raises Full where the disk ended it.
    """
    state, path = state_of(folder, run), folder / run.name
    stopped = (0, Interrupted.exit_code, -signal.SIGTERM, -signal.SIGINT)  # the last two: before it could hear them
    if state.kind in ("done", "failed") or code in stopped:
        return state
    if code == Full.exit_code or _space(folder) < _FULL:
        raise Full("No space left on device.")
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            failure.keep(path, f"Its process was killed by {name}{', as for want of memory' * (name == 'SIGKILL')}.")
    else:
        failure.keep(path, f"Its process ended by exit code {code}: {path / LOG} has what it said.")
    return state_of(folder, run)


def _space(folder: Path) -> int:
    """The bytes that may still be written to the file system of a folder."""
    if not hasattr(os, "statvfs"):
        return _FULL
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def work_through(folder: Path, source: Source, jobs: int, watcher: Watcher, every: float = 0.1) -> str:
    """Run what `source` gives, `jobs` at a time, until nothing is left; "" then, else a sentence on what ended it.

    every: seconds between two looks. SIGINT and SIGTERM end it as soon as the runs have saved. A full disk ends it when
    the runs under way have ended. Raises whatever `source` raises, when the runs under way have been stopped.
    """
    active: list[_Child] = []
    ending = ""
    with stop_signals() as stopped, _stopping(active):
        while True:
            while not ending and not stopped() and len(active) < jobs and (following := source.next()) is not None:
                place, run = following
                before = state_of(folder, run)
                active.append(_Child(run, start(folder, place, run)))
                watcher.started(run, before)
            if stopped() and not ending:
                ending = "Stopped."
                stop(active)
            if not active:
                return ending
            for child in [one for one in active if one.process.poll() is not None]:
                active.remove(child)
                try:
                    state = judged(folder, child.run, child.process.returncode)
                except Full as full:
                    ending = ending or f"The disk of {folder} is full: {full}"
                    state = state_of(folder, child.run)
                watcher.ended(child.run, state)
                source.ended(child.run, state)
            watcher.tick()
            time.sleep(every)


def stop(active: Iterable[_Child]) -> None:
    """Have the runs' processes save and end."""
    for child in active:
        with contextlib.suppress(OSError):
            child.process.terminate()


@contextlib.contextmanager
def _stopping(active: list[_Child]) -> Iterator[None]:
    """However the block ends, no process outlives it: what is under way is saved and waited for."""
    try:
        yield
    finally:
        stop(active)
        for child in active:
            child.process.wait()
