"""SynthER online: synthetic experience from a model that is fitted anew as the real experience grows."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffrl.augment import streams
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import RefitConfig
from diffrl.augment.synther.generate import chunk_size, sample_rows
from diffrl.augment.synther.model import TransitionDiffusion, fit, with_bins
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Batch, RowSource, Transitions
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at


class RefittingBuffer:
    """`config.samples` synthetic rows for each of S seeds, all from the newest model. A `RowSource`.

    rows: gives the real rows of all seeds as they are now, which set the scale of the model's; it is asked at every
    fit. real: what the models train on, each seed on its own; by default those rows. seed: of the models' training and
    of what they generate, apart from every other generator. seeds: of their initial weights. The n-th fit depends on
    these, on n and on the real rows alone, so that it can be made again.

    Nothing is drawn from it before the first fit. Its rows belong to no episode: number -1, time 0.
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
    ) -> None:
        if real is not None and config.model.condition != "none":
            raise UserError("A model with a condition learns from the real rows as they are, not from a mixture.")
        self.config = config
        self.device = torch.device(device)
        self.number = 0
        """The fit that the rows are from; 0: there is none yet."""
        self._seeds, self._seed = tuple(seeds), seed
        self._real_rows, self._real = rows, real
        self._bounds = action_bounds, observation_bounds
        self._rows = ReplayBuffer(len(self._seeds), config.samples, observation_size, action_size, self.device)
        self._say = say

    def due(self, step: int) -> bool:
        """Whether a fit is, after so many environment steps."""
        return self.config.fits(step) > self.number

    def refit(self, step: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Fit a new model to the real rows and replace the synthetic ones by its own.

        False where `stop` said so on the way: the fit is still due. Raises UserError where the model has diverged.
        """
        number = self.config.fits(step)
        began = time.monotonic()
        rows, condition = self._real_rows(), self.config.model.condition
        if condition != "none":
            rows = with_bins(rows, condition, self.config.model.bins)
        self._say(f"SynthER after {step:,} steps: fitting to {len(rows):,} rows ...")
        try:
            model = self._fit(rows, number, stop)
            fitted = time.monotonic()
            self._generate(model, number, stop)
        except _Stopped:
            return False
        self.number = number
        loss = ", ".join(f"{value:.3g}" for value in model.held_out_loss(rows))
        seconds = fitted - began, time.monotonic() - fitted
        self._say(
            f"SynthER after {step:,} steps: fitted to {len(rows):,} rows in {seconds[0]:.0f} s (loss {loss}), "
            f"{self.config.samples:,} rows generated in {seconds[1]:.0f} s."
        )
        return True

    def _fit(self, rows: Transitions, number: int, stop: Callable[[], bool]) -> TransitionDiffusion:
        def heed(done: int, total: int) -> None:
            if stop():
                raise _Stopped

        model = self.config.model
        return fit(
            model,
            rows if self._real is None else self._real,
            RowCodec.fit(rows, *self._bounds),
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
                raise _Stopped
            generator = generator_at(self._seed, number, i, streams.REFIT_CHUNK, device=self.device)
            rows = sample_rows(model, min(chunk, self.config.samples - start), generator, self.config.sampling)
            episode = torch.tensor([-1.0, 0.0], device=self.device).expand(*rows.shape[:2], 2)
            self._rows.add(torch.cat([rows, episode], dim=-1))

    def clear(self) -> None:
        """Forget the synthetic rows and how often they have been made."""
        self._rows.clear()
        self.number = 0

    @property
    def rows(self) -> Tensor:
        """(S, len, W) what there is."""
        return self._rows.rows

    def draw_rows(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """See `RowSource`."""
        return self._rows.draw_rows(batch_size, n_seeds, generator)

    def view(self, rows: Tensor) -> Batch:
        """See `RowSource`."""
        return self._rows.view(rows)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        """See `Source`."""
        return self.view(self.draw_rows(batch_size, n_seeds, generator))

    def state_dict(self) -> dict[str, Tensor]:
        """The rows and the fit they are from."""
        return {**self._rows.state_dict(), "number": torch.tensor(self.number)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back. Raises ValueError where it does not fit."""
        self._rows.load_state_dict(state)
        self.number = int(state["number"])


class _Stopped(Exception):
    """Told to stop within a fit."""


class Augmented:
    """Batches of real rows alone until the first fit, then of real and synthetic ones at the share. A `Source`."""

    def __init__(self, real: RowSource, synthetic: RefittingBuffer) -> None:
        self._real, self._synthetic = real, synthetic
        share = synthetic.config.share
        self._mixture = MixedSource([real, synthetic], [1 - share, share])

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        """See `Source`. The real rows come first."""
        source = self._mixture if self._synthetic.number else self._real
        return source.draw(batch_size, n_seeds, generator)
