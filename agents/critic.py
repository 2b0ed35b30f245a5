"""The twin critic that most agents share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffrl.nets import MLP


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
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both critics' values (S, 2, B)."""
        x = torch.cat([observations, actions], -1).unsqueeze(1).expand(-1, 2, -1, -1)
        values: Tensor = self.mlp(x)
        return values.squeeze(-1)
