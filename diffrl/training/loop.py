"""The training loop: log, evaluate, checkpoint between steps; resumes bit for bit; leaves cleanly when told to stop.

The steps themselves are a `Trainer`'s: one stack of seeds in this process, or groups of seeds in worker processes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.support.errors import UserError
from diffrl.support.files import typed
from diffrl.support.stopping import Interrupted, Stopped, at_once, stop_signals
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog


class Trainer(Protocol):
    """S seeds in training, wherever they are: a stack in this process (`StackTrainer`), or groups in workers.

    Counters aside, all its tensors have the seeds axis first, in the order of `seeds`, whatever trains them.
    """

    seeds: tuple[int, ...]
    groups: tuple[int, ...]
    """How many seeds in turn share a generator: (S,) for one stack."""
    device: str
    """The kind of device, cpu or cuda, that random numbers are drawn on."""
    new_episodes: bool
    """Whether it acts in environments, which begin new episodes when a run goes on: their state cannot be saved."""

    @property
    def value_limit(self) -> float:
        """A larger |mean| of a metric that estimates returns counts as exploded."""

    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        """Make up to `steps` steps, at least one; after a fraction of a second, or when told to `stop`, come back.

        Gives the number of steps made, the same for all seeds: 0 where told to stop within a step that takes long,
        of which nothing is kept.
        """

    def sums(self) -> dict[str, Tensor]:
        """The metrics (S,), summed over the steps since `reset`."""

    def reset(self) -> None:
        """Start the sums anew."""

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, named as there: the learner's tensors, the sums, `generator` (G, n) or (n,).

        The tensors may be the trainer's own: read them before the next step.
        """

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Copy a `state` back; sums it lacks start anew, and without a generator that is seeded afresh, by `step`.

        Raises UserError where the tensors do not fit.
        """

    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        """Put the seeds at `positions` to their part of `good`, a learner's `state_dict`, and keep them there."""

    def evaluate(self, step: int, on_progress: Callable[[float, int], None]) -> NDArray[np.float64]:
        """Outcomes of episodes after `step` steps; `on_progress` hears how many are finished, of how many.

        Of an episode that goes on its part of the time limit is counted.

        Returns (S, E); where the environment tells of success, returns and successes (S, E, 2).
        """

    def close(self) -> None:
        """Let go of everything held."""


class Evaluations(Protocol):
    """Evaluations of the checkpoints of steps, made at once or beside the training, recorded in the order of steps."""

    @property
    def pending(self) -> Collection[int]:
        """The steps submitted and not yet recorded: their checkpoints are needed."""

    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        """Evaluate the checkpoint of `step`, which is on disk, or begin to.

        May wait for earlier evaluations, and come back without having begun when told to `stop` in the meantime.
        """

    def poll(self) -> None:
        """Record what has been finished. Raises UserError where an evaluation failed."""

    def finish(self, stop: Callable[[], bool]) -> bool:
        """Wait until all are recorded; False where told to `stop` before."""

    def close(self) -> None:
        """Let go of everything held."""


class Record(Protocol):
    """Where evaluations are written down."""

    def add(self, step: int, outcomes: NDArray[np.float64]) -> None:
        """Write down the evaluation of a step: what `Trainer.evaluate` gives."""

    def kept_steps(self) -> set[int]:
        """The steps whose checkpoints are kept, such as that of each seed's best evaluation."""


class NoRecord(Record):
    """Where no evaluation is written down, and none is best."""

    @override
    def add(self, step: int, outcomes: NDArray[np.float64]) -> None:
        pass

    @override
    def kept_steps(self) -> set[int]:
        return set()


class NoEvaluations(Evaluations):
    """Where there is nothing to evaluate in."""

    pending: tuple[int, ...] = ()

    @override
    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        pass

    @override
    def poll(self) -> None:
        pass

    @override
    def finish(self, stop: Callable[[], bool]) -> bool:
        return True

    @override
    def close(self) -> None:
        pass


