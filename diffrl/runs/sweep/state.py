"""How far the runs of a sweep are: read from their folders, where alone it stands; and the table of what came out."""

import contextlib
import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffrl.runs.config import TrainConfig
from diffrl.runs.sweep.plan import Sweep, SweepRun
from diffrl.support.console import console
from diffrl.support.errors import UserError, first_line
from diffrl.support.failure import ERROR, error_of
from diffrl.support.files import atomic_path, plain_file, typed
from diffrl.support.folder import steps
from diffrl.support.written import exact, short

Kind = Literal["waiting", "cut", "done", "failed"]
LOG = "log.txt"
"""The file in a run's folder with what all its attempts have said."""
TABLE = "sweep.csv"
"""The file in a sweep's folder with a row an evaluation and seed."""


@dataclass(frozen=True)
class State:
    """How far one run is."""

    kind: Kind
    """waiting: it has no checkpoint yet; cut: it goes on from one; failed: it goes on where that is asked for."""
    step: int = 0
    """The step of its newest checkpoint."""
    error: str = ""
    """Of one that failed, the last line of its error."""


@dataclass(frozen=True)
class Result:
    """The evaluations of one run: their scores, or returns where there is no reference."""

    task: str
    seeds: Sequence[int]
    steps: Sequence[int]
    scores: Sequence[Sequence[float]]
    """One list an evaluation, a number a seed: the mean over its episodes."""
    best: float
    """The mean over seeds of each one's best evaluation."""

    @property
    def last(self) -> float:
        """The mean over seeds of the last evaluation."""
        return sum(self.scores[-1]) / len(self.scores[-1])


def complete(path: Path, total: int) -> bool:
    """Whether a run has made its steps and been evaluated."""
    made = steps(path)
    if not made or made[-1] < total or ((path / "scores.json").is_file() and _evaluations(path) is None):
        return False
    from diffrl.runs.run import Run
    from diffrl.runs.train import unscored

    try:
        return not unscored(Run.read(path), made[-1])[0]
    except UserError:  # going on with it will say what is damaged
        return False


def state_of(folder: Path, run: SweepRun) -> State:
    """How far a run of the sweep in `folder` is."""
    path = folder / run.name
    made = steps(path)
    step = made[-1] if made else 0
    if complete(path, run.config.steps):
        return State("done", step)
    if (path / ERROR).exists():
        return State("failed", step, error_of(path))
    return State("cut" if made else "waiting", step)


def progress(path: Path) -> int:
    """The step of the last row that a run under way has logged, or of its newest checkpoint."""
    made = steps(path)
    logged = 0
    try:
        with plain_file(path / "metrics.csv").open("rb") as file:
            file.seek(max(file.seek(0, 2) - 4096, 0))
            rows = file.read().decode(errors="replace").splitlines()[1:]
        logged = int(rows[-1].partition(",")[0]) if rows else 0
    except (OSError, ValueError):
        pass
    return max(logged, made[-1] if made else 0)


def result_of(folder: Path, run: SweepRun) -> Result | None:
    """What a run's evaluations have shown so far; None where it has none, or its scores are damaged."""
    from diffrl.runs.study.reading import task_name

    path = folder / run.name
    content = _evaluations(path) if (path / "scores.json").is_file() else None
    if content is None:
        return None
    entries = sorted(content["evaluations"], key=lambda entry: int(entry["step"]))
    if not entries:
        return None
    best = [float(each["value"]) for each in content["best"]]
    return Result(
        task_name(run.config),
        run.config.seeds,
        [int(entry["step"]) for entry in entries],
        [[float(value) for value in entry.get("score", entry["mean_return"])] for entry in entries],
        sum(best) / len(best),
    )


def _evaluations(path: Path) -> dict[str, Any] | None:
    """A run's `scores.json`; None where it is damaged, which is said once."""
    from diffrl.support.folder import Damaged, say_once
    from diffrl.training.logs import read_scores

    try:
        return read_scores(path)
    except Damaged as error:
        say_once(
            f"{error.file} {error.why}. Restore it from a copy; else the run goes on without the evaluations in it."
        )
    except UserError as error:
        say_once(first_line(error))
    return None


