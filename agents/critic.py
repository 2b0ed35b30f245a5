"""Critics: the ensemble of Q functions that most agents share, their target and loss, and the choice among actions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.base_config import Aggregate, CriticConfig
from diffrl.data.chunks import Chunks
from diffrl.data.next_actions import AnyBatch
from diffrl.nets import MLP, mish


class CriticEnsemble(nn.Module):
    """n critics Q_1 ... Q_n for each seed (two: Fujimoto et al. 2018, arXiv 1802.09477).

    (S, B, O), (S, B, A) -> (S, n, B).
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        config: CriticConfig,
        activation: Callable[[Tensor], Tensor] = mish,
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        self.n_critics = config.n_critics
        self.mlp = MLP(
            (len(generators), config.n_critics),
            observation_size + action_size,
            1,
            generators,
            width=config.width,
            layers=config.layers,
            layer_norm=config.critic_layer_norm,
            activation=activation,
            norm_after=norm_after,
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """All critics' values (S, n, B) of actions (S, B, A) at observations (S, B, O)."""
        x = torch.cat([observations, actions], -1).unsqueeze(1).expand(-1, self.n_critics, -1, -1)
        values: Tensor = self.mlp(x)
        return values.squeeze(-1)


def aggregate(q: Tensor, how: Aggregate, spread: float = 1.0) -> Tensor:
    """One value (S, ...) of the critics' q (S, n, ...): their min, their mean, or lcb, mean - spread * std.

    std is the standard deviation of the n values, sqrt(E (Q_i - E Q)^2), so that lcb of two critics at spread 1 is
    their min. A lower confidence bound on Q: Ghasemipour et al. 2022, arXiv 2205.13703 (MSG).
    """
    if how == "min":
        return q.amin(1)
    mean = q.mean(1)
    if how == "mean":
        return mean
    # A norm, since the gradient of a square root is infinite where all critics agree.
    std: Tensor = torch.linalg.vector_norm(q - mean.unsqueeze(1), dim=1) / q.shape[1] ** 0.5
    return mean - spread * std


def td_target(batch: AnyBatch | Chunks, value: Tensor, discount: float) -> Tensor:
    """y = r + gamma (1 - terminal) V(s'): (S, B). Of chunks of H steps gamma is gamma^H, and r their discounted sum.

    value: V(s') (S, B). A row that a time limit cut off is not terminal, and bootstraps.
    """
    return batch.rewards + discount * (1 - batch.terminals) * value


def td_error(q: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """E (y - Q_i(s, a))^2 summed over the critics i, of q (S, n, B) and targets y (S, B): (S,).

    weight: (S, B), of each square; the mean is over all of the batch, whatever its weights.
    """
    error = (q - y.unsqueeze(1)).square()
    if weight is not None:
        error = error * weight.unsqueeze(1)
    return error.mean(-1).sum(1)


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, -log Exp(1), on the generator's device."""
    return -torch.empty(tuple(shape), device=generator.device).exponential_(generator=generator).log()


class CandidateNoise(NamedTuple):
    """All that is random in acting by the critics' choice among K actions a state."""

    sampling: Tensor
    """The policy's `sampling_noise` for K actions a state."""
    gumbel: Tensor
    """(S, B, K) standard Gumbel noise: the choice."""


def choose(actions: Tensor, q: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """Choose one of K actions for each state, by softmax(Q / temperature); the best at temperature 0: (S, B, A).

    actions: (S, B K, A), the K of a state in a row. q: (S, B K). gumbel: (S, B, K): the choice is the argmax
    of Q + temperature * Gumbel noise.
    """
    S, B, K = gumbel.shape
    best = (q.view(S, B, K) + temperature * gumbel).argmax(-1)
    index = best[..., None, None].expand(S, B, 1, actions.shape[-1])
    return actions.view(S, B, K, -1).gather(2, index).squeeze(2)
