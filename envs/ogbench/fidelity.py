"""How a rebuilt data set is known to be like OGBench's, whose own file nobody here has seen.

What is checked: the numbers of episodes and rows, how often the arm touches something, how often each task is solved
by chance, how often the oracle met its target, and an episode made again by the wheel's own environment, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.columns import open_table
from diffrl.data.offline import OfflineDataset
from envs.ogbench import generation, oracles, reading, worlds
from envs.ogbench.names import Name
from envs.ogbench.parts import TRAIN, VALIDATION

CONTACT = 18
"""The observation's dimension that says how hard the gripper touches something, where there is an arm."""


@dataclass(frozen=True)
class Replay:
    """An episode of a file made again by the wheel's environment, from its seed and its stored actions."""

    episode: int
    rows: int
    equal: int
    """Of the rows, how many are equal bit for bit, up to the first that is not."""


def lines(name: Name, path: Path, dataset: OfflineDataset) -> Iterator[str]:
    """What is known of a file, a sentence each. dataset: its transitions."""
    lengths, whole = _lengths_of(name, path), name.whole.episodes
    if name.validation:
        whole = generation.validation_episodes(whole)
    usual = lengths == name.rows
    yield (
        f"{len(lengths):,} of OGBench's {whole:,} episodes; {usual.sum():,} have its {name.rows:,} rows, of which the "
        "last has no successor"
    )
    if not name.world.maze:
        share = (dataset.observations[:, CONTACT] > 0).mean()
        yield f"the gripper touches something in {share:.1%} of the rows"
    if name.world.maze or name.has_oracle:
        solved = reading.solved_by_task(name, path)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        each = ", ".join(
            f"task {task} {marks.mean():.2%} ({(np.add.reduceat(marks.astype(int), starts) > 0).mean():.0%})"
            for task, marks in solved.items()
        )
        yield f"rows in which a task is solved (episodes that have one): {each}"
    if "oracle" in dataset.metadata:
        yield f"the oracle {dataset.metadata['oracle']}"
    if "rebuilt" in dataset.metadata:
        again = replayed(name, path)
        here = [f"{package} {version(package)}" for package in ("mujoco", "ogbench")]
        yield (
            f"episode {again.episode}, made again here from its seed and actions by the wheel's environment "
            f"({', '.join(here)}): {again.equal:,} of {again.rows:,} rows are equal bit for bit"
        )


def recordings(name: Name, path: Path, dataset: OfflineDataset) -> OfflineDataset | None:
    """The rows with the ends of the recordings alone; None where no row of them solves a task, and ends an episode."""
    if not dataset.terminals.any():
        return None
    last = np.cumsum(_lengths_of(name, path) - 1) - 1
    timeouts = np.zeros(len(dataset), np.bool_)
    timeouts[last[(last >= 0) & (last < len(dataset))]] = True
    return replace(dataset, terminals=np.zeros(len(dataset), np.bool_), timeouts=timeouts)


def _lengths_of(name: Name, path: Path) -> NDArray[np.int64]:
    """(E,) the rows of the episodes that a data set takes from a file."""
    lengths = _lengths(path)
    return lengths[: reading.episodes_of(name)] if name.small else lengths


def _lengths(path: Path) -> NDArray[np.int64]:
    """(E,) the rows of a file's episodes."""
    with open_table(path) as table:
        column = table.get("terminals")
        assert column is not None
        ends = table.read(column).astype(np.bool_)
    ends[-1] = True
    return np.diff(np.flatnonzero(ends), prepend=-1)


def replayed(name: Name, path: Path, episode: int = 0) -> Replay:
    """Make an episode of one of our files again, from its seed and its stored actions, with the wheel alone.

    No oracle is asked, but in the teleport maze, which draws random numbers itself: there all of it is made again.
    """
    columns, about = _episode(path, episode)
    seed = generation.episode_seed(int(about["seed"]), VALIDATION if name.validation else TRAIN, episode)
    n = len(columns["actions"])
    with closing(worlds.make_collector(name.world, n)) as env:
        if name.world.name == "pointmaze-teleport" or about["attempts"][episode] > 1:
            made = oracles.collect(env, name, seed, n).columns
        else:
            made = _stepped(env, name, seed, columns["actions"])
    equal = np.ones(n, np.bool_)
    for key, values in made.items():
        equal &= (columns[key] == values).reshape(n, -1).all(axis=1)
    return Replay(episode, n, n if equal.all() else int(np.argmin(equal)))


def _stepped(env: worlds.Seeded, name: Name, seed: int, actions: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The rows that actions lead through from the start that a seed decides."""
    rows: dict[str, list[Any]] = {}
    with env.random.lent():
        observation = oracles.begin(env, name, seed)
        for action in actions:
            following, _, _, _, info = env.step(action)
            row = {"observations": observation} | {k: info[f"prev_{k}"] for k in oracles.STEPS if f"prev_{k}" in info}
            for key, value in row.items():
                rows.setdefault(key, []).append(np.asarray(value, np.float32))
            observation = following
    return {key: np.stack(values) for key, values in rows.items()}


def _episode(path: Path, episode: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The rows of an episode, and the file's metadata as arrays."""
    ends = np.cumsum(_lengths(path))
    start, stop = int(ends[episode - 1]) if episode else 0, int(ends[episode])
    with open_table(path) as table:
        names = [key for key in ("observations", "actions", *oracles.STEPS) if table.get(key) is not None]
        columns = {}
        for key in names:
            column = table.get(key)
            assert column is not None
            columns[key] = table.read(column, stop)[start:]
        about = {key.partition("/")[2]: table.read(column) for key, column in table.below("metadata").items()}
    return columns, about
