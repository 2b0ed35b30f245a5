"""The trajectory diffuser of Flow-to-Better: from a trajectory of one block, one of the next (Zhang et al. 2024).

A denoising diffusion model of whole trajectories x (H rows [s, a], standardised), on the cosine schedule, given a
trajectory y of the block below by cross-attention:

    loss = |m_theta(a x + s e, t, y) - m|^2,    (y, x) a pair of consecutive blocks,

with y dropped in a quarter of the pairs. One step of the flow samples x given y with classifier-free guidance, by the
averaged weights. With `same_start` the network is also given x's first state, in every row: x is drawn of
p(x | its first state, y), where in sampling that state is y's, which stays as it is (`diffusion.inpainting`).

The authors' code differs where it errs: it never updates its average. What is ours: windows of fixed length in place of
whole episodes, a small U-Net by default, DDIM in 20 steps in place of 1,000, D clamped to the data's range, and by
default m = v = a e - s x in place of m = e. An error of x_0 weighs (a/s)^2 in the loss of e, nothing where noise is
large; and there alone does the condition matter, where x_t itself does not tell the block. So by e it is hardly
learned (in the world of tests/augment/test_flow_to_better.py a step of the flow rises by one level after 160 training
steps by v, and goes anywhere after 600 by e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from diffrl.augment.flow_to_better.blocks import BlockPairs
from diffrl.augment.flow_to_better.config import DiffuserConfig, FlowConfig
from diffrl.data.preprocessing import Normaliser
from diffrl.data.segments import SegmentSource
from diffrl.data.transitions import Source
from diffrl.diffusion import (
    VP,
    Known,
    Prediction,
    Sampler,
    classifier_free,
    denoising_loss,
    discrete_grid,
    drop_condition,
    grid_times,
)
from diffrl.nets import Adam, average_, copy_state_, seed_generator, state_of
from diffrl.nets.temporal import TemporalUNet
from diffrl.support.errors import DataError


@dataclass(frozen=True, eq=False)
class TrajectoryCodec:
    """Rows [s, a] (..., D), D = O + A, in the environment's units and as the network sees them, standardised."""

    scale: Normaliser
    """The mean and the deviation of the D columns; of a constant one, 1."""
    low: Tensor
    """Lower bounds (D,) of decoded rows: of actions their own, of observations what the data hold and may."""
    high: Tensor
    """Upper bounds (D,)."""
    observation_size: int
    """O."""

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        observation_size: int,
        action_bounds: tuple[ArrayLike, ArrayLike] = (-1.0, 1.0),
        observation_bounds: tuple[ArrayLike, ArrayLike] = (-np.inf, np.inf),
    ) -> TrajectoryCodec:
        """Fit it to rows (N, D), on their device. Bounds: (low, high), numbers or one a column.

        Raises DataError for values that are not finite.
        """
        if not bool(torch.isfinite(rows).all()):
            raise DataError("The rows hold values that are not finite; a model cannot learn from these. Remove them.")
        o, exact = observation_size, rows.double()
        shift, scale = exact.mean(0), exact.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * shift.abs().clamp_min(1e-6), scale, 1.0)

        def bounds(i: int) -> Tensor:
            s, a = (
                torch.from_numpy(np.broadcast_to(np.asarray(pair[i], np.float32), (n,)).copy()).to(rows.device)
                for pair, n in ((observation_bounds, o), (action_bounds, rows.shape[1] - o))
            )
            found = rows[:, :o].amin(0) if i == 0 else rows[:, :o].amax(0)
            return torch.cat([torch.maximum(s, found) if i == 0 else torch.minimum(s, found), a])

        return cls(Normaliser(shift.float(), scale.float()), bounds(0), bounds(1), o)

    @property
    def size(self) -> int:
        """D, columns of a row."""
        return len(self.low)

    def encode(self, rows: Tensor) -> Tensor:
        """Standardised rows (..., D)."""
        return self.scale(rows)

    def decode(self, x: Tensor) -> Tensor:
        """Rows (..., D) in the environment's units, within their bounds."""
        return self.scale.inverse(x).clamp(self.low, self.high)

    def limits(self) -> tuple[Tensor, Tensor]:
        """The bounds, (D,) each, as the network sees them."""
        return self.encode(self.low), self.encode(self.high)

    def to(self, device: torch.device | str) -> TrajectoryCodec:
        """The same codec on another device."""
        return replace(self, scale=self.scale.to(device), low=self.low.to(device), high=self.high.to(device))


class TrajectoryPair(NamedTuple):
    """Pairs of trajectories drawn for S seeds, B each, standardised."""

    condition: Tensor
    """(S, B, H, D) of one block."""
    target: Tensor
    """(S, B, H, D) of the next."""


class PairSource(Source[TrajectoryPair]):
    """Pairs of a data set's windows, of one block and the next: what the diffuser is trained on."""

    def __init__(self, segments: SegmentSource, pairs: BlockPairs, codec: TrajectoryCodec) -> None:
        self._segments, self._pairs, self._codec = segments, pairs, codec

    @override
    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> TrajectoryPair:
        drawn = self._pairs.draw(batch_size, n_seeds, generator)
        return TrajectoryPair(*(trajectories(self._segments, n, self._codec) for n in (drawn.source, drawn.target)))


def trajectories(segments: SegmentSource, numbers: Tensor, codec: TrajectoryCodec) -> Tensor:
    """The windows with these numbers (...), standardised: (..., H, D)."""
    drawn = segments.gather(numbers)
    return codec.encode(torch.cat([drawn.observations, drawn.actions], -1))


