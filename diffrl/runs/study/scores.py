"""The one table that reports, selection and benchmarks share: a row an evaluation, of runs or of a CSV file."""

import contextlib
import csv
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from diffrl.runs.kind import lacking
from diffrl.runs.study.config import By
from diffrl.runs.sweep import plan
from diffrl.support.errors import UserError, listed, said_by, shown
from diffrl.support.failure import error_of
from diffrl.support.files import read_text
from diffrl.support.folder import ABOUT, SWEEP
from diffrl.support.remote import local_file, local_folder
from diffrl.support.schema import several_paths

COLUMNS = ("task", "agent", "seed", "step", "score")
"""Columns that a CSV file of scores has; it may have `minutes` too, and others, which are not read."""
X100 = "normalised, x100"
"""What scores of files are taken to be, as the note on them says it."""
SCORE, RETURN = "score", "return"
"""What a task's values are: normalised scores x100, or plain returns where there are no references."""


class Row(NamedTuple):
    """One evaluation of one seed."""

    task: str
    """The data set; with another environment or fewer rows than its own, these too. Or an environment, by `of_runs`."""
    agent: str
    """The algorithm; where runs of it have other settings on one task, with those that differ. Where tasks are
    environments, with its data."""
    seed: int
    step: int
    """Training steps made; of runs that act in an environment, its steps."""
    minutes: float
    """Minutes that the run, all its seeds, had worked when the step was logged; nan: not known."""
    score: float
    """The mean over the evaluation's episodes: a normalised score x100, or a return (`Scores.units`)."""
    run: str = ""
    """The run's folder, or the CSV file."""
    learned: bool = True
    """Whether the policy has learned anything in the run: what it began with is none of its best."""


class Note(NamedTuple):
    """What a reader of scores should know."""

    about: str
    """A task, or a run's folder."""
    sentence: str


