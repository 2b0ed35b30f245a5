"""Distillation of an image model into one of few network calls: consistency distillation and reflow.

The teacher is the frozen model as its probability-flow ODE in DDIM steps between the `levels` times that its pipeline
samples at, 0 at the end; the student is the same network, begun with the teacher's weights. It learns from pairs of the
teacher's: noise z and the end x_0 of its path, so that no data are needed.

    consistency     f(x_t, t) = f(x_r, r), x_r one of the teacher's steps from x_t = a x_0 + s e to the next time below
                    (`consistency_loss`); e is fresh. The goal is given by a moving average of the student.
    reflow          denoising on the lines x_t = a x_0 + s z, whose noise is not independent but the pair's own
                    (`diffrl.diffusion.reflow`: in y = x_t / a and k = s / a every process' lines are straight, and DDIM
                    is Euler's step); at pure noise this is a single step against the pair's end

f is the network's own denoiser D(x, t), but for f(x, 0) = x, whatever the network says: the boundary condition, for any
prediction. So a student is saved as an ordinary pipeline of the teacher's class. Where the teacher is guided, D is the
guided one and the student needs no guidance; the built-in models know no empty prompt, and none of them is guided.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffrl.diffusion import Denoise, Sampler, consistency_loss, consistency_sample, denoising_loss, expand, half_from
from diffrl.images.distil_config import ImageDistilConfig
from diffrl.images.model import Condition, ImageModel
from diffrl.images.samples import rows


class Pairs(NamedTuple):
    """Pairs of the teacher's, with the seeds axis that batches have: S = 1."""

    x0: Tensor
    """The ends of its paths (S, B, *shape)."""
    noise: Tensor
    """The standard normal noise that they began at, of x0's shape."""
    row: Tensor
    """Which row of the conditions each is of (S, B)."""


class PairSource:
    """What batches of pairs are drawn from: x0, noise (n, *shape) and row (n,), all on one device."""

    def __init__(self, x0: Tensor, noise: Tensor, row: Tensor) -> None:
        self._whole = Pairs(x0, noise, row)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Pairs:
        """Draw a batch, with replacement."""
        n, device = len(self._whole.row), self._whole.row.device
        index = torch.randint(n, (n_seeds, batch_size), generator=generator, device=device)
        return Pairs(*(values[index] for values in self._whole))


def anchored(denoise: Denoise) -> Denoise:
    """The consistency function of a denoiser: f(x, t) = D(x, t), and f(x, 0) = x."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(expand(t, x) == 0, x, denoise(x, t).to(x.dtype))

    return f


def denoiser(model: ImageModel, condition: Condition, *, teacher: bool = False) -> Denoise:
    """D(x, t) of the student or the teacher, clamped where the model's own sampler clamps."""
    return model.prediction.denoiser(model.network(condition, reference=teacher), clip=model.clip)


@torch.no_grad()
def teach(model: ImageModel, condition: Condition, noise: Tensor, calls: int) -> Tensor:
    """The ends (B, *shape) of the teacher's paths from standard normal noise, in so many DDIM steps."""
    return _ddim(model, denoiser(model, condition, teacher=True), noise, calls)


@torch.no_grad()
def learned(model: ImageModel, condition: Condition, noise: Tensor, calls: int, to: str) -> Tensor:
    """What the student makes of noise (calls, B, *shape): from its first draw; consistency needs the others too.

    As the model's network stands, in so many calls.
    """
    denoise = denoiser(model, condition)
    if to == "reflow":
        return _ddim(model, denoise, noise[0], calls)
    times, process = model.times(calls)[:-1], model.prediction.process
    start = float(process.sigma(times[0])) * noise[0]
    return consistency_sample(anchored(denoise), process, start, times, noise=noise[1:])


def _ddim(model: ImageModel, denoise: Denoise, noise: Tensor, calls: int) -> Tensor:
    process, times = model.prediction.process, model.times(calls)
    return Sampler(process, times)(denoise, float(process.sigma(times[0])) * noise)


class DistilLearner:
    """Distils the reference of `model.tuned` into its network, as a `Learner` from `Pairs`.

    model: trained whole; its network is the student, its frozen reference the teacher. condition: of all prompts, a row
    each. `average` holds the weights that are kept.
    """

    n_seeds, period = 1, 1

    def __init__(self, model: ImageModel, condition: Condition, config: ImageDistilConfig) -> None:
        self.model, self.config = model, config
        self.seeds: tuple[int, ...] = (config.seed,)
        self._condition = condition
        self._trained: dict[str, nn.Parameter] = model.tuned.parameters()
        self.average = model.tuned.state_dict()
        self._times = model.times(config.levels).to(model.device)
        self._optimiser = torch.optim.Adam(self._trained.values(), config.learning_rate)
        for parameter in self._trained.values():  # made now, so that a checkpoint of no steps has it too
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self._optimiser.state[parameter] = {"step": torch.zeros(()), **zeros}

    def loss(self, batch: Pairs, generator: torch.Generator) -> Tensor:
        """The loss of each pair of a batch (B,), with times and noise drawn here."""
        x0, noise, row = (values[0] for values in batch)
        condition, B = rows(self._condition, row), len(row)
        if self.config.to == "reflow":
            return self.reflow_loss(condition, x0, self._reflow_times(B, generator), noise)
        i = torch.randint(len(self._times) - 1, (B,), generator=generator, device=generator.device)
        fresh = torch.randn(x0.shape, generator=generator, device=generator.device)
        return self.cd_loss(condition, x0, i, fresh)

    def cd_loss(self, condition: Condition, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """Consistency distillation (B,) between the times i and i + 1 (B,), of which 0 is the noisiest."""
        f, teacher = anchored(denoiser(self.model, condition)), denoiser(self.model, condition, teacher=True)
        given = self.model.prediction.process, f, x0, self._times[i], self._times[i + 1], noise
        return consistency_loss(*given, target=self._goal(condition), teacher=teacher, event_dims=len(self.model.shape))

    def reflow_loss(self, condition: Condition, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Denoising (B,) of the pairs at times t (B,)."""
        network = self.model.network(condition)
        return denoising_loss(self.model.prediction, network, x0, t, noise, event_dims=len(self.model.shape))

    def _reflow_times(self, n: int, generator: torch.Generator) -> Tensor:
        t = self.model.training_times(n, generator)
        return t if self.config.calls > 1 else half_from(self._times[0], t, generator)

    def _goal(self, condition: Condition) -> Denoise:
        f = anchored(denoiser(self.model, condition))

        def goal(x: Tensor, t: Tensor) -> Tensor:
            with self.averaged():
                return f(x, t)

        return goal

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the model's network has the average's weights, and no graph."""
        with self.model.tuned.standing_in(self.average):
            yield

    def update(self, batch: Pairs, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """Make one step; metrics (1,)."""
        config = self.config
        loss = self.loss(batch, generator).mean()
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        bound = config.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self._trained.values(), bound)
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self._trained.values()), config.ema_rate)
        return {"distil_loss": loss.detach()[None], "grad_norm": norm.detach()[None]}

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that training changes, themselves and not copies: average, trained weights, Adam's."""
        state = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self._trained.items():
            state[f"trained.{name}"] = parameter.detach()
            state |= {f"adam.{key}.{name}": tensor for key, tensor in self._optimiser.state[parameter].items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back. Raises ValueError where it does not fit."""
        own = self.state_dict()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("the checkpoint is of another model: the names or shapes of its tensors differ")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
