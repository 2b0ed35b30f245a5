"""A noisy controller in Pendulum-v1 as data that some program wrote: right, and wrong in the ways of programs."""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
ENDS = np.arange(199, 2000, 200)
"""The last rows of the ten episodes."""


def pendulum(episodes: int = 10) -> Columns:
    """Columns by D4RL's names: episodes of 200 steps, cut by the time limit, of actions in [-2, 2]."""
    env, rng = gymnasium.make("Pendulum-v1"), np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for episode in range(episodes):
        s, _ = env.reset(seed=episode)
        cut = False
        while not cut:
            a = np.clip(rng.normal(-0.5 * s[1] - 0.1 * s[2], 0.7, 1), -2, 2).astype("f4")
            s2, r, terminal, cut, _ = env.step(a)
            rows.append((s, a, r, s2, terminal, cut))
            s = s2
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    kinds = ("f4", "f4", "f4", "f4", bool, bool)
    return {
        name: np.array(column, kind) for name, kind, column in zip(names, kinds, zip(*rows, strict=True), strict=True)
    }


def cases(data: Columns) -> dict[str, Columns]:
    """The same experience as other programs write it, by what is odd about it."""
    unmarked = {k: v for k, v in data.items() if k not in ("timeouts", "next_observations")}
    shifted = np.concatenate([data["observations"][1:], data["observations"][:1]])
    return {
        "truncations": unmarked | {"truncations": data["timeouts"]},
        "no_marks": unmarked,
        "no_marks_next": unmarked | {"next_observations": data["next_observations"]},
        "shifted_next": data | {"next_observations": shifted},
        "done_is_either": data | {"terminals": data["timeouts"], "timeouts": np.zeros_like(data["timeouts"])},
        "both": data | {"terminals": data["timeouts"]},
        "unit_actions": data | {"actions": data["actions"] / 2},
        "wide_actions": data,
    }
