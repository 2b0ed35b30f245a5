"""The denoising chain as a Markov decision process: what policy gradients of a diffusion or flow model act on.

State x_t (and t, and the condition that is bound in the denoiser), action x_r, one reverse step on: the policy is

    pi(x_r | x_t) = N(x_r; m, n^2 I),    m = f D(x_t, t) + g x_t,

the step of `reverse_step` with eta > 0 (f = b - c a/s, g = c/s in its letters). So for every process: eta = 1 is the
DDPM posterior, as in DDPO (Black et al. 2023, arXiv 2305.13301) and DPPO (Ren et al. 2024, arXiv 2409.00588); on
`RectifiedFlow` eta = 0.7/sqrt(2) is, to first order in the step, the SDE of Flow-GRPO (Liu et al. 2025, arXiv
2505.05470, a = 0.7), without its singularity at t = 1.

The deviation n is of the grid alone. Two Gaussians of one step thus differ in their means only, and

    log pi - log pi_ref = (|x_r - m_ref|^2 - |x_r - m|^2) / (2 n^2),    KL(pi || pi_ref) = |m - m_ref|^2 / (2 n^2).

Log-probabilities and divergences are sums over the dimensions of a sample, in nats, and accumulated in float64: at
Stable Diffusion's 16,384 dimensions a log-probability is of the order of 3e4, where float32 is spaced by .002 to .004;
a log-ratio summed in float32 errs by as much, so by 3e-5.

**The last step** to k = 0 has n = 0. It is no decision: it is made, but has no log-probability, and `n_decisions` is
one less than the number of steps. No policy gradient trains what D answers there (DRaFT does), other than by what D
learns elsewhere. With `min_std` > 0 every step is a decision, the last among them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffrl.diffusion.prediction import Clip, Denoise, Prediction, of_shape
from diffrl.diffusion.process import Process, expand
from diffrl.diffusion.sampler import Sampler, step_noise

RESOLVED = 1e-6
"""The least deviation of a decision: below it float32's rounding of x_r, and not z, would be what has a probability."""

Steps = Sequence[int] | Tensor
"""Which decisions, counted from 0, the first (without a window) from pure noise: (K,), the same for all rows, or
(K, *rows), each its own."""


class Rollout(NamedTuple):
    """What a chain went through: `states` (T + 1, *x.shape), and `log_probs` (n_decisions, *rows), without a graph."""

    states: Tensor
    log_probs: Tensor

    @property
    def x(self) -> Tensor:
        """The last state: the sample."""
        return self.states[-1]


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussians N(mean, std^2 I) of K steps: mean (K, *x.shape), std broadcasts against it.

    Every method gives (K, *rows), rows being the dimensions of x before its last `event_dims`, in float64 (on Apple's
    MPS, which has none, in float32).
    """

    mean: Tensor
    std: Tensor
    event_dims: int

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I) of x (K, *x.shape), in nats: sums over the dimensions of a sample."""
        return -(self._sum(((x - self.mean) / self.std) ** 2) / 2 + self._log_scale())

    def kl(self, reference: "Transition") -> Tensor:
        """KL(self || reference) in nats, of the same steps: |mean - mean_ref|^2 / (2 std^2)."""
        return self._sum(((self.mean - reference.mean) / self.std) ** 2) / 2

    def entropy(self) -> Tensor:
        """The entropy in nats: the grid's, not the denoiser's, so that no bonus on it has a gradient."""
        return self._log_scale() + self.mean[0].flatten(-self.event_dims).shape[-1] / 2

    def _sum(self, values: Tensor) -> Tensor:
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        return values.flatten(-self.event_dims).sum(-1, dtype=dtype)

    def _log_scale(self) -> Tensor:
        """d log(sqrt(2 pi) std)."""
        return self._sum((torch.log(self.std) + math.log(2 * math.pi) / 2).expand_as(self.mean))