# --- The tables -----------------------------------------------------------------------------------------------------


def varied(sweep: Sweep) -> list[str]:
    """The fields that `--set` gave more than one value among the runs."""
    keys = list(dict.fromkeys(key for run in sweep.runs for key in run.settings))
    return [key for key in keys if len({exact(run.settings.get(key)) for run in sweep.runs}) > 1]


def setting(run: SweepRun, keys: Sequence[str]) -> str:
    """A run's values of some fields, with all their digits, as `sweep.csv` has them."""
    return " ".join(f"{key}={exact(run.settings[key])}" for key in keys if key in run.settings)


def labels(sweep: Sweep) -> list[str]:
    """What each run's agent is called in `sweep.csv`, so that no two settings of one task are taken for one.

    Its name, and what varies, as in `iql agent.expectile=0.9`; of a search, the trial's place; the configuration's name
    where two that have all of that in common differ in it.
    """
    varying = varied(sweep)
    stems = [(run.unseeded or run.name).partition(",")[0] for run in sweep.runs]
    firsts: dict[tuple[str, Key], SweepRun] = {}
    for run, stem in zip(sweep.runs, stems, strict=True):
        firsts.setdefault((stem, setting_of(run)), run)  # seeds that were added are called as those that are there
    words = [
        f"trial={place}" if run.trial is not None else setting(firsts[stem, setting_of(run)], varying)
        for place, (run, stem) in enumerate(zip(sweep.runs, stems, strict=True))
    ]
    plain = [f"{run.config.agent.name} {word}".strip() for run, word in zip(sweep.runs, words, strict=True)]
    named: dict[tuple[str, str], set[str]] = {}
    for run, label, stem in zip(sweep.runs, plain, stems, strict=True):
        named.setdefault((run.config.dataset, label), set()).add(stem)
    return [
        f"{label} ({stem})" if len(named[run.config.dataset, label]) > 1 else label
        for run, label, stem in zip(sweep.runs, plain, stems, strict=True)
    ]


def write_table(folder: Path, sweep: Sweep) -> Path:
    """Write `sweep.csv`, a row an evaluation and seed: task, agent, seed, step, minutes, score, run, the settings.

    agent: see `labels`. minutes: see `minutes_of`; empty where they are not known.
    """
    from diffrl.runs.study.reading import minutes_of

    keys = list(dict.fromkeys(key for run in sweep.runs for key in run.settings))
    with atomic_path(folder / TABLE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "agent", "seed", "step", "minutes", "score", "run", *keys])
        for run, agent in zip(sweep.runs, labels(sweep), strict=True):
            result = result_of(folder, run)
            if result is None:
                continue
            values = [exact(run.settings[key]) if key in run.settings else "" for key in keys]
            minutes = minutes_of(folder / run.name)
            for step, scores in zip(result.steps, result.scores, strict=True):
                for seed, score in zip(result.seeds, scores, strict=True):
                    time = f"{minutes[step]:.3f}" if step in minutes else ""
                    writer.writerow([result.task, agent, seed, step, time, score, run.name, *values])
    return folder / TABLE


def legend(sweep: Sweep, starred: bool = True) -> str:
    """The line below the table of `summary` that says what is in it. starred: whether a star is."""
    tasks = {task_of(run.config) for run in sweep.runs}
    datasets = {run.config.dataset for run in sweep.runs}
    each = "" if len(tasks) == 1 else " on each data set" if len(tasks) == len(datasets) else " on each task"
    star = f"; *: the best last{each}, of settings that are done with all their seeds" if starred else ""
    return f"last, best: mean over seeds of the last evaluation, and of each seed's best{star}."


