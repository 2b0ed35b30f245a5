"""The training loop: update, log, evaluate, checkpoint; resumes bit for bit; leaves cleanly when told to stop."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffrl.data.transitions import Batch, Transitions
from diffrl.errors import UserError
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog


class Learner(Protocol):
    """What the loop asks of an agent; `agents.base.Agent` has it."""

    n_seeds: int
    seeds: tuple[int, ...]
    value_metrics: ClassVar[tuple[str, ...]]

    def update(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One step; metrics (S,) on the device."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that training changes; counters () or the seeds axis first."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back."""


class DivergedError(UserError):
    """Training that left the numbers' range. Its text names the step, the quantity and the last good checkpoint."""

    exit_code = 1


class Interrupted(UserError):
    """A run that was told to stop and has been saved."""

    exit_code = 130


class Observer(Protocol):
    """Who watches a run: a progress bar, or lines of text."""

    def progress(self, step: int) -> None:
        """A step has been made."""

    def metrics(self, step: int, means: dict[str, list[float]]) -> None:
        """Means (S,) since the last logging point."""

    def message(self, text: str) -> None:
        """Something worth saying."""


@dataclass
class Loop:
    """A run in progress. `generator`, on the learner's device, gives all of training's randomness."""

    run: Path
    learner: Learner
    transitions: Transitions
    batch_size: int
    generator: torch.Generator
    log: MetricsLog
    observer: Observer
    evaluate: Callable[[int], None]
    """Called with the step at each evaluation; records scores itself, and uses generators of its own."""
    best_steps: Callable[[], set[int]]
    """Steps whose checkpoints are to be kept besides the newest."""
    log_every: int = 500
    eval_every: int = 50_000
    value_limit: float = math.inf
    """A larger |mean| of one of the learner's `value_metrics` counts as exploded."""
    step: int = 0
    frozen: list[int] = field(default_factory=list)
    """Positions of seeds that have diverged: they keep the state of their last good checkpoint."""
    _frozen_state: dict[str, Tensor] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0

    def fit(self, steps: int) -> None:
        """Train until `steps` steps have been made in all; a checkpoint is always written at the end.

        Raises Interrupted after a SIGINT or SIGTERM (saved first), DivergedError where no seed is left.
        """
        if self.step == 0 and not checkpoint.steps(self.run):
            self.save()
        with _stop_signals() as stopped:
            while self.step < steps:
                self._update()
                if self.step % self.log_every == 0:
                    self._log()
                last = self.step == steps
                if self.step % self.eval_every == 0 or last:
                    if self._count:
                        # Only on the evaluations' own grid do the sums start anew: where a run is cut changes no mean.
                        self._log(reset=self.step % self.eval_every == 0)
                    self.evaluate(self.step)
                    self.save()
                elif stopped:
                    self._check()
                    self.save()
                self.observer.progress(self.step)
                if stopped and not last:
                    raise Interrupted(
                        f"Stopped after {self.step} steps; saved. Go on with `diffrl train --resume {self.run}`."
                    )

    def _update(self) -> None:
        batch = self.transitions.sample(self.batch_size, self.learner.n_seeds, self.generator)
        metrics = self.learner.update(batch, self.generator)
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1
        self.step += 1
        if self.frozen:
            self._hold()

    def _check(self) -> dict[str, list[float]]:
        """The means since the last logging point, fetched in one synchronisation; freezes seeds that have diverged.

        Called before every checkpoint, so that each one that is written is good.
        """
        table = (torch.stack(list(self._sums.values())) / max(self._count, 1)).tolist() if self._sums else []
        means = dict(zip(self._sums, table, strict=True))
        for position, seed in enumerate(self.learner.seeds):
            if position not in self.frozen:
                complaint = self._complaint({name: values[position] for name, values in means.items()})
                if complaint:
                    self._freeze(position, f"Step {self.step}: {complaint} (seed {seed}).")
        return means

    def _log(self, reset: bool = True) -> None:
        """Check and write the means since the last logging point."""
        means = self._check()
        if reset:
            self._sums, self._count = {}, 0
        self.log.write(self.step, means)
        self.observer.metrics(self.step, means)

    def _complaint(self, metrics: dict[str, float]) -> str | None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            if name in self.learner.value_metrics and abs(value) > self.value_limit:
                return f"{name} is {value:.4g}, beyond any possible return (limit {self.value_limit:.4g})"
        return None

    def _freeze(self, position: int, complaint: str) -> None:
        """Put a diverged seed back to the last good checkpoint and hold it there; stop the run if it was the last."""
        last, _ = checkpoint.load_latest(self.run)
        where = checkpoint.folder(self.run, last.step)
        if len(self.frozen) + 1 == self.learner.n_seeds:
            raise DivergedError(
                f"{complaint} Training has diverged and stops. The last good checkpoint is {where}. "
                "A lower learning rate, a lower target rate or a smaller q-weight usually helps."
            )
        self.observer.message(f"{complaint} This seed is frozen at {where}; the others go on.")
        self.frozen.append(position)
        self._remember(last.learner)
        self._hold()

    def _remember(self, good: dict[str, Tensor]) -> None:
        """Keep what the frozen seeds are held at: their part of a learner's `state_dict`."""
        device = self.transitions.device
        self._frozen_state = {name: tensor[self.frozen].to(device) for name, tensor in good.items() if tensor.ndim}

    @torch.no_grad()
    def _hold(self) -> None:
        """Put the frozen seeds back to what they are held at."""
        state = self.learner.state_dict()
        for name, kept in self._frozen_state.items():
            state[name][self.frozen] = kept

    def save(self) -> None:
        """Write a checkpoint: learner, generator, unlogged means, frozen seeds. Then drop those no longer needed."""
        tensors = {f"{checkpoint.LEARNER}{name}": tensor for name, tensor in self.learner.state_dict().items()}
        tensors |= {f"sum.{name}": tensor for name, tensor in self._sums.items()}
        tensors["generator"] = self.generator.get_state()
        info = {"count": self._count, "frozen": self.frozen, "device": self.generator.device.type}
        checkpoint.save(self.run, self.step, tensors, info)
        checkpoint.prune(self.run, self.best_steps())

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to a checkpoint. Raises CheckpointError where it belongs to another configuration."""
        device = self.transitions.device
        try:
            self.learner.load_state_dict(saved.learner)
        except ValueError as error:
            raise checkpoint.CheckpointError(
                f"The checkpoint of step {saved.step} in {self.run} does not fit its config.yaml: {error}."
            ) from error
        self._sums = {n.removeprefix("sum."): t.to(device) for n, t in saved.tensors.items() if n.startswith("sum.")}
        self._count = int(saved.info["count"])
        if saved.info["device"] == self.generator.device.type:
            self.generator.set_state(saved.tensors["generator"])
        else:
            self.generator.manual_seed(self.generator.initial_seed() + saved.step)
            self.observer.message(
                f"The run was on {saved.info['device']} and goes on on {self.generator.device.type}: "
                "with other random numbers, so not bit for bit."
            )
        self.step = saved.step
        self.frozen = list(saved.info["frozen"])
        if self.frozen:
            self._remember(saved.learner)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM append to; a second signal has its usual effect."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