@dataclass(frozen=True)
class Scores:
    """All evaluations of some runs, in the order of task, agent, seed and step."""

    rows: tuple[Row, ...]
    units: Mapping[str, str] = field(default_factory=dict)
    """By task, what its scores are: "score" or "return"; what is not named is a score."""
    episodes: Mapping[tuple[str, str], Collection[int]] = field(default_factory=dict)
    """By task and agent, the episodes an evaluation of a seed; known of runs alone."""
    notes: tuple[Note, ...] = ()
    """What a reader of the scores should know of tasks and runs."""
    left_out: tuple[str, ...] = ()
    """Folders that were found and not read, each with the reason: a sentence each."""
    algorithms: Mapping[str, str] = field(default_factory=dict)
    """By agent, the bare name of what trained it alone, on data, such as iql of `iql tau=0.9`; "": something more did,
    as with students and what is fine-tuned. Known of runs; of a file's agents it is what stands before settings."""

    diverged: tuple[str, ...] = ()
    """The folders of runs that diverged before their first evaluation, and so have no score."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """By agent, the settings that its name has, with whole values. Known of runs."""

    environments: Mapping[str, str] = field(default_factory=dict)
    """By task that is a data set, the environment whose scores it has; known of runs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row[:4])))

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks, in alphabetical order."""
        return sorted({row.task for row in self.rows})

    @cached_property
    def agents(self) -> list[str]:
        """The agents, in alphabetical order."""
        return sorted({row.agent for row in self.rows})

    def unit(self, task: str) -> str:
        """What a task's scores are: "score" (normalised, x100) or "return"."""
        return self.units.get(task, SCORE)

    def algorithm(self, agent: str) -> str:
        """The algorithm whose published scores an agent's stand beside; "": none's."""
        named = re.fullmatch(r"([^\s,]+)( [\w.]+=.*)?", agent)
        return self.algorithms.get(agent, named[1] if named else "")

    def curves(self) -> dict[tuple[str, str], dict[int, list[Row]]]:
        """The evaluations by (task, agent) and then by seed, each list in the order of steps."""
        return self._curves

    @cached_property
    def _curves(self) -> dict[tuple[str, str], dict[int, list[Row]]]:
        found: dict[tuple[str, str], dict[int, list[Row]]] = {}
        for row in self.rows:
            found.setdefault((row.task, row.agent), {}).setdefault(row.seed, []).append(row)
        return found

    def with_others(self, other: "Scores") -> "Scores":
        """These scores and others together. Raises UserError where both have an evaluation of one task, agent, seed."""
        theirs = {row[:3]: row for row in other.rows}
        for row in self.rows:
            if (twin := theirs.get(row[:3])) is not None:
                raise UserError(twice(row, row.run, twin.run))
            if self.unit(row.task) != other.units.get(row.task, self.unit(row.task)):
                raise UserError(f"{row.task} has scores in one source and returns in the other: they do not compare.")
        return Scores(
            (*self.rows, *other.rows),
            {**self.units, **other.units},
            {**self.episodes, **other.episodes},
            tuple(dict.fromkeys((*self.notes, *other.notes))),
            (*self.left_out, *other.left_out),
            {**self.algorithms, **other.algorithms},
            (*self.diverged, *other.diverged),
            {**self.settings, **other.settings},
            {**self.environments, **other.environments},
        )

    @classmethod
    def of_runs(cls, paths: Path | str | Sequence[Path | str], by: By = "data", acting: bool = False) -> "Scores":
        """The scores of runs: their folders, or folders that contain such, as a sweep's does; one path, or several.

        Runs of one agent on one task are further seeds where their settings are the same; else the agent's name says
        what differs. by: a task is a data set, or an environment with its scores; then an agent's name says what data
        it learned from, and data sets of one environment compare. acting: the agents are to act later, so that runs
        whose agent's package is not here are left out; to show scores needs none. What cannot be read, or has no
        evaluation yet, is in `left_out`. Raises UserError where nothing is left, where a score is no number, and where
        a seed is there twice.
        """
        folders: list[Path] = []
        absent: dict[str, list[str]] = {}
        for path in map(Path, several_paths(paths, "paths")):
            without = dict(_absent(path))
            for where, why in without.items():
                absent.setdefault(why, []).append(str(where))
            try:
                folders += run_folders(path)
            except UserError:
                if not without:
                    raise
        from diffrl.runs.study.reading import read_runs  # and torch with it

        reasons = sorted(absent, key=lambda why: why == _NOT_BEGUN)  # those that failed first
        said = [f"Left out: {_several(list(dict.fromkeys(absent[why])))}: {why}" for why in reasons]
        return read_runs(list(dict.fromkeys(os.path.normpath(folder) for folder in folders)), said, by, acting)

    @classmethod
    def of_csv(cls, path: Path | str) -> "Scores":
        """The scores in a CSV file with a header: task, agent, seed, step, score, perhaps minutes; in any order.

        Commas, semicolons or tabs separate. Raises UserError, with the line's number, at the first row that is wrong.
        """
        path = local_file(path)
        rows: dict[tuple[str, str, int, int], tuple[Row, int]] = {}
        for line, cells in cells_of_csv(path, "a CSV file of scores (UTF-8)", COLUMNS):
            row = _row(f"{path}, line {line}", cells, str(path))
            if row[:4] in rows:
                raise UserError(
                    f"{path}, line {line}: {_which(row)}, step {row.step}, is in line {rows[row[:4]][1]} already."
                )
            rows[row[:4]] = row, line
        if not rows:
            raise UserError(f"{path} has a header and no rows; expected one row an evaluation.")
        said = f"{path.name}: taken to be {X100}. Episodes, environments and settings are not known."
        return cls(tuple(row for row, _ in rows.values()), notes=(Note("Scores of others", said),))


def run_folders(path: Path) -> list[Path]:
    """The runs' folders at or below a path, in alphabetical order; of an address, copies here without checkpoints.

    Raises UserError where there are none.
    """
    path = local_folder(path, without=("checkpoints",))
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        also = " Scores in a file are read by --csv." if path.is_file() else ""
        raise UserError(f"{path} {what}; expected a run's folder, or a folder that contains runs.{also}")
    found = []
    for folder, below, files in os.walk(path):
        below.sort()
        if ABOUT in files:
            found.append(Path(folder))
            if SWEEP not in files:  # earlier versions let a run into a sweep's folder
                below.clear()  # what is in a run's folder is the run's
    if not found:
        if said := lacking(path, [ABOUT]):
            raise UserError(said)
        raise UserError(f"{path} contains no run: no folder at or below it has a {ABOUT}. Is it the right path?")
    return found


