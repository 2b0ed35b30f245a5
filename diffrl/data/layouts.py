"""Layouts of other libraries that are known, but not read: what they are, and the Python that makes a file we read."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from diffrl.data.columns import Table

_JOINED = """\
import h5py
import numpy as np

columns = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
with h5py.File(SOURCE) as file:
EPISODES
        for column, values in zip(columns.values(), parts):
            column.append(values)
np.savez("rollouts.npz", **{name: np.concatenate(column) for name, column in columns.items()})
"""
OF_D3RLPY = """\
    for i in range(sum(name.startswith("rewards_") for name in file)):
        rewards, terminated = file[f"rewards_{i}"][()].reshape(-1), bool(file[f"terminated_{i}"][()])
        last = np.arange(len(rewards)) == len(rewards) - 1
        ends = last & terminated, last & (not terminated)
        parts = file[f"observations_{i}"][()], file[f"actions_{i}"][()], rewards, *ends"""
OF_ROBOMIMIC = """\
    for demo in file["data"].values():
        last = np.arange(len(demo["actions"])) == len(demo["actions"]) - 1
        vectors = [demo["obs"][key][()] for key in sorted(demo["obs"]) if demo["obs"][key].ndim == 2]  # no images
        ends = np.zeros_like(last), last  # where success ends an episode: demo["dones"][()] == 1, and the rest of last
        parts = np.concatenate(vectors, axis=1), demo["actions"][()], demo["rewards"][()], *ends"""


def other_layout(table: Table, have: Collection[str]) -> str:
    """What a file is whose columns are not D4RL's, a sentence and the lines that convert it; "": it is not known.

    have: the names at its root.
    """
    if {"observations_0", "actions_0", "rewards_0", "terminated_0"} <= set(have):
        what, episodes = (
            "the layout of d3rlpy's ReplayBuffer.dump, arrays for each episode (observations_0, ...)",
            OF_D3RLPY,
        )
    elif "data" in have and any(table.get(f"data/demo_{i}/actions") is not None for i in (0, 1)):
        what, episodes = "the layout of robomimic, a group for each episode (data/demo_0, ...)", OF_ROBOMIMIC
    else:
        return ""
    return (
        f"{table.path} has {what}. It is not read; this Python makes rollouts.npz of it, which is:\n\n"
        f"{conversion(episodes, table.path)}"
    )


def conversion(episodes: str, source: Path) -> str:
    """The Python that joins the episodes of the file `source`. episodes: its loop over them, which gives `parts`."""
    return _JOINED.replace("EPISODES", episodes).replace("SOURCE", json.dumps(source.as_posix()))