class DenoisingChain:
    """A process, a grid of times and eta, as a decision process for actions (..., d) and for images (B, *image) alike.

    process, times, eta: as `Sampler` takes them. `rollout` makes the very steps of `sample(process, denoise, x, times,
        eta=eta)`. eta = 0 has no policy: good for `differentiable_steps` alone, unless `min_std` is given.
    window: (first, length): only these steps have noise and are decisions, the others are the deterministic ones of
        eta = 0 (MixGRPO, Li et al. 2025, arXiv 2507.21802; Flow-GRPO-Fast): fewer decisions to learn from, by cleaner
        samples. Decisions are counted from the window's first. Not with `min_std`.
    min_std: a lower clamp of the deviation n, in sampling and in log-probabilities alike; the mean stays as it is. DPPO
        needs it (0.1 there): late steps of little noise explore nothing, and their ratios run away.
    clip: (low, high), to which D is clamped, in sampling and in log-probabilities alike.
    event_dims: how many of the last dimensions of x are one sample: 1 for actions, 3 for images (B, C, H, W).

    Denoisers are called once a step, with x of the shape and dtype of the states and t a scalar, or one value a row
    where the steps are: as in sampling, so that what is bound in them (a condition a row) fits, and so that ratios
    before the first update are 1 to the bit on the same rows (with a time a row: to the network's rounding).

    Raises ValueError as `Sampler` does, for a negative min_std, event_dims < 1, and for a deviation between 0 and 1e-6,
    which float32 cannot resolve.
    """

    def __init__(
        self,
        process: Process,
        times: Tensor,
        eta: float = 1.0,
        *,
        window: tuple[int, int] | None = None,
        min_std: float = 0.0,
        clip: Clip | None = None,
        event_dims: int = 1,
    ) -> None:
        if not 0 <= min_std < math.inf:
            raise ValueError(f"min_std must be finite and not negative, got {min_std}")
        if event_dims < 1:
            raise ValueError(f"event_dims must be at least 1, got {event_dims}")
        sampler = Sampler(process, times, eta=eta)
        plan = sampler.plan
        self.first_decision = 0
        """The number of the first step that is a decision."""
        if window is not None:
            self.first_decision, length = window
            last = self.first_decision + length
            if not 0 <= self.first_decision < last <= len(plan) or min_std > 0:
                raise ValueError(
                    f"a window of {length} steps from step {self.first_decision} on is not in a chain of {len(plan)} "
                    "steps, or stands beside min_std"
                )
            still = Sampler(process, times, eta=0.0).plan
            plan = (*still[: self.first_decision], *plan[self.first_decision : last], *still[last:])
        self._steps = [(step.t, step.f, step.g, max(step.n, min_std)) for step in plan]
        self.stds = tuple(n for _, _, _, n in self._steps)
        """The deviation n of each step, clamped to `min_std`."""
        self.times = tuple(t for t, _, _, _ in self._steps)
        """The time that each step starts from."""
        self.n_steps = len(self._steps)
        self.n_decisions = sum(n > 0 for n in self.stds)
        """How many steps have a log-probability: all, or all but the last, of the window; with eta = 0 none."""
        decisions = self.stds[self.first_decision :][: self.n_decisions]
        if any(n < RESOLVED for n in decisions):
            raise ValueError(
                f"steps with deviations {min(n for n in decisions if n > 0):.1e} of noise: what float32 keeps of so "
                "little is no probability. End the times at 0, whose step is then no decision, or set min_std"
            )
        self.clip = clip
        self.event_dims = event_dims
        given = {"window": window, "min_std": min_std or None, "clip": clip}
        options = "".join(f", {name}={value}" for name, value in given.items() if value is not None)
        self._text = f"{sampler!r}, {self.n_decisions} of them decisions{options}"

    def __repr__(self) -> str:
        return f"DenoisingChain({self._text})"

    def rollout(
        self,
        denoise: Denoise,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        differentiable_steps: int = 0,
    ) -> Rollout:
        """Carry `x` at times[0] down to times[-1], keeping every state and the log-probability of every decision.

        generator, noise: as `sample` takes them, one of them: noise (T, *x.shape). Without decisions they are not used,
            and may be left out.
        differentiable_steps: K, from 0 to T: the last K steps carry a graph, through D and from state to state, the
            ones before are constants: DRaFT-K (Clark et al. 2023, arXiv 2309.17400), AlignProp (arXiv 2310.03739).
            K = T is the whole chain, differentiable in `x` too. Log-probabilities never carry one: see `log_prob`.

        Raises ValueError for noise that is missing or of a wrong shape, a K beyond the chain, an x of too few
        dimensions, a denoiser that changes the shape of x.
        """
        if not 0 <= differentiable_steps <= self.n_steps:
            raise ValueError(f"differentiable_steps must be from 0 to {self.n_steps}, got {differentiable_steps}")
        if x.ndim < self.event_dims:
            raise ValueError(f"event_dims = {self.event_dims} of an x of shape {tuple(x.shape)}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        z = step_noise(x, self.n_steps, generator, noise) if self.n_decisions or noise is not None else None
        z = z if self.n_decisions else None
        first = self.n_steps - differentiable_steps
        x = x if first == 0 else x.detach()
        states, log_probs = [x], []
        for i, (t, f, g, n) in enumerate(self._steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                mean = self._mean(denoise, x, x.new_full((), t), f, g)
                x = mean if z is None else mean + n * z[i]
            states.append(x)
            if 0 <= i - self.first_decision < self.n_decisions:
                with torch.no_grad():
                    log_probs.append(self._gaussians([mean], [x.new_full((), n)]).log_prob(x[None])[0])
        rows = x.shape[: x.ndim - self.event_dims]
        return Rollout(torch.stack(states), torch.stack(log_probs) if log_probs else x.new_zeros(0, *rows))

    def transition(self, denoise: Denoise, states: Tensor, steps: Steps | None = None) -> Transition:
        """The policy's Gaussians at `steps` (all decisions, if None) of a roll-out's `states` (T + 1, *x.shape).

        Differentiable in what `denoise` holds; the states are constants. One call of `denoise` a step, of the steps
        asked for: who needs both log-probability and divergence takes them from one of these. `steps` are read on the
        host. Raises ValueError for states of another chain, and steps that are no decisions or whose rows are not those
        of the states.
        """
        x, indices = self._checked(states, steps)
        indices = indices + self.first_decision
        table = torch.tensor(self._steps, dtype=x.dtype, device=x.device)
        means, stds = [], []
        for index in indices:
            x_t = at_steps(x, index[None])[0]
            t, f, g, n = table[index.to(x.device)].unbind(-1)
            means.append(self._mean(denoise, x_t, t, expand(f, x_t), expand(g, x_t)))
            stds.append(expand(n, x_t))
        return self._gaussians(means, stds)

    def log_prob(self, denoise: Denoise, states: Tensor, steps: Steps | None = None) -> Tensor:
        """log pi(x_r | x_t) at `steps`, (K, *rows) in nats; arguments and gradients as for `transition`.

        `at_steps(rollout.log_probs, steps)` is the same of the policy that made the roll-out.
        """
        return self.transition(denoise, states, steps).log_prob(self.next_states(states, steps))

    def kl(self, denoise: Denoise, reference: Denoise, states: Tensor, steps: Steps | None = None) -> Tensor:
        """KL(pi || pi_ref) at `steps` in the states of a roll-out, (K, *rows) in nats; the reference is a constant.

        Summed over all steps and averaged over the policy's own roll-outs it is the divergence of the two chains.
        """
        with torch.no_grad():
            anchor = self.transition(reference, states, steps)
        return self.transition(denoise, states, steps).kl(anchor)

    def next_states(self, states: Tensor, steps: Steps | None = None) -> Tensor:
        """The actions x_r that were taken at `steps`: (K, *x.shape), without a graph."""
        x, indices = self._checked(states, steps)
        return at_steps(x[1:], indices + self.first_decision)

    def pushes(self, prediction: Prediction) -> Tensor:
        """How far each decision's mean moves with the network's answer m: |f c_out|, (n_decisions,), in float64."""
        decisions = self._steps[self.first_decision :][: self.n_decisions]
        t, f, _, _ = torch.tensor(decisions, dtype=torch.float64).unbind(1)
        return (f * prediction.preconditioning(t)[1]).abs()

    def draw_steps(self, k: int, generator: torch.Generator, rows: Sequence[int] = ()) -> Tensor:
        """k of the decisions, none twice, in random order: (k, *rows), each row its own; without rows one draw for all.

        The steps are on the generator's device. Raises ValueError for k outside 1 ... n_decisions.
        """
        if not 1 <= k <= self.n_decisions:
            raise ValueError(f"k must be from 1 to the {self.n_decisions} decisions of this chain, got {k}")
        u = torch.rand(self.n_decisions, *rows, generator=generator, device=generator.device)
        return u.argsort(0)[:k]

    def _mean(self, denoise: Denoise, x: Tensor, t: Tensor, f: float | Tensor, g: float | Tensor) -> Tensor:
        D = of_shape(denoise(x, t), x).to(x.dtype)
        if self.clip is not None:
            D = D.clamp(*self.clip)
        return f * D + g * x

    def _gaussians(self, means: list[Tensor], stds: list[Tensor]) -> Transition:
        mean, std = torch.stack(means), torch.stack(stds)
        return Transition(mean, expand(std, mean), self.event_dims)

    def _checked(self, states: Tensor, steps: Steps | None) -> tuple[Tensor, Tensor]:
        """The states without a graph, and the steps as a tensor of indices on the host."""
        if self.n_decisions == 0:
            raise ValueError("this chain is deterministic (eta = 0 and no min_std): it has no policy")
        if len(states) != self.n_steps + 1 or states.ndim <= self.event_dims:
            raise ValueError(
                f"states must have shape ({self.n_steps} + 1, *x.shape) with event_dims = {self.event_dims}, got "
                f"{tuple(states.shape)}"
            )
        if steps is None:
            steps = range(self.n_decisions)
        index = steps.cpu() if isinstance(steps, Tensor) else torch.tensor(list(steps), dtype=torch.int64)
        rows = states.shape[1 : states.ndim - self.event_dims]
        if index.dtype != torch.int64 or len(index) == 0 or index.shape[1:] not in ((), rows):
            raise ValueError(
                f"steps must be integers (K,) or (K, *rows) = (K, {', '.join(map(str, rows))}), K >= 1, got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        if not bool(((index >= 0) & (index < self.n_decisions)).all()):
            raise ValueError(
                f"steps must be from 0 to {self.n_decisions - 1}, the decisions of this chain of {self.n_steps} steps"
            )
        return states.detach(), index


def at_steps(values: Tensor, steps: Steps) -> Tensor:
    """What `values` (T, *rows, ...) hold at `steps`, (K,) or (K, *rows): (K, *rows, ...)."""
    index = (steps if isinstance(steps, Tensor) else torch.tensor(list(steps), dtype=torch.int64)).to(values.device)
    if index.ndim == 1:
        return values[index]
    index = index.reshape(index.shape + (1,) * (values.ndim - index.ndim))
    return values.gather(0, index.expand(-1, *values.shape[1:]))