_NOT_BEGUN = "not begun."


def _absent(path: Path) -> Iterator[tuple[Path, str]]:
    """Runs of sweeps, at or below a path of this machine, that are no runs' folders yet, and why: half a sentence."""
    if path.is_dir() and not (path / ABOUT).exists() and (error := error_of(path)):
        yield path, f"failed: {error}"
        return
    for folder, below, files in os.walk(path):
        if ABOUT in files:
            below.clear()
        if SWEEP not in files:
            continue
        with contextlib.suppress(UserError):  # of a damaged file: the runs that are there are read all the same
            sweep = plan.read(Path(folder))
            for run in () if sweep is None else sweep.runs:
                where = Path(folder, run.name)
                if not (where / ABOUT).exists():
                    error = error_of(where)
                    yield where, f"failed: {error}" if error else _NOT_BEGUN


def _several(names: Sequence[str], most: int = 6) -> str:
    """The names, whole as they have commas, with semicolons between; of many the first."""
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- CSV ------------------------------------------------------------------------------------------------------------


def cells_of_csv(
    path: Path, what: str, needed: Sequence[str], either: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header: the line's number, and the cells by their columns' names in small letters.

    Commas, semicolons or tabs separate; empty lines do not count. what: the file is to be, for errors. needed: columns
    that it must have, among them task and agent, whose cells are names. either: it must have one of these too. Raises
    UserError, with the line's number, at the first row that is wrong.
    """
    text = read_text(path, what)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in needed if name not in header]
        missing += [] if not either or set(either) & set(header) else [" or ".join(either)]
        if missing:
            has = f"the header is {listed(header)}" if any(header) else "the first line is empty"
            wanted = ", ".join((*needed, *([" or ".join(either)] if either else [])))
            raise UserError(f"{path} has no column {', '.join(missing)}; expected {wanted}, and {has}.")
        if len(set(header)) < len(header):
            raise UserError(f"{path}, line 1: a column is named twice: {', '.join(header)[:200]}.")
        for line in reader:
            if not any(cell.strip() for cell in line):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(line) != len(header):
                raise UserError(f"{where} has {len(line)} cells; expected {len(header)}, as in the header.")
            cells = {name: cell.strip() for name, cell in zip(header, line, strict=True)}
            for name in ("task", "agent"):
                _check_name(where, name, cells[name])
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {said_by(error)}.") from error


def _check_name(where: str, name: str, text: str) -> None:
    if not text:
        raise UserError(f"{where}: the {name} is empty; expected a name.")
    if len(text) > 100 or not text.isprintable():
        raise UserError(f"{where}: the {name} is {shown(text)}; expected a name of 100 characters at most.")


def _row(where: str, cells: Mapping[str, str], source: str) -> Row:
    seed, step = (number(where, name, cells[name], whole=True) for name in ("seed", "step"))
    minutes = number(where, "minutes", cells["minutes"]) if cells.get("minutes") else math.nan
    advice = " A run that failed has a score too: give it, or leave the whole run out and say so."
    score = number(where, "score", cells["score"], advice=advice)
    learned = cells.get("learned", "") != "0"
    return Row(cells["task"], cells["agent"], int(seed), int(step), minutes, score, source, learned)


def number(where: str, name: str, text: str, whole: bool = False, advice: str = "") -> float:
    """A finite number; a whole one that is not negative where `whole`. Raises UserError for any other text.

    where: the file and the line, for errors. name: the column's. advice: a sentence behind the error, after a blank.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    fine = value.is_integer() and 0 <= value < 2**53 if whole else math.isfinite(value)
    if not fine:
        expected = "a whole number from 0 up" if whole else "a finite number"
        raise UserError(f"{where}: the {name} is {shown(text)}; expected {expected}.{advice}")
    return value


def _which(row: Row) -> str:
    return f"seed {row.seed} of {row.agent} on {row.task}"


def twice(row: Row, one: str, other: str) -> str:
    """The sentence that refuses a seed that two runs have."""
    return (
        f"There are two runs of {_which(row)}: {one} and {other}. Counted twice, one run would look like "
        "two; leave one out."
    )
