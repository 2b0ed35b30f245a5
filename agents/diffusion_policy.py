"""The diffusion policy pi(a | s): the actor of Diffusion-QL, and a behaviour-cloning policy by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.config import DiffusionBC, DiffusionQL
from diffrl.diffusion import VP, Denoise, Prediction, Sampler, denoising_loss, discrete_grid
from diffrl.nets import MLP, TimeEmbedding, affine


class DiffusionPolicy(nn.Module):
    """A conditional DDPM of T steps over actions in [-1, 1] (arXiv 2208.06193, section 3).

    The network eps_theta(a_t, t, s) is an MLP on [a_t, time embedding, s]. Its time label is the time of the VP
    process (0.22, 0.83, 1.8, 3.2, 5.1 for T = 5) where the original code has the step's index (0 to 4): about the same
    numbers, and with a meaning for any other grid or solver. All noise is drawn beforehand and passed in, so that the
    losses are plain functions of tensors, which the compiler takes whole.

    The first layer is linear in the three parts of its input, and two of them repeat: the state's part is computed
    once for all steps of a chain and all candidates of a state, the time's part once for each of the T times.
    """

    times: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        steps: int,
        schedule: str,
        time_size: int = 16,
    ) -> None:
        super().__init__()
        self.n_seeds, self.action_size, self.steps = len(generators), action_size, steps
        times = discrete_grid(schedule, steps, dtype=torch.get_default_dtype())
        self.prediction = Prediction("eps", VP())
        self.sampler = Sampler(VP(), times, eta=1.0)
        # (c_skip, c_out) of the denoiser at each time of the grid.
        self._preconditioning = torch.stack(self.prediction.preconditioning(times[:-1].double()), 1).tolist()
        self.register_buffer("times", times[:-1], persistent=False)
        self.embed_time = TimeEmbedding(self.n_seeds, time_size, generators)
        self._sizes = (action_size, time_size, observation_size)
        self.mlp = MLP((self.n_seeds,), sum(self._sizes), action_size, generators, width=width, layers=layers)

    def forward(self, actions: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """eps_theta: actions (S, B, A), t () or (S, B), observations (S, B, O) -> (S, B, A)."""
        w_a, w_t, w_s = self._first_layer()
        h = torch.bmm(self.embed_time(t), w_t) + torch.baddbmm(self.mlp.first.bias, observations, w_s)
        return self._from_parts(h, actions, w_a)

    def _first_layer(self) -> Sequence[Tensor]:
        """The rows of the first layer's weights that take actions, time embedding and observations."""
        return torch.split(self.mlp.first.weight, list(self._sizes), dim=1)

    def _from_parts(self, h: Tensor, actions: Tensor, w_a: Tensor) -> Tensor:
        """eps_theta, where h holds the first layer's time and state parts."""
        eps: Tensor = self.mlp.after_first(affine(actions, w_a, h))
        return eps

    def _parts(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's time parts (S, T, width), its state part with bias (S, B, width), and w_a."""
        w_a, w_t, w_s = self._first_layer()
        labels = self.times.expand(self.n_seeds, -1)
        return torch.bmm(self.embed_time(labels), w_t), affine(observations, w_s, self.mlp.first.bias), w_a

    def bc_noise(self, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `bc_loss` needs: steps i (S, B), uniform over the grid of times, and noise eps (S, B, A)."""
        i = torch.randint(self.steps, actions.shape[:-1], generator=generator, device=actions.device)
        return i, torch.randn(actions.shape, generator=generator, device=actions.device)

    def bc_loss(self, actions: Tensor, observations: Tensor, i: Tensor, eps: Tensor) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2), the mean over batch and action dimensions: (S,)."""
        time_parts, state_part, w_a = self._parts(observations)
        one_hot = (i.unsqueeze(-1) == torch.arange(self.steps, device=i.device)).to(time_parts.dtype)
        # The row of each time, taken by a product: its backward pass is one too, and not a scatter.
        h = torch.baddbmm(state_part, one_hot, time_parts)
        t = self.times[i]
        return denoising_loss(self.prediction, lambda a, t: self._from_parts(h, a, w_a), actions, t, eps).mean(-1)

    def denoiser(self, observations: Tensor) -> Denoise:
        """D(a_t, t) = E[a_0 | a_t, s] for a_t (S, B, A), t () or (S, B), clamped to [-1, 1] as `sample` does."""
        return self.prediction.denoiser(lambda a, t: self(a, t, observations), clip=(-1.0, 1.0))

    def noise_levels(self) -> tuple[float, ...]:
        """The ratios k = sigma/alpha of its T times, rising."""
        return tuple(self.prediction.process.ratio(self.times.double()).flip(0).tolist())

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """What `sample` needs for K actions a state: (T + 1, S, B K, A), the start a_T first, in one draw."""
        S, B, _ = observations.shape
        shape = (self.steps + 1, S, B * K, self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions (S, B K, A) by the T steps of the reverse process, D clamped to [-1, 1] (eq. 1); differentiable.

        observations: (S, B, O). noise: (T + 1, S, B K, A), of `sampling_noise`; the K actions of a state in a row.
        """
        K = noise.shape[2] // observations.shape[1]
        time_parts, state_part, w_a = self._parts(observations)
        if K > 1:
            state_part = state_part.repeat_interleave(K, dim=1)
        # The sampler, DDPM's, asks for the denoised action once at each time of the grid, in its order.
        steps = iter(zip(time_parts.unbind(1), self._preconditioning, strict=True))

        def denoise(a: Tensor, t: Tensor) -> Tensor:
            time_part, (c_skip, c_out) = next(steps)
            eps = self._from_parts(state_part + time_part.unsqueeze(1), a, w_a)
            a_0: Tensor = c_skip * a + c_out * eps
            return a_0

        return self.sampler(denoise, noise[0], noise=noise[1:], clip=(-1.0, 1.0))


def build_policy(agent: Agent, config: DiffusionBC | DiffusionQL) -> DiffusionPolicy:
    """The diffusion policy of an agent, as its configuration says, on its device."""
    return DiffusionPolicy(
        agent.observation_size,
        agent.action_size,
        agent.generators,
        width=config.width,
        layers=config.layers,
        steps=config.denoising_steps,
        schedule=config.schedule,
    ).to(agent.device)
