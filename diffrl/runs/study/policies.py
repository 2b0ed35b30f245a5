"""Trained policies with the scores of their episodes: read from runs' folders, or from a CSV file of episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.run import Run
from diffrl.runs.study.config import Which
from diffrl.runs.study.scores import RETURN, SCORE, Row, Scores, cells_of_csv, number
from diffrl.runs.study.summary import grouped
from diffrl.support.errors import UserError
from diffrl.support.remote import local_file, local_folder
from diffrl.support.schema import several_paths
from diffrl.training.logs import outcomes_of, read_scores, returns_of

COLUMNS = ("task", "agent", "seed", "episode")
"""Columns of a CSV file of episodes, beside `score` or `return`; `step` is read where it is there."""


@dataclass(frozen=True)
class Policy:
    """A trained policy, and how it did."""

    task: str
    agent: str
    """The algorithm: policies of one compete with each other, whatever their settings."""
    name: str
    """The agent, its settings where they differ, seed and step."""
    seed: int
    step: int
    """Training steps made; -1: not known."""
    episodes: NDArray[np.float64]
    """(E,) normalised scores x100, or returns, of its online evaluation."""
    run: Path | None = None
    """The run's folder; None: from a file."""

    @property
    def truth(self) -> float:
        """The mean over its episodes: what an estimate of its value is measured by."""
        return float(self.episodes.mean())


@dataclass(frozen=True)
class Policies:
    """Policies, and what their scores are."""

    all: tuple[Policy, ...]
    units: dict[str, str]
    """By task: "score" (normalised, x100) or "return"."""
    left_out: tuple[str, ...] = ()
    """Sentences on what was found and not read."""
    notes: tuple[str, ...] = ()
    """Sentences on what is to be known of tasks and policies."""

    @property
    def tasks(self) -> list[str]:
        """The tasks in alphabetical order."""
        return sorted({policy.task for policy in self.all})

    def of(self, task: str, agent: str | None = None) -> list[Policy]:
        """The policies of a task, or of one agent on it."""
        return [p for p in self.all if p.task == task and agent in (None, p.agent)]

    def agents(self, task: str) -> list[str]:
        """The algorithms with a policy on a task, in alphabetical order."""
        return sorted({policy.agent for policy in self.of(task)})

    @classmethod
    def of_runs(cls, paths: Path | str | Sequence[Path | str], which: Which = "last") -> "Policies":
        """The policies of runs: folders, or folders that contain such. Raises UserError as `Scores.of_runs` does."""
        scores = Scores.of_runs([local_folder(path) for path in several_paths(paths, "paths")], acting=True)
        last: dict[tuple[str, str, int], Row] = {row[:3]: row for row in scores.rows}  # rows are in order of steps
        rows = scores.rows if which == "all" else [row for row in scores.rows if last[row[:3]] is row]
        found, opened, entries = [], {}, {}
        for row in rows:
            if row.run not in opened:
                opened[row.run] = Run.read(row.run)
                entries[row.run] = {entry["step"]: entry for entry in read_scores(Path(row.run))["evaluations"]}
            run = opened[row.run]
            place = list(run.config.seeds).index(row.seed)
            outcomes = outcomes_of(entries[row.run][row.step])[place : place + 1]
            scored = run.task.score(outcomes) if scores.unit(row.task) == SCORE else returns_of(outcomes)
            episodes = scored[0]
            name = f"{row.agent}, seed {row.seed}, step {row.step:,}"
            agent = run.config.agent.name
            found.append(Policy(row.task, agent, name, row.seed, row.step, episodes, Path(row.run)))
        units = {task: scores.unit(task) for task in scores.tasks}
        notes = tuple(f"{note.about}: {note.sentence}" for note in grouped(scores.notes))
        return cls(tuple(found), units, scores.left_out, notes)

    @classmethod
    def of_csv(cls, path: Path | str) -> "Policies":
        """The policies in a CSV file with a header: task, agent, seed, episode and score (or return), perhaps step.

        A row an episode, in any order; commas, semicolons or tabs separate. Raises UserError, with the line's number,
        at the first row that is wrong.
        """
        path = local_file(path)
        found: dict[tuple[str, str, int, int], dict[int, float]] = {}
        value = SCORE
        for line, cells in cells_of_csv(path, "a CSV file of episodes (UTF-8)", COLUMNS, (SCORE, RETURN)):
            where, value = f"{path}, line {line}", SCORE if SCORE in cells else RETURN
            seed, episode = (int(number(where, name, cells[name], whole=True)) for name in ("seed", "episode"))
            step = int(number(where, "step", cells["step"], whole=True)) if cells.get("step") else -1
            policy = found.setdefault((cells["task"], cells["agent"], seed, step), {})
            if episode in policy:
                raise UserError(f"{where}: episode {episode} of this policy is there twice.")
            policy[episode] = number(where, value, cells[value])
        if not found:
            raise UserError(f"{path} has a header and no rows; expected one row an episode.")
        policies = [
            Policy(task, agent, f"{agent}, seed {seed}{f', step {step:,}' if step >= 0 else ''}", seed, step, values)
            for (task, agent, seed, step), episodes in sorted(found.items())
            for values in [np.array([episodes[number] for number in sorted(episodes)])]
        ]
        return cls(tuple(policies), dict.fromkeys(sorted({task for task, *_ in found}), value))
