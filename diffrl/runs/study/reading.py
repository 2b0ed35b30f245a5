"""Runs' folders read into the table of scores: what they are called, what sets them apart, what is to be known."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents import Absent
from diffrl.runs.config import MACHINE, TrainConfig
from diffrl.runs.diverged import diverged, wholly
from diffrl.runs.kind import OFFLINE, kind_of
from diffrl.runs.run import Run
from diffrl.runs.study.config import By
from diffrl.runs.study.scores import RETURN, SCORE, Note, Row, Scores, twice
from diffrl.runs.unchanged import unchanged_until
from diffrl.support.errors import UserError, joined
from diffrl.support.failure import error_of
from diffrl.support.files import typed
from diffrl.support.folder import IMAGES, Damaged, mends_scores, recorded
from diffrl.support.written import exact, short
from diffrl.training import logs
from diffrl.training.logs import read_scores
from diffrl.tuning.distil_config import DISTIL
from envs import registry
from envs.datasets import called
from envs.ogbench import names as ogbench
from envs.task import benchmark_family, scaled_by_others

_NOT_SETTINGS = (
    *("dataset", "env", "env_kwargs", "max_episode_steps", "rows", "seeds", "eval_every", "eval_episodes"),
    *("log_every", "tf32", *MACHINE),
)
"""Fields of a run's configuration that make no other agent: the task's, and those that no result depends on."""


class Diverged(UserError):
    """A run that diverged before its first evaluation."""

    def __init__(self, text: str, folder: str) -> None:
        super().__init__(text)
        self.folder = folder


@dataclass(frozen=True)
class _Read:
    """A run's folder as it was read."""

    path: str
    run: Run
    task: str
    agent: str
    settings: Mapping[str, Any]
    """Everything that the result depends on, apart from task and seed, by dotted name."""
    seeds: Sequence[int]
    scores: Mapping[str, Any]
    """The run's `scores.json`."""

    @property
    def unit(self) -> str:
        return SCORE if "score" in self.scores["evaluations"][0] else RETURN

    def setting(self, name: str) -> Any:
        """The value of a setting; "-" where the run has none of that name."""
        return self.settings.get(name, "-")

    @property
    def last(self) -> int:
        """The step of the last evaluation."""
        return max(int(entry["step"]) for entry in self.scores["evaluations"])


def read_runs(folders: Sequence[str], absent: Sequence[str] = (), by: By = "data", acting: bool = False) -> Scores:
    """The scores of runs' folders: see `Scores.of_runs`. absent: sentences on runs that have no folder to read."""
    read, left_out, gone = [], [*absent], []
    for folder in folders:
        try:
            read.append(_read(folder, acting))
        except UserError as error:
            left_out.append(f"Left out: {error}")
            if isinstance(error, Diverged):
                gone.append(error.folder)
    if not read:
        more = f" {len(left_out) - 1} more could not be used." if len(left_out) > 1 else ""
        why = left_out[0].removeprefix("Left out: ") if left_out else "No folder was given."
        raise UserError(f"No run has scores to report. {why}{more}")
    read = _default_tasks_joined(read)
    environments = _environments(read)
    if by == "environment":
        read, notes = _by_environment(read, environments)
        within = {}
    else:
        read, notes = _tell_data_apart(read), []
        within = {one.task: environments[one.path] for one in read}
    names = _agent_names(read)
    rows: dict[tuple[str, str, int, int], Row] = {}
    owners: dict[tuple[str, str, int], str] = {}
    units: dict[str, str] = {}
    episodes: dict[tuple[str, str], set[int]] = {}
    for one in read:
        agent = names[one.path]
        if units.setdefault(one.task, one.unit) != one.unit:
            raise UserError(f"{one.path} has {one.unit}s on {one.task}, other runs have not: they do not compare.")
        minutes, unchanged = minutes_of(Path(one.path)), unchanged_until(one.run)
        learned = any(entry["step"] > unchanged for entry in one.scores["evaluations"])
        for i, seed in enumerate(one.seeds):
            owner = owners.setdefault((one.task, agent, seed), one.path)
            for entry in one.scores["evaluations"]:
                row = Row(
                    one.task,
                    agent,
                    seed,
                    entry["step"],
                    minutes.get(entry["step"], math.nan),
                    float(entry.get("score", entry["mean_return"])[i]),
                    one.path,
                    not learned or entry["step"] > unchanged,
                )
                if owner != one.path:
                    raise UserError(twice(row, owner, one.path))
                if not math.isfinite(row.score):
                    raise UserError(
                        f"{one.path}: the {one.unit} of seed {seed} at step {row.step:,} is {row.score}, no finite "
                        "number. Leave the run out, and say so."
                    )
                rows[row[:4]] = row
                episodes.setdefault((one.task, agent), set()).add(len(entry["returns"][i]))
    varying = _varying(read)
    settings = {
        names[one.path]: " ".join(f"{name}={exact(one.setting(name))}" for name in varying[one.agent]) for one in read
    }
    published = by == "data"  # what is published is of data sets
    algorithms = {
        names[one.path]: one.run.config.agent.name if one.run.kind == OFFLINE and published else "" for one in read
    }
    return Scores(
        tuple(rows.values()),
        units,
        episodes,
        (*notes, *_notes(read, by)),
        tuple(left_out),
        algorithms,
        tuple(gone),
        settings,
        within,
    )