def incomparable(folder: Path, run: SweepRun, result: Result) -> str:
    """Why the last score of a run does not say how good its setting is, in a sentence; "" where nothing is known to.

    It has gone on beyond the sweep's steps, the policy that acted was untrained, or seeds have diverged, whose scores
    are those of their last good checkpoints.
    """
    from diffrl.runs.diverged import partly
    from diffrl.runs.run import Run

    step = result.steps[-1]
    if step > run.config.steps:
        return f"Made longer, to {step:,} steps, where this sweep has {run.config.steps:,}."
    with contextlib.suppress(UserError):  # going on with it will say what is damaged
        read = Run.read(folder / run.name)
        return read.untrained(step) or partly(read)
    return ""


def remarks(folder: Path, sweep: Sweep) -> dict[str, str]:
    """By the names of runs whose last scores do not compare, the reason: see `incomparable`."""
    results = [(run, result) for run in sweep.runs if (result := result_of(folder, run)) is not None]
    found = {run.name: incomparable(folder, run, result) for run, result in results}
    return {name: why for name, why in found.items() if why}


def remarked(told: Mapping[str, str]) -> list[str]:
    """The lines below the table on runs that `remarks` has found, one for each reason."""
    names = {why: [name for name in told if told[name] == why] for why in dict.fromkeys(told.values())}
    return [
        f"no star: {', '.join(found[:3])}{f', ... ({len(found):,} in all)' * (len(found) > 3)}: {why}"
        for why, found in names.items()
    ]


Key = tuple[object, ...]
"""What runs of one setting have in common: see `setting_of`."""


def setting_of(run: SweepRun) -> Key:
    """What tells a run from those of other settings, and not from those of other seeds: its configuration without them.

    Names and what `--set` gave do not: seeds that are added later have other names, and a default may be given, too.
    """
    return dataclasses.replace(run.config, seeds=(0,)), run.trial


def rated(
    runs: Sequence[SweepRun], states: Mapping[str, State], results: Mapping[str, Result], told: Mapping[str, str]
) -> float | None:
    """The mean last score of the seeds of one setting, by which it may be the best; None where that is not known.

    It is of a setting whose runs are all done, with scores that compare: what is half trained is no rival of what is
    trained, and those seeds that are left of a setting whose others failed are the lucky ones. results, told: by run,
    see `result_of` and `remarks`. The table of a sweep and what is shown while it runs go by this.
    """
    for run in runs:
        done = run.name in states and states[run.name].kind == "done"
        if not done or run.name not in results or run.name in told:
            return None
    last = mean_last([results[run.name] for run in runs])
    return last if math.isfinite(last) else None


def mean_last(results: Sequence[Result]) -> float:
    """The mean over all seeds of the last evaluations of runs."""
    return sum(result.last * len(result.seeds) for result in results) / sum(len(result.seeds) for result in results)


def task_of(config: TrainConfig) -> tuple[object, ...]:
    """What makes two runs of a sweep ones of the same task."""
    return config.dataset, config.env, tuple(config.env_kwargs), config.max_episode_steps, config.rows


@dataclass(frozen=True)
class Winner:
    """The best setting of a task, as a table has starred it."""

    runs: tuple[SweepRun, ...]
    rivals: int
    """How many settings it is the best of."""


def best_of(folder: Path, sweep: Sweep, states: Mapping[str, State], told: Mapping[str, str]) -> dict[Key, Winner]:
    """By its `setting_of`, the setting of each task that has the best last score; none where several are as good."""
    results = {run.name: result for run in sweep.runs if (result := result_of(folder, run)) is not None}
    lasts: dict[str, list[tuple[float, Key, list[SweepRun]]]] = {}
    for key, runs in by_setting(sweep.runs).items():
        if (last := rated(runs, states, results, told)) is not None:
            lasts.setdefault(results[runs[0].name].task, []).append((last, key, runs))
    found = {}
    for rivals in lasts.values():
        highest = max(last for last, *_ in rivals)
        tops = [(key, runs) for last, key, runs in rivals if last == highest]
        if len(tops) == 1:
            found[tops[0][0]] = Winner(tuple(tops[0][1]), len(rivals))
    return found