class TrajectoryDiffuser:
    """S trajectory diffusers, one a seed, trained as one stack: a `training.stack.Learner` of `TrajectoryPair`s."""

    period = 10

    def __init__(
        self, config: DiffuserConfig, codec: TrajectoryCodec, seeds: Sequence[int] = (0,), device: str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.codec = codec.to(self.device)
        self.seeds = tuple(seeds)
        self.n_seeds = len(self.seeds)
        self.prediction = Prediction(config.prediction, VP())
        self.grid = discrete_grid("cosine", config.diffusion_steps, dtype=torch.float64)
        self._times = self.grid.float().to(self.device)

        def network() -> TemporalUNet:
            generators = [seed_generator(seed) for seed in self.seeds]
            return TemporalUNet(
                codec.size,
                generators,
                width=config.width,
                multipliers=config.multipliers,
                seen_features=codec.observation_size if config.same_start else 0,
                trajectory_features=codec.size,
            ).to(self.device)

        self.network, self.average = network(), network().requires_grad_(False)
        self.optimiser = Adam(self.network, config.learning_rate, 1.0)
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)

    def output(self, network: TemporalUNet, x: Tensor, t: Tensor, condition: Tensor, like: Tensor) -> Tensor:
        """The network's answer (S, n B, H, D) at x of that shape and t () or (S, n B).

        like: trajectories (S, B, H, D) whose first states x has too, in turn; n is 2 where guidance asks with and
        without the condition at once. Without `same_start` it is not looked at.
        """
        if self.config.same_start:
            first = like[..., :1, : self.codec.observation_size].repeat(1, x.shape[1] // like.shape[1], x.shape[2], 1)
            x = torch.cat([x, first], -1)
        out: Tensor = network(x, t, condition)
        return out

    def losses(self, network: TemporalUNet, batch: TrajectoryPair, t: Tensor, noise: Tensor, keep: Tensor) -> Tensor:
        """|m_theta - m|^2 (S,), the mean over pairs, rows and columns, at the times t (S, B).

        noise: standard normal, of the targets' shape. keep: uniform numbers (S, B), which conditions are dropped.
        """
        assert network.null_trajectory is not None
        condition = drop_condition(
            batch.condition, network.null_trajectory, self.config.condition_dropout, noise=keep, event_dims=2
        )
        output = partial(self.output, network, condition=condition, like=batch.target)
        loss = denoising_loss(self.prediction, output, batch.target, t, noise, event_dims=2)
        return loss.mean(-1)

    def draw(self, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What `losses` needs for targets (S, B, H, D): times (S, B), noise of their shape, uniform numbers (S, B)."""
        t = grid_times(self._times, target.shape[:2], generator)
        noise = torch.randn(target.shape, generator=generator, device=self.device)
        return t, noise, torch.rand(target.shape[:2], generator=generator, device=self.device)

    def update(self, batch: TrajectoryPair, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """One training step; every tenth moves the averaged weights."""
        loss = self.losses(self.network, batch, *self.draw(batch.target, generator))
        norm = self.optimiser.step(loss)
        self.step += 1
        if phase == self.period - 1:
            # The first averages forget the initial weights: a short training would keep much of them.
            n = self.step / self.period
            average_(self.average, self.network, torch.clamp(9 / (9 + n), min=self.config.ema_rate).float())
        return {"loss": loss.detach(), "grad_norm": norm}

    @torch.no_grad()
    def held_out_loss(self, batch: TrajectoryPair, seed: int = 0) -> list[float]:
        """The averaged network's loss on these pairs, one a seed; always with the same noise, so that it compares."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        loss: list[float] = self.losses(self.average, batch, *self.draw(batch.target, generator)).tolist()
        return loss

    # --- sampling --------------------------------------------------------------------------------------------------

    def sampler(self, flow: FlowConfig) -> Sampler:
        """The sampler of one step of the flow, on every n-th time of the schedule and then 0."""
        steps = min(flow.sampling_steps, self.config.diffusion_steps)
        places = torch.linspace(0, self.config.diffusion_steps, steps + 1, dtype=torch.float64).round().long()
        return Sampler(VP(), self.grid[places], flow.solver)

    @torch.no_grad()
    def sample(self, condition: Tensor, generator: torch.Generator, sampler: Sampler, guidance: float) -> Tensor:
        """A trajectory (S, B, H, D) for each condition (S, B, H, D), by the averaged networks, standardised.

        With `same_start` its first state is the condition's.
        """
        null = self.average.null_trajectory
        assert null is not None
        output = partial(self.output, self.average, like=condition)
        guided = classifier_free(output, condition, null, guidance, event_dims=2)
        denoise = self.prediction.denoiser(guided)
        low, high = self.codec.limits()
        noise = torch.randn(condition.shape, generator=generator, device=self.device)
        # Near pure noise an answer for e says nothing of x_0: unclamped, it would be thousands of deviations off.
        known = None
        if self.config.same_start:
            mask = torch.zeros(condition.shape[-2:], dtype=torch.bool, device=self.device)
            mask[0, : self.codec.observation_size] = True
            known = Known(mask, condition)  # noised as the rest, as in training: the network sees it clean elsewhere
        return sampler(lambda x, t: denoise(x, t).clamp(low, high), noise, inpaint=known)

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that training changes; counters () or the seeds axis first."""
        own = state_of({"network": self.network, "average": self.average, "optimiser": self.optimiser})
        return {"step": self.step, **own}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back. Raises ValueError where names or shapes differ."""
        copy_state_(self.state_dict(), state)
