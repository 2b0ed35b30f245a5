"""One stack of seeds, trained in this process; on a GPU its step is captured once as a CUDA graph and replayed."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypeVar, override

from diffrl.data.transitions import Batch, Source
from diffrl.support.errors import UserError, first_line, out_of_memory
from diffrl.training.checkpoint import LEARNER, SUM, part
from diffrl.training.loop import Trainer

PULSE = 0.25
"""Seconds after which `advance` comes back, so that progress is shown and signals are served."""

Progress = Callable[[float, int], None]
"""Hears how many episodes of an evaluation are finished, of how many."""
Evaluate = Callable[[int, Progress], NDArray[np.float64]]
"""Evaluates the learner as it stands after so many steps: returns (S, E)."""

BatchT = TypeVar("BatchT", default=Batch)
BatchT_contra = TypeVar("BatchT_contra", contravariant=True, default=Batch)


class Learner(Protocol[BatchT_contra]):
    """What training asks of whatever learns; `agents.base.Agent`, which learns from transitions, has it.

    `BatchT_contra` is the type of the batches it learns from, any tuple of tensors, by default `Batch`.
    """

    n_seeds: int
    seeds: tuple[int, ...]
    period: int

    def update(self, batch: BatchT_contra, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """Make one step; give its metrics (S,), on the device.

        A step waits for no device, branches on no tensor and rebinds no state. phase: the number of steps before it
        modulo `period`, the one thing that a step may branch on.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that training changes, themselves and not copies; counters () or the seeds axis first."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back into the learner's own tensors."""


class TrainingStep(Protocol):
    """Something that makes a training step when called."""

    def __call__(self, phase: int) -> None:
        """Make one training step of this phase."""

    def forget(self) -> None:
        """Drop what was kept of earlier steps: the next ones will do other work."""


class Eager(TrainingStep):
    """Runs the step as it is written, and remembers nothing."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step = step

    @override
    def __call__(self, phase: int) -> None:
        self._step(phase)

    @override
    def forget(self) -> None:
        pass


class Captured(TrainingStep):
    """Runs the step on a GPU as one CUDA graph (one for each phase): hundreds of small kernels started by one call.

    The first steps are made eagerly, on a side stream: memory is taken, libraries are initialised and compiled
    functions compiled, none of which can happen in a capture. They are steps of the training like any other, and a
    capture executes nothing: the sequence of steps is the one that eager steps make.

    The graphs of all phases work in one pool of memory, so that 20 phases take what one takes: no two run at once, and
    what a step leaves for the next lies outside, in the learner's state and the trainer's sums.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[[int], None], generator: torch.Generator, period: int = 1) -> None:
        self._step = step
        self._generator = generator
        self._warm_up = max(self.WARM_UP, period)
        self._stream = torch.cuda.Stream(generator.device)  # type: ignore[no-untyped-call]
        self._eager_steps = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @override
    def __call__(self, phase: int) -> None:
        with torch.cuda.device(self._generator.device):
            if self._eager_steps < self._warm_up:
                self._eager_steps += 1
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    self._step(phase)
                torch.cuda.current_stream().wait_stream(self._stream)
                return
            if phase not in self._graphs:
                self._graphs[phase] = self._capture(phase)
            self._graphs[phase].replay()

    def _capture(self, phase: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The graph advances this generator at every replay, so that its state can be saved and restored between them.
        graph.register_generator_state(self._generator)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._step(phase)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"A training step could not be captured as a CUDA graph: {first_line(error)}. "
                "Train without: --no-capture (for a run already begun, `capture: false` in its config.yaml, then "
                "`diffrl resume RUN --accept-changes`)."
            ) from error
        return graph

    @override
    def forget(self) -> None:
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # that of graphs which are gone takes no more


