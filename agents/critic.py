"""Critics: the twin Q that most agents share, its errors, a state's value, and the choice among candidate actions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffrl.nets import MLP, mish


class TwinCritic(nn.Module):
    """Q_1 and Q_2 of a seed (Fujimoto et al. 2018, arXiv 1802.09477): (S, B, O), (S, B, A) -> (S, 2, B)."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        layer_norm: bool = False,
        activation: Callable[[Tensor], Tensor] = mish,
    ) -> None:
        super().__init__()
        self.mlp = MLP(
            (len(generators), 2),
            observation_size + action_size,
            1,
            generators,
            width=width,
            layers=layers,
            layer_norm=layer_norm,
            activation=activation,
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both critics' values (S, 2, B)."""
        x = torch.cat([observations, actions], -1).unsqueeze(1).expand(-1, 2, -1, -1)
        values: Tensor = self.mlp(x)
        return values.squeeze(-1)


def td_error(q: Tensor, y: Tensor) -> Tensor:
    """E (y - Q_i(s, a))^2 summed over the critics i, of q (S, 2, B) and targets y (S, B): (S,)."""
    return (q - y.unsqueeze(1)).square().mean(-1).sum(1)


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, -log Exp(1), on the generator's device."""
    return -torch.empty(tuple(shape), device=generator.device).exponential_(generator=generator).log()


def choose(actions: Tensor, q: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """One of K actions a state, drawn from softmax(Q / temperature); the best at temperature 0: (S, B, A).

    actions: (S, B K, A), the K of a state in a row. q: (S, 2, B K), of which the smaller counts. gumbel: (S, B, K): the
    draw is the argmax of Q + temperature * Gumbel noise.
    """
    S, B, K = gumbel.shape
    best = (q.amin(1).view(S, B, K) + temperature * gumbel).argmax(-1)
    return actions.view(S, B, K, -1).take_along_dim(best[..., None, None], dim=2).squeeze(2)