def _read(folder: str, acting: bool) -> _Read:
    """A run's folder. Raises UserError where it is damaged, of images, or has no evaluation; Diverged where so why."""
    path = Path(folder)
    if kind_of(path) == IMAGES:
        raise UserError(f"{path} is a fine-tuning run of an image model: `diffrl compare {typed(path)}` shows it.")
    run = Run.read(path, absent=not acting)
    try:
        scores = read_scores(path) if (path / "scores.json").exists() else {"evaluations": []}
    except Damaged as error:
        raise UserError(f"{error.file} {error.why}. Restore it from a copy; else {mends_scores(path)}") from error
    if not scores["evaluations"]:
        if said := diverged(run):
            raise Diverged(f"{path} has no evaluations. {said}", folder)
        if "scores.json" in recorded(path):
            raise UserError(f"{path} has lost its scores.json. {mends_scores(path)}")
        why = "its data have no environment (--env ID)" if run.task.env_id is None else "none was made yet"
        if failed := error_of(path):
            why = f"it failed: {failed.rstrip('.')}"
        raise UserError(f"{path} has no evaluations: {why}.")
    if acting and run.task.reference is not None:  # what scores are made of only the package knows whose data it has
        try:
            registry.get(run.task.reference)
        except UserError as error:
            raise UserError(f"{path} has scores of a task that is not known here. {error}") from error
    seeds = list(run.config.seeds)
    if len(scores["evaluations"][0]["returns"]) != len(seeds):
        raise UserError(f"{path} is damaged: its scores are not of its {len(seeds)} seeds. Restore it from a copy.")
    return _Read(folder, run, task_name(run.config), run.agent_name, _settings(run), seeds, scores)


def task_name(config: TrainConfig) -> str:
    """The data set, and what was asked for on the command line that makes it another task."""
    parts = [f"in {config.env}"] if config.env is not None and config.env != config.dataset else []
    parts += [*config.env_kwargs, *([f"{config.max_episode_steps} steps"] if config.max_episode_steps else [])]
    parts += [f"first {config.rows:,} rows"] if config.rows is not None else []
    return f"{called(config.dataset)} ({', '.join(parts)})" if parts else called(config.dataset)


def _data_name(config: TrainConfig) -> str:
    """The data set, and how many of its rows were asked for."""
    return called(config.dataset) + (f" (first {config.rows:,} rows)" if config.rows is not None else "")


def _settings(run: Run) -> dict[str, Any]:
    """What a run's results depend on apart from data, environment and seed, by dotted name."""
    tree: dict[str, Any] = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in _NOT_SETTINGS}
    if run.settings is not None:
        kept = {k: v for k, v in run.settings.items() if k not in ("offline_run", "start_run", "policy")}
        tree[run.kind] = kept
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        else:
            flat[name.removeprefix("agent.")] = value

    add("", tree)
    return flat


def _default_tasks_joined(read: Sequence[_Read]) -> list[_Read]:
    """The runs, with one name for a task of OGBench's that they call by two, its number and the default task's."""
    names: dict[str, set[str]] = {}
    for one in read:
        with contextlib.suppress(UserError):
            if (meant := ogbench.parse(one.run.config.dataset)) is not None:
                names.setdefault(repr(meant), set()).add(one.run.config.dataset)
    shorter = {name: min(alike, key=len) for alike in names.values() for name in alike}

    def renamed(one: _Read) -> _Read:
        config = dataclasses.replace(one.run.config, dataset=shorter[one.run.config.dataset])
        return dataclasses.replace(one, run=dataclasses.replace(one.run, config=config), task=task_name(config))

    return [renamed(one) if one.run.config.dataset in shorter else one for one in read]


