"""Evaluations of a run's checkpoints by worker processes, while training goes on."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.support.errors import UserError
from diffrl.training.loop import Evaluations, Record, WorkerDied
from diffrl.training.messages import ScoreSeed, StartScoring
from diffrl.training.workers import Crew

MOST_AT_ONCE = 2
"""Evaluations begun and not finished: with so many, training waits."""
_PATIENCE = 0.2
"""Seconds of waiting for a process before looking whether to stop."""


class EvaluationPool(Evaluations):
    """A queue of evaluations for worker processes, a task a seed; recorded in the order in which they came.

    What is evaluated is the checkpoint of a step, which is on disk: the processes read it there, and an evaluation that
    was cut is made again from it.

    crew: the processes. start: what each of them is told first. seeds, episodes: of every evaluation. record: where the
    returns are written down. on_progress: hears how many episodes of all begun evaluations are finished, of how many.
    say: hears sentences for the user. go_on: what to do where an evaluation fails.
    """

    def __init__(
        self,
        crew: Crew,
        start: StartScoring,
        seeds: Sequence[int],
        episodes: int,
        record: Record,
        on_progress: Callable[[float, int], None] = lambda done, total: None,
        say: Callable[[str], None] = lambda text: None,
        go_on: str = "",
    ) -> None:
        self._crew = crew
        self._seeds, self._episodes = tuple(seeds), episodes
        self._record, self._on_progress, self._say, self._go_on = record, on_progress, say, go_on
        self._open: dict[int, dict[int, NDArray[np.float64]]] = {}  # by step, in order: returns (E,) by seed
        self._finished: dict[tuple[int, int], float] = {}  # by step and seed: episodes
        self._queue: deque[tuple[int, int]] = deque()
        # What each process owes: the returns of a step and a seed, or at first that it is there. None: nothing.
        self._tasks: list[tuple[int, int] | None] = [None] * len(crew.names)
        self._owing = set(range(len(crew.names)))
        self._declined: list[int] = []
        self._told_to_wait = False
        for i in self._owing:
            crew.post(i, start)

    @property
    @override
    def pending(self) -> tuple[int, ...]:
        return (*self._open, *self._declined)

    @override
    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        # Waits where `MOST_AT_ONCE` are begun.
        self.poll()
        if len(self._open) >= MOST_AT_ONCE and not self._told_to_wait:
            self._told_to_wait = True
            self._say(
                "Training waits for evaluations, which take longer than the steps between them: a larger --eval-every, "
                "fewer --eval-episodes or more --eval-workers would help."
            )
        while len(self._open) >= MOST_AT_ONCE:
            if stop():
                self._declined.append(step)
                return
            self._collect(_PATIENCE)
        self._open[step] = {}
        self._queue.extend((step, seed) for seed in self._seeds)
        self._hand_out()

    @override
    def poll(self) -> None:
        if self._owing:
            self._collect(0.0)

    @override
    def finish(self, stop: Callable[[], bool]) -> bool:
        while self._open:
            if stop():
                return False
            self._collect(_PATIENCE)
        return not self._declined

    @override
    def close(self) -> None:
        if self._owing:  # what is under way ends at once: it would have to be made again anyway
            self._crew.kill()
        self._crew.close()

    def _hand_out(self) -> None:
        for i in range(len(self._tasks)):
            if self._queue and i not in self._owing:
                self._tasks[i] = step, seed = self._queue.popleft()
                self._crew.names[i] = f"the evaluation of seed {seed} at step {step}"
                self._crew.post(i, ScoreSeed(step, seed))
                self._owing.add(i)

    def _collect(self, timeout: float) -> None:
        """Take what has come, hand out what is next, record what is whole."""
        try:
            replies = self._crew.collect(self._owing, timeout, self._note)
        except WorkerDied:
            raise
        except UserError as error:
            failure = UserError(f"{error} {self._go_on}")
            failure.exit_code = error.exit_code
            raise failure from error
        for i, tensors in replies.items():
            self._owing.discard(i)
            if (task := self._tasks[i]) is not None:
                self._open[task[0]][task[1]] = tensors["returns"].numpy()
                self._finished[task] = self._episodes
        if replies:
            self._hand_out()
            self._tell()
        while self._open and len(first := next(iter(self._open.values()))) == len(self._seeds):
            step = next(iter(self._open))
            self._record.add(step, np.stack([first[seed] for seed in self._seeds]))
            del self._open[step]
            for seed in self._seeds:
                del self._finished[step, seed]

    def _note(self, i: int, done: float, total: int) -> None:
        if (task := self._tasks[i]) is not None:
            self._finished[task] = done
            self._tell()

    def _tell(self) -> None:
        total = len(self._open) * len(self._seeds) * self._episodes
        self._on_progress(sum(self._finished.values()), total)
