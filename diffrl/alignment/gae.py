"""Advantages over environment steps, and rewards on a scale that a critic can learn."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminals: Tensor,
    ends: Tensor,
    discount: float,
    decay: float,
) -> Tensor:
    """Generalised advantages (Schulman et al. 2015, arXiv 1506.02438, eq. 16): sum_l (discount decay)^l delta_{t+l},

        delta_t = r_t + discount (1 - terminal_t) V(s'_t) - V(s_t),

    the sum to the episode's end. All (N, ...), N steps in order. next_values: V of the states that the steps led to, at
    an episode's end too (not of the next episode's first). terminals, ends: 1.0 where there is nothing to bootstrap
    from, and where the next row is of another episode; else 0.0. An episode that was cut ends, and is bootstrapped.
    """
    delta = rewards + discount * (1 - terminals) * next_values - values
    advantages, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = delta[t] + discount * decay * (1 - ends[t]) * following
        advantages[t] = following
    return advantages


class RewardScale:
    """Rewards divided by the running deviation of the discounted return, seed by seed, and clamped to +-10.

    As Gymnasium's NormalizeReward and DPPO's code have it. The return runs forward, G_t = r_t + discount G_{t-1}, in
    each of S x E environments; its variance is over all steps so far.
    """

    def __init__(self, n_seeds: int, environments: int, discount: float) -> None:
        self._discount = discount
        self._running = torch.zeros(n_seeds, environments, dtype=torch.float64)
        self._mean = torch.zeros(n_seeds, dtype=torch.float64)
        self._squares = torch.zeros(n_seeds, dtype=torch.float64)
        """The sum of squared distances from the mean, seed by seed."""
        self._count = torch.zeros((), dtype=torch.float64)

    def __call__(self, rewards: Tensor, ends: Tensor) -> Tensor:
        """Scale the rewards (N, S, E) of N more steps by what is known after all of them.

        ends: 1.0 where the next row is of another episode, else 0.0; (N, S, E).
        """
        returns = []
        for reward, end in zip(rewards.double(), ends.double(), strict=True):
            self._running = reward + self._discount * self._running
            returns.append(self._running)
            self._running = self._running * (1 - end)
        G = torch.stack(returns).transpose(0, 1).flatten(1)  # (S, N E)
        n, mean = G.shape[1], G.mean(1)
        total, gap = self._count + n, mean - self._mean
        # Chan et al.'s update of two samples' moments to those of both.
        self._squares += ((G - mean[:, None]) ** 2).sum(1) + gap**2 * self._count * n / total
        self._mean += gap * n / total
        self._count = total
        std = torch.sqrt(self._squares / self._count + 1e-8)
        return (rewards / std.to(rewards)[:, None]).clamp(-10, 10)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments of the returns; running returns are left out: their episodes end with the checkpoint."""
        return {"mean": self._mean, "squares": self._squares, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, with running returns at 0."""
        self._mean, self._squares, self._count = (state[name].clone() for name in ("mean", "squares", "count"))
        self._running.zero_()
