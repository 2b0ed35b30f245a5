"""The network of every generative policy, m_theta(a_t, t, s), and the interface that agents and diagnosis use."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffrl.diffusion import Denoise, Network, Prediction
from diffrl.nets import MLP, RawTime, ResidualMLP, TimeEmbedding, affine, mish


class ActionNetwork(nn.Module):
    """m_theta(a_t, t, s): an MLP on [a_t, time embedding, s], whose output has the action's size (arXiv 2208.06193).

    The first layer is linear in the three parts of its input, and two of them repeat: the state's part is computed
    once for all steps of a chain and all candidates of a state.

    blocks: 0 is the plain MLP; any other number is that of the blocks of a residual network with layer normalisation
    (IDQL's). time_size: size of the time embedding; 0: the network receives the time itself.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        blocks: int = 0,
        time_size: int = 16,
        activation: Callable[[Tensor], Tensor] = mish,
    ) -> None:
        super().__init__()
        self.n_seeds, self.action_size = len(generators), action_size
        self.embed_time: TimeEmbedding | RawTime
        self.embed_time = TimeEmbedding(self.n_seeds, time_size, generators) if time_size else RawTime(self.n_seeds)
        self._sizes = (action_size, time_size or 1, observation_size)
        stack, size = (self.n_seeds,), sum(self._sizes)
        self.mlp: MLP | ResidualMLP
        if blocks:
            self.mlp = ResidualMLP(stack, size, action_size, generators, width=width, blocks=blocks)
        else:
            self.mlp = MLP(stack, size, action_size, generators, width=width, layers=layers, activation=activation)

    def forward(self, actions: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """m_theta(a_t, t, s): actions (S, B, A), t () or (S, B), observations (S, B, O) -> (S, B, A)."""
        return self.bound(observations)(actions, t)

    def bound(self, observations: Tensor, K: int = 1) -> Network:
        """m_theta with its observations (S, B, O) bound: a function of a (S, B K, A) and t () or (S, B K).

        The K actions of a state stand in a row; the state's part of the first layer is computed once for them.
        """
        w_a, w_t, w_s = self.first_layer()
        state_part = self.state_part(observations, w_s, K)

        def network(actions: Tensor, t: Tensor) -> Tensor:
            return self.from_parts(state_part + torch.bmm(self.embed_time(t), w_t), actions, w_a)

        return network

    def first_layer(self) -> Sequence[Tensor]:
        """The rows of the first layer's weights that take actions, time embedding and observations."""
        return torch.split(self.mlp.first.weight, list(self._sizes), dim=1)

    def state_part(self, observations: Tensor, w_s: Tensor, K: int = 1) -> Tensor:
        """What the first layer makes of observations (S, B, O), its bias included: (S, B K, width).

        w_s: of `first_layer`. K: how often each state is repeated, in a row.
        """
        part = affine(observations, w_s, self.mlp.first.bias)
        return part.repeat_interleave(K, dim=1) if K > 1 else part

    def from_parts(self, h: Tensor, actions: Tensor, w_a: Tensor, keep: Tensor | None = None) -> Tensor:
        """m_theta at actions (S, B, A), where h (S, B, width) holds the first layer's time and state parts.

        w_a: of `first_layer`. keep: the dropout of a residual network, see `ResidualMLP`.
        """
        h = affine(actions, w_a, h)
        if keep is None:
            return self.mlp.after_first(h)
        assert isinstance(self.mlp, ResidualMLP)
        return self.mlp.after_first(h, keep)


class GenerativePolicy(ActionNetwork):
    """A policy that is a generative model of actions in [-1, 1] given the state.

    All noise is drawn beforehand and passed in, so that the losses are plain functions of tensors, which the compiler
    takes whole.
    """

    prediction: Prediction

    @abstractmethod
    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw the noise that `sample` needs for K actions of each of the observations (S, B, O)."""

    @abstractmethod
    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions (S, B K, A), the K of a state in a row; differentiable. noise: of `sampling_noise`."""

    @abstractmethod
    def noise_levels(self) -> tuple[float, ...]:
        """Ratios k = sigma/alpha, rising, at which to diagnose the model: within its training, never 0 or infinite."""

    def denoiser(self, observations: Tensor) -> Denoise:
        """D(a_t, t) = E[a_0 | a_t, s] for a_t (S, B, A), t () or (S, B), clamped to [-1, 1]."""
        return self.prediction.denoiser(self.bound(observations), clip=(-1.0, 1.0))

    def _candidates(self, observations: Tensor, noise: Tensor) -> int:
        """K, from observations (S, B, O) and noise (..., S, B K, A)."""
        return noise.shape[-2] // observations.shape[1]
