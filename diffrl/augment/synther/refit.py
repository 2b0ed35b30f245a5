"""SynthER online: synthetic experience from a model that is fitted anew as the real experience grows."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from diffrl.augment import streams
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import RefitConfig
from diffrl.augment.synther.generate import chunk_size, sample_rows
from diffrl.augment.synther.model import ModelRows, TransitionDiffusion, fit
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Batch, RowSource, Source, Transitions
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import Stopped, at_once


class RefittingBuffer(RowSource):
    """A source of `config.samples` synthetic rows for each of S seeds, all from the newest model.

    rows: a function that gives the real rows of all seeds as they are now. It is called at every fit, and they set the
    scale of the model's rows. real: what the models train on, each seed on its own; by default the same rows. seeds:
    (S,) of the models' initial weights. seed: of their training and of what they generate; no other random numbers
    have a part in it. The n-th fit depends on these seeds, on n and on the real rows alone, so that it can be made
    again. observation_bounds, action_bounds: (low, high) of generated rows. say: is told of each fit in a sentence.
    on_progress: is told on the way of the work, how much of it is done, of how much, and in what, such as "rows".

    Nothing can be drawn before the first fit. Synthetic rows belong to no episode: number -1, time 0.

    Raises UserError for a model with a condition and a `real` of its own.
    """

    def __init__(
        self,
        config: RefitConfig,
        seeds: Sequence[int],
        seed: int,
        rows: Callable[[], Transitions],
        real: RowSource | None = None,
        *,
        observation_size: int,
        action_size: int,
        action_bounds: tuple[ArrayLike, ArrayLike] = (-1.0, 1.0),
        observation_bounds: tuple[ArrayLike, ArrayLike] = (-np.inf, np.inf),
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = lambda text: None,
        on_progress: Callable[[str, float, int, str], None] | None = None,
    ) -> None:
        if real is not None and config.model.condition != "none":
            raise UserError("A model with a condition learns from the real rows as they are, not from a mixture.")
        self.config = config
        self.device = torch.device(device)
        self.number = 0
        """Which fit the rows are from; 0 before the first one."""
        self._seeds, self._seed = tuple(seeds), seed
        self._real_rows, self._real = rows, real
        self._bounds = action_bounds, observation_bounds
        self._rows = ReplayBuffer(len(self._seeds), config.samples, observation_size, action_size, self.device)
        self._say, self._on_progress = say, on_progress

    def due(self, step: int) -> bool:
        """Whether a fit is due after `step` environment steps."""
        return self.config.fits(step) > self.number

    def refit(self, step: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Fit a new model to the real rows, and replace the synthetic rows by what it generates.

        Gives False where `stop` ended it on the way: the fit is still due. Raises UserError where the model has
        diverged.
        """
        number = self.config.fits(step)
        began = time.monotonic()
        rows = ModelRows.of(self._real_rows(), self.config.model)
        self._say(f"SynthER after {step:,} steps: fitting to {len(rows):,} rows ...")
        try:
            model = self._fit(rows, number, stop)
            fitted = time.monotonic()
            self._generate(model, number, stop)
        except Stopped:
            return False
        self.number = number
        loss = ", ".join(f"{value:.3g}" for value in model.held_out_loss(rows))
        seconds = fitted - began, time.monotonic() - fitted
        self._say(
            f"SynthER after {step:,} steps: fitted to {len(rows):,} rows in {seconds[0]:.0f} s (loss {loss}), "
            f"{self.config.samples:,} rows generated in {seconds[1]:.0f} s."
        )
        return True

    def _fit(self, rows: ModelRows, number: int, stop: Callable[[], bool]) -> TransitionDiffusion:
        def heed(done: int, total: int) -> None:
            if stop():
                raise Stopped
            self._tell("fitting SynthER", done, total, "steps")

        model = self.config.model
        return fit(
            model,
            rows if self._real is None else self._real,
            RowCodec.fit(rows.transitions, *self._bounds),
            batch_size=model.batch(len(rows)),
            seeds=self._seeds,
            device=str(self.device),
            generator=generator_at(self._seed, number, streams.REFIT_TRAINING, device=self.device),
            on_progress=heed,
        )

    def _generate(self, model: TransitionDiffusion, number: int, stop: Callable[[], bool]) -> None:
        chunk = chunk_size(self.device)
        self._rows.clear()
        for i, start in enumerate(range(0, self.config.samples, chunk)):
            if stop():
                raise Stopped
            generator = generator_at(self._seed, number, i, streams.REFIT_CHUNK, device=self.device)
            with at_once():
                rows = sample_rows(model, min(chunk, self.config.samples - start), generator, self.config.sampling)
            episode = torch.tensor([-1.0, 0.0], device=self.device).expand(*rows.shape[:2], 2)
            self._rows.add(torch.cat([rows, episode], dim=-1))
            self._tell("generating", min(start + chunk, self.config.samples), self.config.samples, "rows")

    def _tell(self, what: str, done: int, total: int, unit: str) -> None:
        if self._on_progress is not None:
            self._on_progress(what, done, total, unit)

    def clear(self) -> None:
        """Forget the synthetic rows, and how often a model has been fitted."""
        self._rows.clear()
        self.number = 0

    @property
    def rows(self) -> Tensor:
        """The synthetic rows there are (S, len, W)."""
        return self._rows.rows

    @override
    def draw_rows(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self._rows.draw_rows(batch_size, n_seeds, generator)

    @override
    def view(self, rows: Tensor) -> Batch:
        return self._rows.view(rows)

    @override
    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        return self.view(self.draw_rows(batch_size, n_seeds, generator))

    def state_dict(self) -> dict[str, Tensor]:
        """The synthetic rows and the number of the fit that they are from."""
        return {**self._rows.state_dict(), "number": torch.tensor(self.number)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back. Raises ValueError where its shapes are not this buffer's."""
        self._rows.load_state_dict(state)
        self.number = int(state["number"])


class Augmented(Source):
    """A source of real rows alone until the first fit, then of real and synthetic rows, the real ones first.

    The share of synthetic rows in a batch is that of the buffer's configuration.
    """

    def __init__(self, real: RowSource, synthetic: RefittingBuffer) -> None:
        self._real, self._synthetic = real, synthetic
        share = synthetic.config.share
        self._mixture = MixedSource([real, synthetic], [1 - share, share])

    @override
    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        source = self._mixture if self._synthetic.number else self._real
        return source.draw(batch_size, n_seeds, generator)
