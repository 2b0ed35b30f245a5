"""What a report says, computed once from a table of scores: results, aggregates, comparisons, efficiency, caveats."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.study import statistics
from diffrl.runs.study.protocols import PROTOCOLS, Curve, Protocol, Shared, curve, reached, results, shared
from diffrl.runs.study.scores import SCORE, X100, Note, Scores
from diffrl.runs.study.statistics import Interval
from diffrl.support.errors import counted

FEW, MANY = 5, 12
"""Fewer seeds than these are few; more agents than these are not compared each with each."""
_FRACTIONS = 1.5
"""Scores that are all below this are taken to be fractions of 1, not of 100."""


class Result(NamedTuple):
    """The result of an agent on a task."""

    values: NDArray[np.float64]
    """(S,) a value a seed."""
    mean: float
    error: float
    """The standard error over seeds; nan of a single one."""
    low: float
    high: float
    """Student's 95 % interval of the mean; nan of a single seed."""


class Efficiency(NamedTuple):
    """How soon an agent reached a score on a task."""

    task: str
    agent: str
    target: float
    of: str
    """"own": a share of its own last score; "best": of the highest last score on the task."""
    reached: int
    seeds: int
    steps: float
    """The median over the seeds that reached it; nan where none did."""
    minutes: float


AGGREGATES: Mapping[str, Callable[[statistics.Tasks, float], statistics.Array]] = {
    "IQM": lambda x, target: statistics.iqm(x),
    "median": lambda x, target: statistics.median(x),
    "mean": lambda x, target: statistics.mean(x),
    "optimality gap": statistics.optimality_gap,
}
"""The aggregates of a report, of an agent's scores and the target; of the last one less is better."""