def _benchmark(name: str) -> registry.Benchmark | None:
    """The benchmark of an id; None where it is of a package that is not here, or cannot be used."""
    with contextlib.suppress(UserError):
        return registry.get(name)
    return None


def _environments(read: Sequence[_Read]) -> dict[str, str]:
    """By folder, the environment that its scores are of; with the references, where several normalise in it.

    Data sets of one environment whose references are the same, as D4RL's of hopper, have the same scores.
    """
    found: dict[str, tuple[str, object, str]] = {}
    for one in read:
        scale: object = None
        if (name := one.run.task.reference) is not None:
            benchmark = _benchmark(name)
            scale = name if benchmark is None else (benchmark.scored_by, benchmark.ref_min, benchmark.ref_max)
        scored = "returns" if name is None else f"scored as {benchmark_family(name)}"
        found[one.path] = str(one.run.task.spec), scale, scored
    scales: dict[str, set[object]] = {}
    for text, scale, _ in found.values():
        scales.setdefault(text, set()).add(scale)
    return {path: text if len(scales[text]) == 1 else f"{text}, {scored}" for path, (text, _, scored) in found.items()}


def _by_environment(read: Sequence[_Read], environments: Mapping[str, str]) -> tuple[list[_Read], list[Note]]:
    """The runs with their environments as tasks and the names of their data in those of agents; and notes on it.

    environments: by folder. A note says where runs of an agent on several data sets have other settings, too.
    """
    named = _tell_data_apart([dataclasses.replace(one, task=_data_name(one.run.config)) for one in read])
    alike: dict[tuple[str, str], list[_Read]] = {}
    for one in named:
        alike.setdefault((environments[one.path], one.agent), []).append(one)
    notes = []
    for (environment, agent), runs in alike.items():
        by_data: dict[str, dict[str, set[str]]] = {}
        for one in runs:
            values = by_data.setdefault(one.task, {})
            for name in {name for other in runs for name in other.settings}:
                values.setdefault(name, set()).add(exact(one.setting(name)))
        first = next(iter(by_data.values()))
        other = sorted(name for name in first if any(values[name] != first[name] for values in by_data.values()))
        if other:
            said = f"Its runs on {joined(sorted(by_data))} differ in {joined(other)}, too, and not in their data alone."
            notes.append(Note(f"{agent} in {environment}", said))
    return [
        dataclasses.replace(one, task=environments[one.path], agent=f"{one.agent} on {one.task}") for one in named
    ], notes


def _tell_data_apart(read: Sequence[_Read]) -> list[_Read]:
    """The runs, with the beginning of the data's digest in the task's name where one name has several data sets."""
    prints: dict[str, set[str]] = {}
    for one in read:
        prints.setdefault(one.task, set()).add(one.run.fingerprint)
    return [
        one
        if len(prints[one.task]) == 1
        else dataclasses.replace(one, task=f"{one.task} [data {one.run.fingerprint[:6]}]")
        for one in read
    ]


def _agent_names(read: Sequence[_Read]) -> dict[str, str]:
    """By folder, the agent's name; with the settings that runs of it on one task do not share, such as `iql tau=0.9`.

    What differs between tasks alone, as published settings do, sets nothing apart. Numbers are shortened to what tells
    runs apart, and of steps those that were made are said.
    """
    varying = _varying(read)
    whole = {one.path: [(name, exact(one.setting(name))) for name in varying[one.agent]] for one in read}
    alike: dict[tuple[object, ...], list[_Read]] = {}
    for one in read:
        alike.setdefault((one.agent, *whole[one.path]), []).append(one)
    found: dict[str, str] = {}
    for runs in alike.values():
        agent = runs[0].agent
        words = [agent]
        for name, value in whole[runs[0].path]:
            values = [one.setting(name) for one in read if one.agent == agent]
            brief = dict(zip(map(exact, values), short(values), strict=True))
            words.append(f"{name}={_made(runs) if name == 'steps' else brief[value]}")
        found |= dict.fromkeys((one.path for one in runs), " ".join(words))
    return found | _teachers_apart(read, found)


def _varying(read: Sequence[_Read]) -> dict[str, list[str]]:
    """By agent, the settings that runs of it on one task do not share."""
    varying: dict[str, set[str]] = {}
    for one in read:
        peers = [other for other in read if (other.agent, other.task) == (one.agent, one.task)]
        names = {name for other in peers for name in other.settings}
        varying.setdefault(one.agent, set()).update(
            name for name in names if len({exact(other.setting(name)) for other in peers}) > 1
        )
    return {agent: sorted(names) for agent, names in varying.items()}