class InLine(NoEvaluations):
    """Evaluations for which training waits: the trainer makes that of a step, and it is written down.

    A stop ends one at once: it is made again from its checkpoint.
    """

    def __init__(
        self, trainer: Trainer, record: Record, on_progress: Callable[[float, int], None], go_on: str = ""
    ) -> None:
        """Make none yet. go_on: what to do where one fails."""
        self._trainer, self._record, self._on_progress = trainer, record, on_progress
        self._go_on = go_on

    @override
    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        try:
            with at_once():
                returns = self._trainer.evaluate(step, self._on_progress)
        except Stopped:
            self.pending = (*self.pending, step)
        except WorkerDied:
            raise
        except UserError as error:
            what = f"The evaluation at step {step}, which is saved, failed: {error}"
            failure = UserError(f"{what} {self._go_on}".rstrip())
            failure.exit_code = error.exit_code
            raise failure from error
        else:
            self._record.add(step, returns)

    @override
    def finish(self, stop: Callable[[], bool]) -> bool:
        return not self.pending


class DivergedError(UserError):
    """Training that left the numbers' range. Its text names the step, the quantity and the last good checkpoint."""

    exit_code = 1


class WorkerDied(UserError):
    """A worker process that crashed or was killed."""

    exit_code = 1


class Observer(Protocol):
    """Who watches a run: a progress bar, or lines of text."""

    def progress(self, step: int) -> None:
        """Hear that `step` steps have been made."""

    def metrics(self, step: int, means: dict[str, list[float]]) -> None:
        """Hear the means (S,) of all metrics since the last logging point, by name."""

    def message(self, text: str) -> None:
        """Hear a sentence that the user should read."""


