"""What labels are worth: how well a reward model that learned from them foretells labels it has not seen."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.augment.flow_to_better.reward_model import RewardModel, disagreement, fit_reward_model
from diffrl.data.offline import Ints, OfflineDataset
from diffrl.data.preferences import LabelledPairs
from diffrl.support.errors import UserError

LEAST = 10
"""Labels that a model can learn anything from."""
CANDIDATES = 200
"""Random pairs of which the most disputed are chosen."""
_Z = 1.959964
"""The normal distribution's quantile of 97.5 %."""
_ROWS = 50_000
"""Rows by which the model standardises what it sees: more would make a person wait."""


class Worth(NamedTuple):
    """How well the model of the first labels foretells preferences."""

    labels: int
    """The labels that it learned from, and is asked about: each member about those that it has not seen."""
    asked: int
    """Held-out preferences: pairs that are not equal."""
    accuracy: float
    """The share of them that is foretold."""

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval, 95 %, of the accuracy (Wilson 1927): within [0, 1], and never of width 0."""
        n, p = self.asked, self.accuracy
        middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + (_Z / (2 * n)) ** 2)
        low, high = ((middle + side) / (1 + _Z**2 / n) for side in (-half, half))
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, eq=False)
class LabelModels:
    """Reward models of a data set's labels, as `diffrl augment flow-to-better` trains them."""

    dataset: OfflineDataset
    config: RewardConfig
    seed: int

    def learn(self, labels: LabelledPairs, stop: Event) -> tuple[RewardModel, Worth | None] | None:
        """The model of these labels, and what they are worth; None where they are too few, or all equal.

        It takes seconds. Raises CancelledError once `stop` is set.
        """

        def go_on(done: int, total: int) -> None:
            if stop.is_set():
                raise CancelledError

        if len(labels) < LEAST:
            return None
        every = slice(None, None, len(self.dataset) // _ROWS + 1)
        columns: dict[str, Any] = {key: values[every] for key, values in self.dataset.columns().items()}
        some = replace(self.dataset, **columns, infos={})
        try:
            model, report = fit_reward_model(
                some, labels.segments(self.dataset), self.config, self.seed, on_progress=go_on
            )
        except UserError:  # nothing is preferred
            return None
        if report.accuracy is None:
            return model, None
        told = report.pairs / (report.pairs + report.equal)
        asked = min(round(report.held_out * model.members * told), report.pairs)  # a pair is not several
        return model, Worth(len(labels), max(asked, 1), report.accuracy)

    def most_disputed(self, model: RewardModel, pairs: Ints, segment: int, number: int) -> Ints:
        """Those (number, 2) of some pairs (n, 2) of segments that the model's members disagree on most, most first."""
        rows = (pairs.reshape(-1, 1) + np.arange(segment)).reshape(-1)
        columns: dict[str, Any] = {key: values[rows] for key, values in self.dataset.columns().items()}
        of_pairs = replace(self.dataset, **columns, infos={})  # 40,000 rows are scored, and not a million
        at = np.arange(len(pairs) * 2).reshape(-1, 2) * segment
        return pairs[np.argsort(-disagreement(model, of_pairs, at, segment), kind="stable")[:number]]
