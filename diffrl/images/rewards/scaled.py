"""Sums of rewards whose parts are brought to one size: each is divided by its running spread."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.images.rewards.base import Reward, Sum
from diffrl.support.errors import UserError

MEMORY = 10
"""Rounds that a spread remembers: the mean over the first ones, then a moving average that gives the newest 1/10."""


class ScaledSum(Sum):
    """A sum of w_i r_i / s_i: s_i is the running deviation of the part r_i among images of one prompt.

    Parts in kilobytes, cosines and probabilities then pull as hard as their weights w_i say, whatever their units. As a
    reward that is asked (in evaluations) it is the plain sum of w_i r_i, whose meaning does not change in a run;
    `scaled` is what is learned from. `state_dict` is plain JSON: a resumed run has the same spreads to the bit.
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__(terms)
        self._rounds: dict[str, int] = {}
        self._variances: dict[str, float] = {}

    def observe(self, values: Mapping[str, Tensor], prompts: Tensor) -> None:
        """Take a round into account: each part's values (n,) by name, and the numbers of their prompts (n,).

        A part that is the same for all images of each prompt says nothing of its spread, which stays.
        """
        for name, each in values.items():
            variance = variance_within(each, prompts)
            if variance == 0:
                continue
            rounds = self._rounds[name] = self._rounds.get(name, 0) + 1
            old = self._variances.get(name, 0.0)
            self._variances[name] = old + (variance - old) / min(rounds, MEMORY)

    def spread(self, name: str) -> float:
        """The running deviation of the part `name`; 1 as long as nothing is known of it."""
        return math.sqrt(self._variances.get(name, 1.0))

    def scaled(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum (n,) of each part's values (n,), divided by its spread, with the weights."""
        return self.combine({name: each / self.spread(name) for name, each in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """The rounds taken into account and the running variance, by part."""
        return {"rounds": dict(self._rounds), "variances": dict(self._variances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._rounds, self._variances = dict(state["rounds"]), dict(state["variances"])


def scaled(reward: Reward) -> ScaledSum:
    """The sum `reward` with its parts scaled. Raises UserError for a single reward: there is nothing to balance."""
    if not isinstance(reward, Sum):
        raise UserError(f"--scale-rewards balances the parts of a sum, and --reward {reward.name} is one reward alone.")
    return ScaledSum(reward.terms)


def variance_within(values: Tensor, prompts: Tensor) -> float:
    """The variance of values (n,) among those of one prompt, pooled over the prompts (n,) that have two and more.

    Where none has two, the variance of all. Of equal values exactly 0, and not rounding.
    """
    values, total, count = values.detach().to("cpu", torch.float64), 0.0, 0
    groups = [values[prompts.cpu() == number] for number in sorted(set(prompts.tolist()))]
    groups = [group for group in groups if len(group) > 1] or [values]
    for group in groups:
        if group.min() != group.max():
            total += float((group - group.mean()).square().sum())
        count += len(group)
    return total / count