@dataclass
class Loop:
    """A run in progress: what happens between the steps of its trainer."""

    run: Path
    trainer: Trainer
    log: MetricsLog
    observer: Observer
    evaluations: Evaluations
    """Told of the step of each evaluation once its checkpoint is written; changes nothing here."""
    record: Record
    """Where evaluations are written down: the best ones' checkpoints are kept besides the newest."""
    log_every: int = 500
    eval_every: int = 50_000
    value_metrics: tuple[str, ...] = ()
    """Metrics that estimate returns."""
    evaluate_first: bool = False
    """Evaluate before the first step too, as is worth it for a learner that has been trained before."""
    unscored: Sequence[int] = ()
    """Steps of checkpoints whose evaluations a cut has left undone: they are made first."""
    go_on: str = ""
    """What to do to go on after a stop; by default `diffrl resume`."""
    advice: str = "A lower learning rate usually helps."
    """What to change where training has diverged."""
    step: int = 0
    frozen: list[int] = field(default_factory=list)
    """Positions of seeds that have diverged: they keep the state of their last good checkpoint."""
    _count: int = 0
    """Steps since the sums of metrics began."""

    def fit(self, steps: int) -> None:
        """Train until `steps` steps have been made in all; a checkpoint is always written at the end.

        Comes back when all evaluations are recorded. Raises Interrupted after a SIGINT or SIGTERM (saved first),
        DivergedError where no seed is left.
        """
        with stop_signals() as stop:
            if self.step == 0 and not checkpoint.steps(self.run):
                self.save(evaluate=self.evaluate_first)
                self.unscored = [0] if self.evaluate_first else []
            for step in self.unscored:
                self.evaluations.submit(step, stop)
            while self.step < steps and not stop():
                made = self.trainer.advance(self._until_boundary(steps), stop)
                self.step += made
                self._count += made
                if made and self.step % self.log_every == 0:
                    self._log()
                last = self.step == steps
                if made and (self.step % self.eval_every == 0 or last):
                    if self._count:
                        # Only on the evaluations' own grid do the sums start anew: where a run is cut changes no mean.
                        self._log(reset=self.step % self.eval_every == 0)
                    self.save(evaluate=True)
                    self.evaluations.submit(self.step, stop)
                elif stop() and self.step not in checkpoint.steps(self.run):
                    self._check()
                    self.save()
                self._poll()
                self.observer.progress(self.step)
            if self.step < steps:
                self._interrupt(f"Stopped after {self.step} steps; saved.")
            if not self.evaluations.finish(stop):
                self._interrupt(f"All {self.step} steps are made and saved.")
        self._prune()

    def _interrupt(self, what: str) -> NoReturn:
        go_on = self.go_on or f"Go on with `diffrl resume {typed(self.run)}`."
        begun = ", ".join(map(str, self.evaluations.pending))
        again = f" The evaluation of step {begun}, not finished, will be made again." if begun else ""
        raise Interrupted(f"{what}{again} {go_on}")

    def _poll(self) -> None:
        """Record what evaluations are finished; save before an error of one ends the run."""
        try:
            self.evaluations.poll()
        except UserError:
            if self.step not in checkpoint.steps(self.run):
                self._check()
                self.save()
            raise

    def _until_boundary(self, steps: int) -> int:
        """Steps from here to the next one at which something is logged, evaluated, or ends."""
        return min(steps - self.step, *(every - self.step % every for every in (self.log_every, self.eval_every)))

    def _check(self) -> dict[str, list[float]]:
        """The means since the last logging point, fetched in one synchronisation; freezes seeds that have diverged.

        Called before every checkpoint, so that each one that is written is good. A frozen seed's means are nan.
        """
        sums = self.trainer.sums() if self._count else {}
        limit = self.trainer.value_limit
        table = (torch.stack(list(sums.values())) / self._count).tolist() if sums else []
        means = dict(zip(sums, table, strict=True))
        for position, seed in enumerate(self.trainer.seeds):
            if position not in self.frozen:
                complaint = self._complaint({name: values[position] for name, values in means.items()}, limit)
                if complaint:
                    self._freeze(position, f"Step {self.step}: {complaint} (seed {seed}).")
        for values in means.values():
            for position in self.frozen:
                values[position] = math.nan
        return means

    def _log(self, reset: bool = True) -> None:
        """Check and write the means since the last logging point."""
        means = self._check()
        if reset:
            self.trainer.reset()
            self._count = 0
        self.log.write(self.step, means)
        self.observer.metrics(self.step, means)

    def _complaint(self, metrics: dict[str, float], limit: float) -> str | None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            if name in self.value_metrics and abs(value) > limit:
                return f"{name} is {value:.4g}, beyond any possible return (limit {limit:.4g})"
        return None

    def _freeze(self, position: int, complaint: str) -> None:
        """Put a diverged seed back to the last good checkpoint and hold it there; stop the run if it was the last."""
        last, _ = checkpoint.load_latest(self.run)
        where = checkpoint.folder(self.run, last.step)
        if len(self.frozen) + 1 == len(self.trainer.seeds):
            raise DivergedError(
                f"{complaint} Training has diverged and stops. The last good checkpoint is {where}. {self.advice}"
            )
        self.observer.message(f"{complaint} This seed is frozen at {where}; the others go on.")
        self.frozen.append(position)
        self.trainer.hold(self.frozen, last.learner)

    def save(self, evaluate: bool = False) -> None:
        """Write a checkpoint: learner, generators, unlogged means, frozen seeds. Then drop those no longer needed.

        evaluate: an evaluation of it is due.
        """
        tensors = {n: t for n, t in self.trainer.state().items() if self._count or not n.startswith(checkpoint.SUM)}
        info = {
            "count": self._count,
            "frozen": self.frozen,
            "device": self.trainer.device,
            "groups": list(self.trainer.groups),
            checkpoint.EVALUATE: evaluate,
        }
        checkpoint.save(self.run, self.step, tensors, info, self.go_on)
        self._prune()

    def _prune(self) -> None:
        checkpoint.prune(self.run, self.record.kept_steps() | set(self.evaluations.pending))

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to a checkpoint. Raises CheckpointError where it belongs to another configuration."""
        tensors = dict(saved.tensors)
        if saved.info["device"] != self.trainer.device:
            del tensors["generator"]
            self.observer.message(
                f"The run was on {saved.info['device']} and goes on on {self.trainer.device}: "
                "with other random numbers, so not bit for bit."
            )
        try:
            self.trainer.load(tensors, saved.step)
        except WorkerDied:
            raise
        except UserError as error:
            raise checkpoint.CheckpointError(
                f"The checkpoint of step {saved.step} in {self.run} does not fit its config.yaml: {error}."
            ) from error
        self._count = int(saved.info["count"])
        self.step = saved.step
        self.frozen = list(saved.info["frozen"])
        if self.frozen:
            self.trainer.hold(self.frozen, saved.learner)