def by_setting(runs: Sequence[SweepRun]) -> dict[Key, list[SweepRun]]:
    """The runs that differ in their seeds alone, by `setting_of`."""
    groups: dict[Key, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(setting_of(run), []).append(run)
    return groups


def summary(folder: Path, sweep: Sweep, states: Mapping[str, State], told: Mapping[str, str]) -> list[str]:
    """The lines of the table of a sweep: what was run, how far it is, its last and best scores; * the best of a task.

    Where seeds are runs of their own, runs that differ in them alone are one line, which says of how many seeds its
    means are where not all have been evaluated. Numbers are short, see `short`. For stars see `best_of`. Where the
    lines would be wider than the terminal, and all runs are of one configuration, its name stands above.
    """
    brief, stars = _brief(sweep), best_of(folder, sweep, states, told)
    rows: list[list[str]] = []
    for key, runs in by_setting(sweep.runs).items():
        results = [result for run in runs if (result := result_of(folder, run)) is not None]
        kinds = [states[run.name].kind for run in runs]
        state = kinds[0] if len(set(kinds)) == 1 else f"{kinds.count('done')}/{len(kinds)} done"
        seeds = [seed for run in runs for seed in run.config.seeds]
        behind = sum(len(result.seeds) for result in results)
        cells = ["", ""]
        if results:
            best = sum(result.best * len(result.seeds) for result in results) / behind
            cells = [f"{mean_last(results):z.1f}", f"{best:z.1f}"]
        few = f" (means of {behind})" if 0 < behind < len(seeds) else ""
        stem = runs[0].name.partition(",")[0]
        rows.append(["*" * (key in stars), stem, brief[runs[0].name], *cells, " ".join(map(str, seeds)) + few, state])
    stems = {row[1] for row in rows}
    rows.insert(0, ["", "configuration", "setting", "last", "best", "seeds", "state"])
    lines = aligned(rows)
    if len(stems) == 1 and max(map(len, lines)) > console.width:
        return [*stems, *aligned([[row[0], *row[2:]] for row in rows])]
    return lines


def luck(folder: Path, sweep: Sweep, winners: Mapping[Key, Winner]) -> str:
    """What a starred score is worth, and how to find out, in sentences; "" where no star stands before others.

    The best of several noisy scores is too high: it is chosen for its luck, too (Cawley & Talbot 2010, JMLR 11).
    """
    won = next((winner for winner in winners.values() if winner.rivals > 1), None)
    if won is None:
        return ""
    used = {seed for run in sweep.runs for seed in run.config.seeds}
    n = sum(len(run.config.seeds) for run in won.runs)
    fresh = " ".join(str(max(used) + 1 + i) for i in range(n))
    out = f"{folder if folder.name else folder.resolve()}-winner"  # the configuration names the winner's own folder
    return (
        f"A starred score is the best of {won.rivals} noisy ones, and so too high. Train the winner on fresh seeds and "
        f"take their scores: diffrl train {typed(folder / won.runs[0].name / 'config.yaml')} --seeds {fresh} "
        f"--out {typed(out)}"
    )


def _brief(sweep: Sweep) -> dict[str, str]:
    """By run, the values that vary, as the table shows them: short, and without `agent.` where that is clear."""
    keys = varied(sweep)
    names = [key.removeprefix("agent.") for key in keys]
    found: dict[str, list[str]] = {run.name: [] for run in sweep.runs}
    for key, name in zip(keys, names, strict=True):
        having = [run for run in sweep.runs if key in run.settings]
        texts = short([run.settings[key] for run in having])
        for run, text in zip(having, texts, strict=True):
            found[run.name].append(f"{name if names.count(name) == 1 else key}={text}")
    return {name: " ".join(words) for name, words in found.items()}


def aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of text as lines in columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