class StackTrainer(Trainer, Generic[BatchT]):
    """A stack of S seeds in training: learner, data, randomness, sums of metrics, frozen seeds.

    learner, source: what learns, and what its batches of `batch_size` are drawn from. The type of a batch, `BatchT`, is
    theirs to agree on: the trainer only hands it on. generator: all of training's randomness, on the learner's device,
    where the data are too. evaluate: what scores the learner. capture: whether a GPU records the step and repeats it.
    value_limit: a larger |mean| of a metric that estimates returns counts as exploded. on_close: lets go of what the
    caller holds for this trainer.

    A step is static: it performs the same operations on the same memory every time, reads no tensor's value and waits
    for nothing, which is what lets a GPU repeat it from a recording.
    """

    new_episodes = False

    def __init__(
        self,
        learner: Learner[BatchT],
        source: Source[BatchT],
        batch_size: int,
        generator: torch.Generator,
        evaluate: Evaluate | None = None,
        *,
        capture: bool = True,
        value_limit: float = math.inf,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.learner = learner
        self.seeds = learner.seeds
        self.groups: tuple[int, ...] = (learner.n_seeds,)
        self.device = generator.device.type
        self._source = source
        self._batch_size = batch_size
        self._generator = generator
        self._evaluate = evaluate
        self._value_limit = value_limit
        self._on_close = on_close
        self._sums: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        on_gpu = generator.device.type == "cuda"
        self._make_step: TrainingStep = Eager(self.step)
        if capture and on_gpu:
            self._make_step = Captured(self.step, generator, learner.period)
        self._made = 0

    @property
    @override
    def value_limit(self) -> float:
        return self._value_limit

    def step(self, phase: int = 0) -> None:
        """One step as it is written: draw a batch, update, add to the sums, put frozen seeds back."""
        batch = self._source.draw(self._batch_size, self.learner.n_seeds, self._generator)
        metrics = self.learner.update(batch, self._generator, phase)
        if not self._names:
            self._refuse(metrics)
        if self._names != list(metrics):  # the first step, or the first after a checkpoint
            self._names = list(metrics)
            self._sums = {name: self._sums.get(name, torch.zeros_like(value)) for name, value in metrics.items()}
        with torch.no_grad():
            torch._foreach_add_(list(self._sums.values()), list(metrics.values()))
            self._put_back()

    def _refuse(self, metrics: object) -> None:
        """Raise UserError, naming the learner's class, where what `update` gave are no metrics (S,) by name, or where
        it has a number of steps and left that at 0."""
        what, S = f"{type(self.learner).__name__}.update gave", self.learner.n_seeds
        if not isinstance(metrics, Mapping):
            raise UserError(f"{what} {type(metrics).__name__}; expected metrics by name, each a tensor ({S},).")
        for name, value in metrics.items():
            if not isinstance(value, Tensor) or value.shape != (S,):
                found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"as {type(value).__name__}"
                raise UserError(f"{what} the metric {name!r} {found}; expected a tensor ({S},), a number a seed.")
        steps = getattr(self.learner, "step", None)
        if isinstance(steps, Tensor) and not steps.any():
            raise UserError(
                f"{type(self.learner).__name__}.update left its `step` at 0: it counts the steps made, which schedules "
                "and checkpoints go by (self.step += 1)."
            )

    def _put_back(self) -> None:
        for tensor, good, frozen in self._held:
            tensor.copy_(torch.where(frozen, good, tensor))

    @override
    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        end = time.monotonic() + PULSE
        for made in range(1, steps + 1):
            self._make_step(self._made % self.learner.period)
            self._made += 1
            if stop() or time.monotonic() > end:
                return made
        return steps

    def forget(self) -> None:
        """Capture the step anew: it will draw its batches otherwise than before."""
        self._make_step.forget()

    @override
    def sums(self) -> dict[str, Tensor]:
        return self._sums

    @override
    def reset(self) -> None:
        for total in self._sums.values():
            total.zero_()

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            **{f"{LEARNER}{name}": tensor for name, tensor in self.learner.state_dict().items()},
            **{f"{SUM}{name}": total for name, total in self._sums.items()},
            "generator": self._generator.get_state(),
        }

    @override
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        # Every tensor keeps its place in memory, so that a captured step stays valid.
        try:
            self.learner.load_state_dict(part(state, LEARNER))
        except ValueError as error:
            raise UserError(str(error)) from error
        self._made = step
        self.reset()
        for name, total in part(state, SUM).items():
            new = torch.zeros_like(total, device=self._generator.device)
            self._sums.setdefault(name, new).copy_(total)
        restore_generator(self._generator, state, step)

    @override
    @torch.no_grad()
    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        frozen = torch.zeros(self.learner.n_seeds, dtype=torch.bool)
        frozen[list(positions)] = True
        frozen = frozen.to(self._generator.device)
        self._held = [
            (tensor, good[name].to(tensor.device), frozen.view(-1, *[1] * (tensor.ndim - 1)))
            for name, tensor in self.learner.state_dict().items()
            if tensor.ndim
        ]
        self._put_back()
        self._make_step.forget()

    @override
    def evaluate(self, step: int, on_progress: Progress) -> NDArray[np.float64]:
        assert self._evaluate is not None
        return self._evaluate(step, on_progress)

    @override
    def close(self) -> None:
        self._on_close()


def restore_generator(generator: torch.Generator, state: Mapping[str, Tensor], step: int) -> None:
    """Put a checkpoint's generator back, or, where it has none that fits this device, seed it afresh."""
    if "generator" in state:
        generator.set_state(state["generator"])
    else:
        generator.manual_seed(generator.initial_seed() + step)
