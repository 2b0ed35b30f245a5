"""SynthER: synthetic experience replay (Lu, Ball, Teh, Parker-Holder, NeurIPS 2023), arXiv 2303.06614.

An EDM diffusion model (Karras et al. 2022, arXiv 2206.00364) of transitions, one row each. What is published:
sigma 0.002 to 80, data standardised (sigma_data = 1), log sigma ~ N(-1.2, 1.2^2) in training, Adam with betas
(0.9, 0.99) and gradient norms clipped at 1, averaged weights; 128 Heun steps with churn to sample, on rho = 7.

What is not: rows are whitened (`RowCodec`), and whether a row is terminal is not one more column, 0 or 1 beside columns
of deviation 1, which a rare end hardly moves. A small network of the row's s, a and s' says it (of s and a, where the
data do not hold what followed a terminal row), trained on the real rows beside the model, and a row is terminal with
that probability: as often as it should be, if not always where. (benchmarks/results/synther.md has the figures.)
`terminals="modelled"` is the paper's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffrl.augment import streams
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.augment.synther.network import TransitionNetwork
from diffrl.data.transitions import Batch, Source, Transitions, episode_returns
from diffrl.diffusion import (
    VE,
    Churn,
    Denoise,
    Prediction,
    Sampler,
    classifier_free,
    denoising_loss,
    drop_condition,
    lognormal_times,
)
from diffrl.nets import Adam, average_, copy_state_, seed_generator, state_of
from diffrl.support.errors import DataError, UserError
from diffrl.support.seeds import generator_at
from diffrl.training.stack import StackTrainer

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


class BinnedBatch(NamedTuple):
    """Transitions drawn for S seeds, B each, and which bin of the condition each is in."""

    transitions: Batch
    bins: Tensor
    """(S, B) integers from 0 to C - 1"""


@dataclass(frozen=True, eq=False)
class ModelRows:
    """N transitions that a model learns from or is tested on, with their bins where it has a condition: a `Source`."""

    transitions: Transitions
    bins: Tensor | None = None
    """(N,) integers from 0 to C - 1; None: the model has no condition."""

    @classmethod
    def of(cls, transitions: Transitions, config: SynthERConfig) -> ModelRows:
        """The transitions with the bins that the configuration's condition asks for, if it asks for any.

        Raises DataError where all transitions are alike in it.
        """
        if config.condition == "none":
            return cls(transitions)
        return cls(transitions, bins_of(transitions, config.condition, config.bins))

    def __len__(self) -> int:
        return len(self.transitions)

    def take(self, index: Tensor) -> ModelRows:
        """The rows at `index` (n,)."""
        rows = replace(self.transitions, rows=self.transitions.rows[index])
        return ModelRows(rows, None if self.bins is None else self.bins[index])

    def to(self, device: torch.device | str) -> ModelRows:
        """The same rows on another device."""
        return ModelRows(self.transitions.to(device), None if self.bins is None else self.bins.to(device))

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch | BinnedBatch:
        """Draw B = `batch_size` rows for each of S = `n_seeds` seeds, uniformly and with replacement.

        A `BinnedBatch` where there are bins, else a `Batch`: the same transitions in either case.
        """
        if self.bins is None:
            return self.transitions.draw(batch_size, n_seeds, generator)
        shape, device = (n_seeds, batch_size), self.transitions.device
        index = torch.randint(len(self), shape, generator=generator, device=device)
        return BinnedBatch(self.transitions.gather(index), self.bins[index])


class TransitionDiffusion:
    """S diffusion models of transitions, one a seed, trained as one stack: a `diffrl.training.stack.Learner`.

    It learns from batches of transitions in whatever units, which `codec` standardises: a `Batch`, or with a condition
    a `BinnedBatch`.
    """

    period = 10

    def __init__(self, config: SynthERConfig, codec: RowCodec, seeds: Sequence[int] = (0,), device: str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.codec = codec.to(self.device)
        self.seeds = tuple(seeds)
        self.n_seeds = len(self.seeds)
        self.prediction = Prediction("edm", VE(), data_std=1.0)
        self._head = config.terminals == "head"
        self._conditions = 0 if config.condition == "none" else config.bins
        # Which bins there are, and how full: equal values share one, so that some may be empty.
        self._seen = torch.zeros(self.n_seeds, self._conditions, dtype=torch.float64, device=self.device)

        def network() -> TransitionNetwork:
            generators = [seed_generator(seed) for seed in self.seeds]
            sizes = {"width": config.width, "blocks": config.blocks, "condition_size": self._conditions}
            if self._head:
                sizes["causes"] = codec.causes
            return TransitionNetwork(codec.size, generators, **sizes).to(self.device)

        self.network, self.average = network(), network().requires_grad_(False)
        trained = nn.ParameterDict(
            {n.replace(".", "_"): p for n, p in self.network.named_parameters() if p.requires_grad}
        )
        self.optimiser = Adam(trained, config.learning_rate, 1.0, decay_steps=config.steps, betas=(0.9, 0.99))
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)

    def losses(
        self, network: TransitionNetwork, batch: Batch | BinnedBatch, t: Tensor, noise: Tensor, keep: Tensor | None
    ) -> dict[str, Tensor]:
        """By name, (S,) each, to be added: EDM's, |F - target|^2 at the times t (S, B), the mean over rows and columns;
        and the cross entropy of the terminals, where a head tells them.

        EDM's weight on |D - x_0|^2 is 1 on F. keep: uniform numbers (S, B), which conditions are dropped.
        """
        transitions, condition = self._parts(batch)
        if condition is not None:
            null = torch.zeros_like(condition)
            condition = drop_condition(condition, null, self.config.condition_dropout, noise=keep)
        z = self.codec.standardise(self.codec.columns(transitions))
        x0 = z @ self.codec.whitening
        loss = denoising_loss(self.prediction, lambda x, t: network(x, t, condition), x0, t, noise).mean(-1)
        if not self._head:
            return {"loss": loss}
        logits = network.terminal(z[..., : self.codec.causes])
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, transitions.terminals, reduction="none")
        return {"loss": loss, "terminal_loss": entropy.mean(-1)}

    def _parts(self, batch: Batch | BinnedBatch) -> tuple[Batch, Tensor | None]:
        """The transitions of a batch, and for a conditional model their condition (S, B, C)."""
        kind = BinnedBatch if self._conditions else Batch
        if not isinstance(batch, kind):
            raise ValueError(f"a model with the condition {self.config.condition} learns from a {kind.__name__}")
        return (batch.transitions, self.one_hot(batch.bins)) if isinstance(batch, BinnedBatch) else (batch, None)

    def one_hot(self, bins: Tensor) -> Tensor:
        """The condition (..., C) of bins (...)."""
        # Not torch's one_hot, which looks at the values: a captured step may not.
        classes = torch.arange(self._conditions, device=bins.device)
        return (bins.unsqueeze(-1) == classes).to(torch.get_default_dtype())

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `losses` needs: times (S, B), noise (S, B, D), and where there is a condition uniform numbers (S, B)."""
        shape = (self.n_seeds, batch_size)
        t = lognormal_times(self.prediction.process, shape, generator)
        noise = torch.randn((*shape, self.codec.size), generator=generator, device=self.device)
        keep = torch.rand(shape, generator=generator, device=self.device) if self._conditions else None
        return t, noise, keep

    def update(self, batch: Batch | BinnedBatch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """One training step; every tenth moves the averaged weights."""
        transitions, condition = self._parts(batch)
        losses = self.losses(self.network, batch, *self.draw(transitions.rewards.shape[1], generator))
        norm = self.optimiser.step(torch.stack(list(losses.values())).sum(0))
        self.step += 1
        if condition is not None:
            self._seen += condition.sum(-2)
        if phase == self.period - 1:
            # The first averages forget the initial weights: a short training would keep much of them.
            n = self.step / self.period
            average_(self.average, self.network, torch.clamp(9 / (9 + n), min=self.config.ema_rate).float())
        return {name: loss.detach() for name, loss in losses.items()} | {"grad_norm": norm}

    @torch.no_grad()
    def held_out_loss(self, rows: Transitions | ModelRows, seed: int = 0) -> list[float]:
        """The averaged network's loss on these rows, one a seed; always with the same noise, so that it compares."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        n = min(4 * len(rows), 4096)
        batch = rows.draw(n, self.n_seeds, generator)
        loss: list[float] = self.losses(self.average, batch, *self.draw(n, generator))["loss"].tolist()
        return loss

    # --- sampling --------------------------------------------------------------------------------------------------

    def denoiser(self, bins: Tensor | None = None, guidance: float = 1.0) -> Denoise:
        """D(x, t) of the averaged networks, given bins (S, B) of the condition where they are conditional."""
        if not self._conditions:
            return self.prediction.denoiser(self.average)
        if bins is None:
            raise ValueError("the model is conditional: pass the bins to sample from")
        condition = self.one_hot(bins)
        return self.prediction.denoiser(classifier_free(self.average, condition, condition.new_zeros(()), guidance))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, sampling: Sampling) -> Tensor:
        """n rows of each seed's model, decoded: (S, n, D), in the order of `Transitions`' first D columns."""
        shape = (self.n_seeds, n, self.codec.size)
        sampler = make_sampler(sampling)
        bins = self.draw_bins(n, sampling.above, generator) if self._conditions else None
        x = SIGMA_MAX * torch.randn(shape, generator=generator, device=self.device)
        x = sampler(self.denoiser(bins, sampling.guidance), x, generator)
        rows = self.codec.decode(x)
        if self._head:
            p = torch.sigmoid(self.average.terminal(self.codec.standardise(rows)[..., : self.codec.causes]))
            u = torch.rand(p.shape, generator=generator, device=self.device)
            self.codec.mark(rows, u < p)
        return rows

    def draw_bins(self, n: int, above: float, generator: torch.Generator) -> Tensor:
        """(S, n) bins, of those from the quantile `above` up, each as often as its rows were met in training.

        Raises UserError where none were: it has not been trained, or all values so high share a bin with lower ones.
        """
        seen = self._seen.clone()
        seen[:, : int(above * self.config.bins + 1e-9)] = 0  # 0.29 * 100 is 28.999999999999996
        if not bool(seen.any(1).all()):
            raise UserError(
                f"--above is {above}, but no row that the model was trained on has its {self.config.condition} in a "
                "bin so high (equal values share one). Lower it."
            )
        return torch.multinomial(seen, n, replacement=True, generator=generator)

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that training changes, and the frequencies drawn once; counters () or the seeds axis first."""
        state = {"step": self.step, **({"seen": self._seen} if self._conditions else {})}
        return state | state_of({"network": self.network, "average": self.average, "optimiser": self.optimiser})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back. Raises ValueError where names or shapes differ."""
        copy_state_(self.state_dict(), state)


def make_sampler(sampling: Sampling) -> Sampler:
    """The sampler on EDM's grid, from sigma = 80 to 0.002 and then 0."""
    process = VE()
    times = process.grid(sampling.sampling_steps, SIGMA_MIN, SIGMA_MAX, RHO, to_zero=True, dtype=torch.float64)
    churn = Churn(sampling.S_churn, 0.05, 50.0, 1.003) if sampling.S_churn else None
    return Sampler(process, times, sampling.solver, churn=churn)


def bins_of(transitions: Transitions, condition: str, bins: int) -> Tensor:
    """The bin of each of N transitions, from 0 to bins - 1: (N,).

    condition: what the bins are of, `reward` or `return`, that of the transition's episode. They are equally full, by
    rank; equal values share a bin where they can. Raises DataError where all are equal.
    """
    columns = transitions.columns
    values = columns.rewards.double()
    if condition == "return":
        returns, number = episode_returns(values, columns.episodes)
        values = returns[number]
    elif condition != "reward":
        raise UserError(f"Unknown condition {condition!r}: reward or return.")
    if values.min() == values.max():
        raise DataError(
            f"All rows have the same {condition}, {float(values[0]):.4g}: there is nothing to condition on."
        )
    order = torch.sort(values).values
    # The middle of the ranks of equal values.
    low, high = torch.searchsorted(order, values), torch.searchsorted(order, values, right=True)
    return ((low + high) * bins // (2 * len(values))).clamp_max(bins - 1)


def fit(
    config: SynthERConfig,
    source: Source[Batch | BinnedBatch],
    codec: RowCodec,
    *,
    batch_size: int,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    generator: torch.Generator | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TransitionDiffusion:
    """Train in memory, without a run's folder: what a replay buffer that refits its model as it grows needs."""
    model = TransitionDiffusion(config, codec, seeds, device)
    generator = generator or generator_at(seeds[0], streams.TRAINING, device=model.device)
    trainer = StackTrainer(model, source, batch_size, generator)
    made = 0
    while made < config.steps:
        made += trainer.advance(config.steps - made, lambda: False)
        on_progress(made, config.steps)
    return model