def _made(runs: Sequence[_Read]) -> str:
    """The steps that runs of one agent are for, behind those of their last evaluations where these are fewer."""
    wanted = runs[0].run.config.steps
    ends = [one.last for one in runs]
    if min(ends) >= wanted:
        return str(wanted)
    return f"{min(ends)}{f' to {max(ends)}' if max(ends) > min(ends) else ''} of {wanted}"


def _teachers_apart(read: Sequence[_Read], names: Mapping[str, str]) -> dict[str, str]:
    """By folder, the names of students that nothing sets apart but their teachers' runs, with these runs' names.

    Students of several teachers that have no seed in common are left as they are: seeds of one agent.
    """
    students = [one for one in read if one.run.kind == DISTIL]
    found = {}
    for one in students:
        alike = [o for o in students if (o.task, names[o.path]) == (one.task, names[one.path])]
        if any(_teacher(o) != _teacher(one) and set(o.seeds) & set(p.seeds) for o in alike for p in alike if o != p):
            found[one.path] = f"{names[one.path]} of {_teacher(one)}"
    return found


def _teacher(student: _Read) -> str:
    """The name of the folder of a student's teacher."""
    return Path(str((student.run.settings or {}).get("start_run", ""))).name


def _notes(read: Sequence[_Read], by: By = "data") -> list[Note]:
    """What is to be known: tasks that are not the benchmark's own, rebuilt environments, runs that were cut."""
    notes = []
    for task in dict.fromkeys(one.task for one in read):
        of_task = [one for one in read if one.task == task]
        about = of_task[0].run.task
        if about.reference is not None and _benchmark(about.reference) is None:
            why = "is not installed here, or cannot be used: scores are as its runs have written them"
            notes.append(Note(task, f"The package whose benchmark is {about.reference} {why}."))
            continue
        if of_task[0].unit == RETURN:
            notes.append(Note(task, "Plain returns, as there are no reference scores: it is in no aggregate."))
        elif about.scored_by_success and any(not one.run.task.comparable for one in of_task):
            said = "The share of episodes that succeed, x100; data or environment are not the benchmark's own."
            notes.append(Note(task, said))
        elif any(not one.run.task.comparable for one in of_task):
            notes.append(Note(task, scaled_by_others(about.reference or task)))
        if of_task[0].unit == SCORE and about.fidelity:
            notes.append(Note(task, about.fidelity))
        for name in dict.fromkeys(one.run.config.dataset for one in of_task):
            with contextlib.suppress(UserError):  # of a package that is broken, or not here
                if registry.known(name) and (said := registry.get(name).note):
                    notes.append(Note(name if by == "environment" else task, said))
    for one in read:
        if isinstance(agent := one.run.config.agent, Absent):
            which = f" ({one.run.package})" if one.run.package else ""
            why = "is not installed here, or cannot be used: its settings are told as its config.yaml has them."
            notes.append(Note(one.path, f"The package of its agent, {agent.name}{which}, {why}"))
        last, wanted = one.last, one.run.config.steps
        if said := diverged(one.run):
            notes.append(Note(one.path, said))
        if last < wanted:
            begins = "The" if wholly(one.run) else "Not finished: the"
            notes.append(Note(one.path, f"{begins} last evaluation is at step {last:,} of {wanted:,}."))
        own = logs.Scores(Path(one.path), {logs.UNCHANGED: unchanged_until(one.run)})
        for which, step in (("last", last), ("best", min(own.best_steps()))):
            if untrained := one.run.untrained(step):
                notes.append(Note(one.path, f"Its {which} evaluation is at step {step:,}. {untrained}"))
                break  # where the last one's is untrained, the best one's is, too
        if equal := own.all_equal():
            notes.append(Note(one.path, equal))
    return notes


def minutes_of(path: Path) -> dict[int, float]:
    """By step, the minutes that a run had worked when it first logged that step; {} where no times are kept.

    They are in TensorBoard's events, a file for each time that the run was started or resumed; time between the files,
    in which nothing ran, does not count. Evaluations that training waits for do.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[int, float] = {}
    before = 0.0
    for file in sorted((path / "tensorboard").glob("events.out.tfevents.*")):
        if not file.is_file():
            continue
        begin = now = math.nan
        try:
            for record in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(record)
                begin = event.wall_time if math.isnan(begin) else begin
                now = event.wall_time
                if event.step not in found:
                    found[event.step] = (before + now - begin) / 60
        except Exception:
            pass
        if not math.isnan(begin):
            before += now - begin
    return found
