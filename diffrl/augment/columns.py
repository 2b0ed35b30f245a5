"""Rows of transitions as the columns of a data set."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.offline import BOTH_STAND_IN, MADE_STAND_IN, STAND_IN, OfflineDataset
from diffrl.data.transitions import Transitions


def as_columns(rows: NDArray[np.float32], observation_size: int, action_size: int) -> dict[str, NDArray[Any]]:
    """The columns of a data set of rows (n, D) [s, a, s', r, terminal], D = 2 O + A + 2.

    Each row is an episode of its own: cut off, unless it is terminal.
    """
    o, a = observation_size, action_size
    terminals = rows[:, -1] > 0.5
    return {
        "observations": rows[:, :o],
        "actions": rows[:, o : o + a],
        "rewards": rows[:, -2],
        "terminals": terminals,
        "timeouts": ~terminals,
        "next_observations": rows[:, o + a : -2],
    }


def as_dataset(transitions: Transitions, metadata: dict[str, Any]) -> OfflineDataset:
    """Transitions, in whatever order, as a data set of episodes of one row."""
    columns: dict[str, Any] = as_columns(
        transitions.rows[:, :-2].cpu().numpy(), transitions.observation_size, transitions.action_size
    )
    return OfflineDataset(**columns, metadata=metadata)


def of_terminals(dataset: OfflineDataset, real: bool, ends: bool) -> dict[str, str]:
    """The metadata that say whether next observations of terminal rows are stand-ins, in rows generated from `dataset`.

    real: whether its own rows stand before them. ends: whether a generated row is terminal.
    """
    stored = dataset.stand_ins() if real else {}
    if not ends or dataset.has_terminal_next:
        return stored
    both = stored.get("terminal_successors") in (STAND_IN, BOTH_STAND_IN)
    return {"terminal_successors": BOTH_STAND_IN if both else MADE_STAND_IN}
