"""Which evaluations of a run are its result: the last, the best, the mean of the last three; and how soon it got there.

    last    the last evaluation of each seed. Nothing is chosen: it is what a user of the algorithm gets.
    best    the best evaluation of each seed, each at a step of its own, of those whose policy has learned anything in
            the run. It is chosen by the evaluations it is then judged by, so it is too high: the more evaluations and
            the fewer episodes, the more. Diffusion-QL's published "online" scores and CORL's "best" are of this kind.
    last3   the mean of the last three evaluations of each seed (of fewer, where there are no three): less noise than
            the last alone, and nothing is chosen.

A run's score is one number a seed. Means and errors are taken over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffrl.runs.study.scores import Row, Scores

Protocol = Literal["last", "best", "last3"]
PROTOCOLS: Mapping[Protocol, str] = {
    "last": "the last evaluation of each seed",
    "best": "the best evaluation of each seed, chosen by these evaluations themselves, and so too high",
    "last3": "the mean of each seed's last three evaluations, of all where it has fewer",
}
"""What each protocol takes as a seed's result, in words."""


def result(rows: Sequence[Row], protocol: Protocol) -> float:
    """One seed's result by a protocol. rows: its evaluations, one or more, in the order of steps."""
    scores = [row.score for row in rows]
    if protocol == "best":
        return max([row.score for row in rows if row.learned] or scores)
    return float(np.mean(scores[-1:] if protocol == "last" else scores[-3:]))


def results(scores: Scores, protocol: Protocol) -> dict[tuple[str, str], NDArray[np.float64]]:
    """By (task, agent), the results (S,) of its seeds, in the order of seeds."""
    return {
        key: np.array([result(seeds[seed], protocol) for seed in sorted(seeds)])
        for key, seeds in scores.curves().items()
    }


class Reached(NamedTuple):
    """When a seed first reached a score; nan where it never did, minutes also where they are not known."""

    step: float
    minutes: float


def reached(rows: Sequence[Row], target: float) -> Reached:
    """The first evaluation of a seed that scores the target or more. rows: in the order of steps."""
    for row in rows:
        if row.score >= target:
            return Reached(row.step, row.minutes)
    return Reached(math.nan, math.nan)


class Curve(NamedTuple):
    """A learning curve: at each step that all seeds were evaluated at, their scores."""

    steps: NDArray[np.int64]
    """(T,)"""
    minutes: NDArray[np.float64]
    """(T,) the mean over seeds; nan where one is not known."""
    scores: NDArray[np.float64]
    """(S, T)"""


def curve(seeds: Mapping[int, Sequence[Row]]) -> Curve:
    """The learning curve of one agent on one task, at the steps that all its seeds have; there may be none."""
    by_step = [{row.step: row for row in seeds[seed]} for seed in sorted(seeds)]
    steps = sorted(set.intersection(*(set(rows) for rows in by_step)))
    grid = [[rows[step] for step in steps] for rows in by_step]
    minutes = np.array([[row.minutes for row in rows] for rows in grid]).reshape(len(grid), len(steps))
    values = np.array([[row.score for row in rows] for rows in grid]).reshape(len(grid), len(steps))
    return Curve(np.array(steps, np.int64), minutes.mean(0), values)


def time_unit(minutes: ArrayLike) -> tuple[Literal["seconds", "minutes"], float]:
    """The unit that times, in minutes, are shown in, and how many of it a minute has; nan: one that is not known."""
    known = np.asarray(minutes, np.float64)
    known = known[np.isfinite(known)]
    return ("seconds", 60.0) if known.size and known.max() < 2 else ("minutes", 1.0)


class Shared(NamedTuple):
    """What can be aggregated: agents, and the tasks that all of them have."""

    agents: list[str]
    tasks: list[str]
    without: list[str]
    """Agents that are left out, as they lack one of these tasks."""


def shared(scores: Scores) -> Shared:
    """The most agents that have a normalised task in common, and all such tasks that these have in common.

    Of several such groups it is the one with most tasks, then the one whose tasks come first. An aggregate over other
    tasks for each agent would compare tasks, not agents. Where no two of several agents have a task in common, nothing
    compares, and no agent and no task is given.
    """
    has: dict[str, set[str]] = {agent: set() for agent in scores.agents}
    for row in scores.rows:
        if scores.unit(row.task) == "score":
            has[row.agent].add(row.task)
    groups = []
    for task in sorted(set().union(*has.values())):
        agents = [agent for agent in scores.agents if task in has[agent]]
        groups.append((agents, sorted(set.intersection(*(has[agent] for agent in agents)))))
    agents, tasks = max(groups, key=lambda group: (len(group[0]), len(group[1])), default=([], []))
    if len(agents) < min(2, len(has)):
        agents, tasks = [], []
    return Shared(agents, tasks, [agent for agent in scores.agents if agent not in agents])