@dataclass(frozen=True)
class Summary:
    """Everything that tables and figures show."""

    scores: Scores
    protocol: Protocol = "last"
    target: float = 100.0
    """The score up to which the optimality gap is measured."""
    fraction: float = 0.9
    """The share of a final score that sample efficiency asks for."""

    @cached_property
    def shared(self) -> Shared:
        """The agents and tasks of the aggregates."""
        return shared(self.scores)

    def results(self, protocol: Protocol) -> dict[tuple[str, str], Result]:
        """By (task, agent), the result by a protocol."""
        return self._results[protocol]

    @cached_property
    def _results(self) -> dict[Protocol, dict[tuple[str, str], Result]]:
        return {protocol: self._by(protocol) for protocol in PROTOCOLS}

    def _by(self, protocol: Protocol) -> dict[tuple[str, str], Result]:
        found = {}
        for key, values in results(self.scores, protocol).items():
            centre, low, high = map(float, statistics.student(values))
            error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
            found[key] = Result(values, centre, error, low, high)
        return found

    @cached_property
    def chosen(self) -> dict[tuple[str, str], Result]:
        """By (task, agent), the result by the report's protocol."""
        return self.results(self.protocol)

    @cached_property
    def curves(self) -> dict[tuple[str, str], Curve]:
        """By (task, agent), the learning curve."""
        return {key: curve(seeds) for key, seeds in self.scores.curves().items()}

    def highest(self, task: str) -> tuple[list[str], bool]:
        """The agents with the highest mean on a task, and whether one's interval is apart from those of all others.

        Several where they tie, up to rounding; none where all do, where an agent is alone, and where one has a single
        seed, as nothing then says how far that mean would be from another seed's.
        """
        of_task = {agent: found for (name, agent), found in self.chosen.items() if name == task}
        if any(len(found.values) == 1 for found in of_task.values()):
            return [], False
        most = max(found.mean for found in of_task.values())
        best = [agent for agent, found in of_task.items() if math.isclose(found.mean, most, rel_tol=1e-12)]
        if len(best) == len(of_task):
            return [], False
        others = [found.high for agent, found in of_task.items() if agent not in best]
        return best, len(best) == 1 and all(of_task[best[0]].low > high for high in others)

    def of_agent(self, agent: str) -> list[NDArray[np.float64]]:
        """An agent's results on the shared tasks, an array (S,) a task."""
        return [self.chosen[task, agent].values for task in self.shared.tasks]

    @cached_property
    def aggregates(self) -> dict[str, dict[str, Interval]]:
        """By agent and aggregate, its value with its interval; {} where agents share no task."""
        if not self.shared.tasks:
            return {}

        def each(x: statistics.Tasks) -> statistics.Array:
            return np.stack([of(x, self.target) for of in AGGREGATES.values()], axis=-1)

        found = {agent: statistics.interval(each, self.of_agent(agent)) for agent in self.shared.agents}
        return {
            agent: {name: Interval(*(part[i] for part in one)) for i, name in enumerate(AGGREGATES)}
            for agent, one in found.items()
        }

    @cached_property
    def ranked(self) -> list[str]:
        """The agents of the aggregates, the highest IQM first."""
        return sorted(self.aggregates, key=lambda agent: -float(self.aggregates[agent]["IQM"].value))

    @cached_property
    def profiles(self) -> tuple[NDArray[np.float64], dict[str, Interval]]:
        """Scores tau (T,), and by agent the share of runs above each, with its interval."""
        if not self.shared.tasks:
            return np.empty(0), {}
        every = np.concatenate([values for agent in self.shared.agents for values in self.of_agent(agent)])
        low, high = min(0.0, float(every.min())), float(every.max())
        taus = np.linspace(low, high + 0.02 * (high - low), 103)
        return taus, {
            agent: statistics.interval(lambda x: statistics.profile(x, taus), self.of_agent(agent), draws=2000)
            for agent in self.ranked
        }

    @cached_property
    def improvements(self) -> list[tuple[str, str, Interval]]:
        """For each two agents, the one of higher IQM first: the probability that the first beats the second.

        Of more than `MANY` agents, the first against each of the others.
        """
        pairs = itertools.combinations(self.ranked, 2)
        return [
            (x, y, statistics.interval(statistics.probability_of_improvement, self.of_agent(x), self.of_agent(y)))
            for x, y in pairs
            if len(self.ranked) <= MANY or x == self.ranked[0]
        ]

    @cached_property
    def efficiency(self) -> list[Efficiency]:
        """How soon agents reached a share of their own last score, and of the highest last score on the task.

        Only of targets above zero: a share of a score below it is easier than the score.
        """
        last, found = self.results("last"), []
        best: dict[str, float] = {}
        for (task, _), of_task in last.items():
            best[task] = max(of_task.mean, best.get(task, of_task.mean))
        for (task, agent), seeds in self.scores.curves().items():
            finals = {"own": last[task, agent].mean, "best": best[task]}
            for of, final in finals.items():
                if final > 0:
                    times = [reached(rows, self.fraction * final) for rows in seeds.values()]
                    there = [time for time in times if not math.isnan(time.step)]
                    steps, minutes = (
                        (float(np.median(values)) if there else math.nan)
                        for values in ([t.step for t in there], [t.minutes for t in there])
                    )
                    found.append(
                        Efficiency(task, agent, self.fraction * final, of, len(there), len(seeds), steps, minutes)
                    )
        return found

    @property
    def fractions(self) -> bool:
        """Whether scores are fractions of 1: all are from files, and the target says so."""
        return 0 < self.target < _FRACTIONS and not self.scores.episodes

    @property
    def digits(self) -> int:
        """Digits behind the point that scores are shown with: three of fractions, else one."""
        return 3 if self.fractions else 1

    @property
    def without_goal(self) -> list[str]:
        """Tasks on which no agent's last score is above zero, so that a share of it is no goal."""
        return [task for task in self.scores.tasks if task not in {one.task for one in self.efficiency}]

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most seeds of an agent on a task."""
        counts = [len(result.values) for result in self.chosen.values()]
        return min(counts), max(counts)

    def caveats(self) -> list[Note]:
        """What limits the report: what a careful reader would ask."""
        notes = self.scores.notes
        if self.fractions:
            notes = tuple(note._replace(sentence=note.sentence.replace(X100, "fractions of 1")) for note in notes)
        return [*self._of_seeds(), *self._of_evaluations(), *grouped(self._of_aggregates()), *grouped(notes)]

    def _of_seeds(self) -> list[Note]:
        fewest, most = self.seeds
        notes = []
        single = sorted({task for (task, _), result in self.chosen.items() if len(result.values) == 1})
        if single:
            said = "One seed of some agents: there is no error, no interval and no emphasis, as there is no spread to "
            none = " Aggregates with such a task have none either." if self.shared.tasks else ""
            notes.append(Note(_named(single), f"{said}take them from.{none}"))
        if most > 1 and fewest < FEW:
            two = " The bootstrap of two seeds runs from one to the other, and holds the true mean half of the time."
            notes.append(
                Note(
                    "Few seeds",
                    f"{fewest if fewest == most else f'{fewest} to {most}'} seeds each. Bootstrap intervals of fewer "
                    f"than {FEW} seeds are too narrow.{two if fewest <= 2 else ''} Student's intervals of single tasks "
                    "allow for the number, if scores are near normal.",
                )
            )
        if fewest != most and self.shared.tasks:
            notes.append(
                Note("Unequal seeds", "In the IQM each run counts the same, so tasks with more seeds count more.")
            )
        return notes

    def _of_evaluations(self) -> list[Note]:
        notes = []
        if gone := self.scores.diverged:
            have = "has" if len(gone) == 1 else "have"
            said = (
                f"{counted(len(gone), 'runs')} diverged before the first evaluation and {have} no score; every figure "
            )
            notes.append(Note("Diverged", f"{said}is of runs that survived: {_named(gone)}."))
        if self.protocol == "best":
            said = "The best evaluation is chosen by the scores that are then reported, so they are too high: the more "
            notes.append(Note("Best", said + "evaluations and the fewer episodes, the more."))
        for (task, agent), seeds in self.scores.curves().items():
            fewest = min(map(len, seeds.values()))
            if self.protocol == "last3" and fewest < 3:
                what = "the last evaluation: there is one" if fewest == 1 else "a mean of all two evaluations"
                notes.append(Note(f"{agent} on {task}", f"last3 is {what}."))
        for task in self.scores.tasks:
            episodes = {a: sorted(self.scores.episodes.get((task, a), ())) for a in self.scores.agents}
            several = {count for counts in episodes.values() for count in counts}
            if len(several) > 1:
                said = (
                    f"Evaluations have {min(several)} to {max(several)} episodes: errors and best scores compare badly."
                )
                notes.append(Note(task, said))
            ends = {
                agent: {rows[-1].step for rows in seeds.values()}
                for (name, agent), seeds in self.scores.curves().items()
                if name == task
            }
            steps = {step for each in ends.values() for step in each}
            if len(steps) > 1:
                said = f"Last evaluations are at {min(steps):,} to {max(steps):,} steps: agents are compared as they "
                notes.append(Note(task, said + "ended."))
        return grouped(notes)

    def _of_aggregates(self) -> list[Note]:
        notes = []
        if tasks := self.without_goal:
            said = "No agent's last score is above zero, so that a share of it is no goal: no sample efficiency."
            notes += [Note(task, said) for task in tasks]
        notes += self._of_data()
        aside = [task for task in self.scores.tasks if task not in self.shared.tasks]
        normalised = [task for task in aside if self.scores.unit(task) == SCORE]
        if not self.shared.tasks:
            some = any(self.scores.unit(task) == SCORE for task in self.scores.tasks)
            why = "No two agents have a normalised task in common." if some else "There is no normalised task."
            notes.append(Note("No aggregates", why))
        elif self.shared.without or normalised:
            agents, tasks, without = self.shared
            what = "it" if len(tasks) == 1 else "all of these"
            said = f"Over {counted(len(tasks), 'tasks')}: {_named(tasks)}. "
            if without:
                said += f"{len(agents)} of {len(self.scores.agents)} agents have {what}, the most that have a task in "
                said += f"common. Left out, as they have not: {_named(without)}."
            else:
                said += f"All agents have {what}."
            notes.append(Note("Aggregates", said))
        of_files = [r for r in self.scores.rows if (r.task, r.agent) not in self.scores.episodes]  # ours are x100
        highest = max((r.score for r in of_files if self.scores.unit(r.task) == SCORE), default=0.0)
        if 0 < highest < _FRACTIONS < self.target:
            said = f"The optimality gap is measured at {self.target:g}; give --target 1."
            if len(of_files) < len(self.scores.rows):
                said = "Those of runs are x100: multiply the files' by 100."
            whose = " from files" * (len(of_files) < len(self.scores.rows))
            notes.append(Note("Scale", f"All scores{whose} are below {_FRACTIONS}: are they fractions? {said}"))
        if len(self.shared.tasks) == 1:
            notes.append(Note("One task", "Aggregates are over a single task: they say nothing of others."))
        return notes

    def _of_data(self) -> list[Note]:
        """On environments whose scores are apart, as tasks, because agents have learned from other data."""
        within: dict[str, list[str]] = {}
        for task, environment in self.scores.environments.items():
            within.setdefault(environment, []).append(task)
        notes = []
        for environment, tasks in within.items():
            agents = [{agent for name, agent in self.chosen if name == task} for task in tasks]
            if any(of_one != agents[0] for of_one in agents):
                said = (
                    f"The scores of {_named(sorted(tasks))} are all of {environment}: --by environment has agents "
                    "of all these data in one column."
                )
                notes.append(Note("Several data sets", said))
        return notes


def grouped(notes: Sequence[Note]) -> list[Note]:
    """The notes, those of one sentence as one."""
    about: dict[str, list[str]] = {}
    for note in notes:
        about.setdefault(note.sentence, []).append(note.about)
    return [Note(_named(list(dict.fromkeys(names))), sentence) for sentence, names in about.items()]


def _named(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def protocol_words(protocol: Protocol) -> str:
    """The protocol as a sentence says it."""
    return f"{protocol}: {PROTOCOLS[protocol]}"
