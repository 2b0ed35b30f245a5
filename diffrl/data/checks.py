"""What data say against themselves, or against their environment: ends of episodes, and units of actions.

`examine` finds it, `take` gives the rows as they are to be taken. Both follow `Taken`, what the user decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium
import numpy as np
import torch

from diffrl.data.arrays import discrete_values, listed_numbers
from diffrl.data.config import ActionUnits, TimeLimitTerminals
from diffrl.data.d4rl import NEEDING_NONE
from diffrl.data.env_spec import EnvSpec
from diffrl.data.fidelity import KEY, LOOK_FIRST, NOT_MEASURED, USELESS, Verdict
from diffrl.data.offline import (
    NO_REWARDS,
    PIXELS,
    Bools,
    Floats,
    Ints,
    OfflineDataset,
    count_timeouts,
    shown_bounds,
)
from diffrl.data.preprocessing import CLIPPED, ActionBounds, Normaliser, action_bounds
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError, beginning, counted, joined, printable

_SAID = 400
"""Characters of a fidelity report's verdict that are said again, at most."""
_UNIT = 1 + 1e-5
"""Actions up to here count as in [-1, 1]: a tanh in float32 may round to more than 1."""
_ROUNDING = 1e-4
"""Of a bound of observations, as of one of actions: rounding that is forgiven."""
_ENDLESS = np.float32(1e30)
"""Bounds of observations from which on they bound nothing: many environments write the largest float32 for infinity."""
_HUGE = 1e18
"""Values from which on float32 does not hold sums of squares: it ends at 3.4e38, a square at 1.8e19."""
_PIXELS = 64
"""Whole numbers in [0, 255] from which on an observation looks like a picture."""
_LONG = 20
"""Steps from which a length that all episodes share looks like a limit, where none is known."""


@dataclass(frozen=True)
class Taken:
    """How the rows of a data set are taken. None: as they stand, and what looks odd is said."""

    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the limit of steps, or marked as timeouts too, are timeouts alone."""
    actions: ActionUnits | None = None
    """normalised: actions lie in [-1, 1], and are scaled to the bounds of the environment."""
    cut_contradictions: bool = False
    """Whether an episode is cut where a stored next observation contradicts the next row."""
    counted: int | None = None
    """The limit of steps by which episodes are counted, in data that mark no timeout; None: they are not counted."""

    @classmethod
    def by(cls, options: Any, counted: int | None = None) -> Taken:
        """What an object with fields of these names says, such as a run's configuration."""
        return cls(options.time_limit_terminals, options.actions, options.cut_contradictions, counted)


@dataclass(frozen=True)
class Known:
    """What is known of the environment that a data set is from."""

    bounds: ActionBounds
    """Of its actions."""
    limit: int | None = None
    """The steps after which it cuts an episode; None: not known."""
    name: str = "the environment"
    observations: tuple[Floats, Floats] | None = None
    """(O,) the lowest and (O,) the highest of its observations, some perhaps infinite; None: all are, or not known."""

    @classmethod
    def of(cls, dataset: OfflineDataset, env: gymnasium.Env[Any, Any] | None, asked: int | None = None) -> Known:
        """What the environment says, or where there is none the data set's metadata.

        asked: the limit of steps that the user wants in evaluations: not that of the data.
        """
        spec = None if env is None else env.spec
        bounds = action_bounds(env, dataset)
        if spec is None:
            return cls(bounds)
        limit = spec.max_episode_steps if asked is None else _own_limit(dataset, spec.id)
        limit = limit if limit is not None and limit > 0 else None  # Gymnasium's -1: never
        return cls(bounds, limit, spec.id, None if env is None else _observation_bounds(env, dataset))


def _observation_bounds(env: gymnasium.Env[Any, Any], dataset: OfflineDataset) -> tuple[Floats, Floats] | None:
    """(O,) the lowest and (O,) the highest observation of an environment; None where none is finite, or none fits."""
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Box) or space.shape != (dataset.observation_size,):
        return None
    with np.errstate(over="ignore"):
        low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    low, high = np.where(low <= -_ENDLESS, -np.inf, low), np.where(high >= _ENDLESS, np.inf, high)
    return (low, high) if (np.isfinite(low) | np.isfinite(high)).any() else None


def _own_limit(dataset: OfflineDataset, env_id: str) -> int | None:
    """The limit of steps of an environment as the data have it, else as it is registered."""
    of_data = EnvSpec.of(dataset.metadata)
    spec = of_data if of_data is not None and of_data.id == env_id else EnvSpec(env_id)
    return spec.time_limit()


Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that data say against themselves, or against their environment."""

    sentence: str
    severity: Severity
    """problem: the data cannot be used; warning: results would be wrong; note: how the rows are taken."""
    remedy: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}".rstrip()


def counted_limit(dataset: OfflineDataset, known: Known, taken: Taken) -> int | None:
    """The limit by which to count episodes: the environment's, where no timeout is marked and an episode is longer."""
    if known.limit is None or dataset.marks_timeouts:
        return None
    whole = take(dataset, known, replace(taken, counted=None, actions=None))
    return known.limit if whole.episode_lengths().max() > known.limit else None


def understand(
    dataset: OfflineDataset, env: gymnasium.Env[Any, Any] | None, options: Any, quiet: bool = False
) -> tuple[OfflineDataset, Known, Taken]:
    """A data set with its rows taken as they are to be; what is known of its environment; and how they are taken.

    options: has the fields of `Taken`, but for `counted`, and `max_episode_steps`, a limit for evaluations alone. Says
    what `examine` finds, unless quiet. Raises DataError for data that cannot be used.
    """
    known, taken = Known.of(dataset, env, options.max_episode_steps), Taken.by(options)
    taken = replace(taken, counted=counted_limit(dataset, known, taken))
    tell(examine(dataset, known, taken), str(dataset.metadata.get("dataset", "The data set")), quiet)
    return take(dataset, known, taken), known, taken


def tell(findings: Sequence[Finding], name: str, quiet: bool = False) -> None:
    """Print what was found in the data set `name`, a line each. Raises DataError where there are problems."""
    problems = [finding for finding in findings if finding.severity == "problem"]
    if problems:
        raise DataError("\n".join(f"{name}: {problem}" for problem in problems))
    for finding in () if quiet else findings:
        console.print(str(finding), markup=False, style="yellow" if finding.severity == "warning" else None)


def take(dataset: OfflineDataset, known: Known, taken: Taken, scaling: Normaliser | None = None) -> OfflineDataset:
    """The data set with its rows taken as `taken` says; the columns that need no change are the same arrays.

    scaling: of actions to [-1, 1], by default that of the known bounds. Raises UserError where normalised actions have
    no known bounds, DataError where they are not in [-1, 1].
    """
    terminals, timeouts, actions = dataset.terminals, dataset.timeouts, dataset.actions
    if taken.cut_contradictions:
        timeouts = timeouts.copy()
        timeouts[dataset.contradicted_rows()] = True
    if taken.counted is not None and not dataset.marks_timeouts:
        timeouts = timeouts | count_timeouts(terminals | timeouts, taken.counted)
    if taken.time_limit_terminals == "timeouts":
        at_limit = terminals & (timeouts | _at_limit(replace(dataset, timeouts=timeouts), known)[1])
        terminals, timeouts = terminals & ~at_limit, timeouts | at_limit
    if taken.actions == "normalised":
        if not known.bounds.known:
            raise UserError(
                "--actions normalised needs the bounds that actions are scaled to: name the environment with --env."
            )
        largest = np.abs(actions).max(axis=1)
        if largest.max() > _UNIT:
            row = int(np.argmax(largest > _UNIT))
            value = actions[row, np.abs(actions[row]).argmax()]
            raise DataError(f"actions: row {row} holds {value:.6g}; expected [-1, 1], as --actions normalised says.")
        scaling = known.bounds.scaling() if scaling is None else scaling
        actions = scaling.inverse(torch.from_numpy(actions).double()).float().numpy()
    return replace(dataset, terminals=terminals, timeouts=timeouts, actions=actions)


def examine(dataset: OfflineDataset, known: Known, taken: Taken) -> list[Finding]:
    """What a data set, as it was read, says against itself or its environment, and how its rows are taken.

    Observations are compared within a thousandth of their deviation, see `OfflineDataset.follows`. What makes the data
    unfit comes first. Broken shapes come alone; beside values that are not finite stands what needs no others.
    """
    unfit = [Finding(problem, "problem") for problem in dataset.problems(action_limit=None)]
    if dataset.structural_problems():
        return unfit
    if not dataset.successors()[1].any():
        sentence = (
            f"timeouts: no row has a known successor: each of the {len(dataset):,} is a timeout or the last one, "
        )
        unfit.append(Finding(f"{sentence}and next_observations are not stored.", "problem", "Check them."))
    if unfit:
        of_ends = [*_both(dataset, taken), *_terminal_limits(dataset, known, taken)]
        return [*unfit, *_units(dataset, known, taken), *of_ends]
    found = [*_units(dataset, known, taken), *_observed(dataset, known), *_unfit(dataset), *_degenerate(dataset)]
    found += [*_both(dataset, taken), *_terminal_limits(dataset, known, taken)]
    found += [*_cuts(dataset, known, taken), *_shifted(take(dataset, known, replace(taken, actions=None)))]
    return [*found, *_infidelity(dataset)]


def _units(dataset: OfflineDataset, known: Known, taken: Taken) -> list[Finding]:
    bounds, actions = known.bounds, dataset.actions
    shown = str(bounds)
    if taken.actions == "normalised":
        said = Finding(f"actions: taken as normalised, and scaled from [-1, 1] to {shown}.", "note")
        return [said] if bounds.known else []  # `take` refuses
    complaint = bounds.complaint(actions)
    if complaint:
        return [Finding(complaint, "problem")]
    found, values = [], discrete_values(actions)
    if values is not None:
        only = listed_numbers(values) if len(values) > 5 else joined([f"{value:g}" for value in values])
        sentence = f"actions: look discrete (only {only}): a continuous policy would act between them."
        found.append(Finding(sentence, "warning"))
    wider = bool((bounds.high > _UNIT).any() or (bounds.low < -_UNIT).any())
    if bounds.metadata and wider and taken.actions is None and 0 < np.abs(actions).max() <= _UNIT:
        remedy = "If they are scaled: --actions normalised. If they are in its units: --actions environment."
        found.append(Finding(f"actions: all lie in [-1, 1]; expected {shown}.", "warning", remedy))
    return [*found, *_clipped(dataset, bounds)]


def _clipped(dataset: OfflineDataset, bounds: ActionBounds) -> list[Finding]:
    """Of actions that were clipped to [-1, 1] where nothing said what their bounds were, unless these are they."""
    said = str(dataset.metadata.get(CLIPPED, ""))
    right = bounds.known and f"to {shown_bounds(bounds.low, bounds.high)}, assumed" in said
    if ", assumed" not in said or right:
        return []
    sentence = f"actions: clipped in {printable(said, 200)}."
    remedy = "--env ID gives the true bounds: if they are wider, convert the source anew."
    return [Finding(sentence, "warning", remedy)]


def _observed(dataset: OfflineDataset, known: Known) -> list[Finding]:
    """Of observations outside their environment's bounds, beyond the rounding that is forgiven to actions."""
    if known.observations is None:
        return []
    low, high = known.observations
    slack = _ROUNDING * np.maximum(1, np.stack([np.abs(low), np.abs(high)]))
    outside = (dataset.observations < low - slack[0]) | (dataset.observations > high + slack[1])
    rows = outside.any(axis=1)
    if not rows.any():
        return []
    worst = int(outside.sum(axis=0).argmax())
    values = dataset.observations[:, worst]
    sentence = (
        f"observations: {int(rows.sum()):,} of {counted(len(dataset), 'rows')} lie outside the bounds of {known.name}: "
        f"dimension {worst} has {values.min():.4g} to {values.max():.4g}; expected "
        f"{shown_bounds(low[worst], high[worst])}."
    )
    mean, deviation = dataset.sampled_moments()
    moving = deviation > 0
    standard = (np.abs(mean) < 0.1).all() and (np.abs(deviation[moving] - 1) < 0.1).all()
    remedy = "They are probably standardised: store" if standard else "If they are scaled, store"
    return [Finding(sentence, "warning", f"{remedy} them as the environment gives them.")]


def _unfit(dataset: OfflineDataset) -> list[Finding]:
    """Of observations and rewards that the networks here do badly with, though each value is sound."""
    found = []
    for name, values in (("observations", dataset.observations), ("rewards", dataset.rewards[:, None])):
        largest = np.maximum(values.max(axis=0), -values.min(axis=0))
        if largest.max() > _HUGE:
            which = f": dimension {int(largest.argmax())} reaches" if name == "observations" else " reach"
            sentence = f"{name}{which} {largest.max():.3g}; squares of more than 1.8e19 overflow in float32."
            found.append(Finding(sentence, "note", "Give them in larger units."))
    some = dataset.observations[:: len(dataset) // 100 + 1]
    whole = dataset.observation_size >= _PIXELS and bool(((some == np.rint(some)) & (some >= 0) & (some <= 255)).all())
    shape = dataset.metadata.get(PIXELS)
    if shape is not None or (whole and some.max() > 1):
        what = (
            f"pictures {shape}" if shape else f"{dataset.observation_size} whole numbers from 0 to 255, as pixels are"
        )
        sentence = f"observations: {what}. Networks here are MLPs on flat vectors, and know nothing of neighbours."
        found.append(Finding(sentence, "note", "Features that an image encoder makes of them suit better."))
    return found


def _degenerate(dataset: OfflineDataset) -> list[Finding]:
    """Of data from which little or nothing can be learned, though each row is sound."""
    if len(dataset) == 1:
        return [Finding("rows: a single transition was read.", "warning", "No agent learns from one.")]
    found, ends = [], int(dataset.terminals.sum())
    if 2 * ends > len(dataset):
        sentence = f"terminals: {ends:,} of {len(dataset):,} rows are terminal, and end episodes of a step or two."
        found.append(Finding(sentence, "note", "Are they marks of what goes on, 1 - done? Then write the others."))
    if not dataset.rewards.any():
        who = f"of diffrl's agents only {joined(NEEDING_NONE)} (unguided) learn from such rows."
        why = dataset.metadata.get(NO_REWARDS)
        own = f"the data have none of their own ({str(why)[:200]}); " if why else ""
        found.append(Finding(f"rewards: {own}all {len(dataset):,} of the rows read are 0: {who}", "note"))
    if (dataset.observations == dataset.observations[0]).all():
        sentence = (
            f"observations: all {len(dataset):,} rows hold the same one, {listed_numbers(dataset.observations[0])}."
        )
        found.append(Finding(sentence, "warning", "No policy can tell one row from another: check what was stored."))
    if (dataset.actions == dataset.actions[0]).all():
        sentence = f"actions: all {len(dataset):,} rows hold the same one, {listed_numbers(dataset.actions[0])}."
        found.append(Finding(sentence, "warning", "Check that they are the actions that were taken."))
    return found


_OFFER = "If time limits end episodes there: --time-limit-terminals timeouts."


def _both(dataset: OfflineDataset, taken: Taken) -> list[Finding]:
    both = np.flatnonzero(dataset.terminals & dataset.timeouts)
    if not len(both) or taken.time_limit_terminals == "terminals":
        return []
    sentence = f"terminals: {_rows(both)} marked as timeouts too; taken as "
    if taken.time_limit_terminals == "timeouts":
        return [Finding(f"{sentence}timeouts.", "note")]
    return [Finding(f"{sentence}terminal: nothing is bootstrapped there.", "warning", _OFFER)]


def _at_limit(dataset: OfflineDataset, known: Known) -> tuple[int | None, Bools]:
    """The limit of steps, and (N,) the terminal rows at exactly that many steps of their episodes.

    Where no limit is known, it is the length that all episodes have which end in a terminal row, `_LONG` at least; the
    last one may be cut by the end of the data.
    """
    rows = np.zeros(len(dataset), np.bool_)
    lasts, lengths = dataset.episodes()[:, 1] - 1, dataset.episode_lengths()
    terminal, limit = dataset.terminals[lasts], known.limit
    if limit is None:
        whole = len(lasts) if terminal[-1] else len(lasts) - 1
        alike = whole > 1 and terminal[:whole].all() and (lengths[:whole] == lengths[0]).all()
        limit = int(lengths[0]) if alike and lengths[0] >= _LONG else None
    if limit is not None:
        rows[lasts[terminal & (lengths == limit)]] = True
    return limit, rows


def _terminal_limits(dataset: OfflineDataset, known: Known, taken: Taken) -> list[Finding]:
    """Of episodes that a limit of steps ended, but whose last rows are marked as terminal.

    It looks so where all terminal rows are at exactly the limit, or two and a hundredth of all episodes are, and no
    timeout is marked there. A true end falls on the limit by chance alone.
    """
    limit, at_limit = _at_limit(dataset, known)
    at_limit &= ~dataset.timeouts
    n, ends, said = int(at_limit.sum()), int(dataset.terminals.sum()), taken.time_limit_terminals
    whose = f", the limit of {known.name}" if known.limit else ""
    sentence = f"terminals: {'all' if n == ends else f'{n:,} of'} {ends:,} are at exactly {limit} steps{whose}"
    if said == "timeouts" and limit is None:
        return [
            Finding("terminals: no limit of steps is known, and none are taken as timeouts.", "warning", "Name --env.")
        ]
    if said == "timeouts" and n:
        return [Finding(f"{sentence}; taken as timeouts.", "note")]
    cuts = dataset.timeouts & ~dataset.terminals
    marked = (dataset.episode_indices()[1][:-1][cuts[:-1]] + 1 == limit).any()
    if said is not None or not n or limit == 1 or marked:
        return []
    if n < ends and (n < 2 or 100 * n < dataset.n_episodes):
        return []
    severity: Severity = "warning" if known.limit else "note"
    return [Finding(f"{sentence}: nothing is bootstrapped there.", severity, _OFFER)]


def _cuts(dataset: OfflineDataset, known: Known, taken: Taken) -> list[Finding]:
    found, against = [], dataset.contradicted_rows()
    lengths = take(dataset, known, replace(taken, counted=None, actions=None)).episode_lengths()
    longest, unmarked = int(lengths.max()), not dataset.marks_timeouts
    differ = "stored next observation is not the next row's observation"
    if taken.cut_contradictions and len(against):
        found.append(Finding(f"next_observations: {_rows(against)} cut: the {differ}.", "note"))
    if unmarked and taken.counted is not None and longest > taken.counted:
        counted = take(dataset, known, replace(taken, actions=None))
        met = against[counted.timeouts[against]]
        against = against[~counted.timeouts[against]]
        agree = (
            f" The next observations agree: at {len(met):,} of these cuts (rows {listed_numbers(met)}) the {differ}."
            if len(met)
            else ""
        )
        found.append(
            Finding(
                f"timeouts: none are marked, and the longest episode has {longest:,} steps, more than the limit of "
                f"{taken.counted:,} of {known.name}: counted by the limit, {counted.n_episodes:,} episodes.{agree}",
                "note" if len(met) else "warning",
                "" if len(met) else "Mark the rows where episodes were cut in `timeouts` if that is wrong.",
            )
        )
    elif known.limit is not None and longest > max(known.limit, _recorded_limit(dataset)):
        marks = "no timeouts are marked" if unmarked else "timeouts may be missing"
        sentence = f"timeouts: the longest episode has {longest:,} steps, more than the limit of {known.limit:,} of "
        found.append(Finding(f"{sentence}{known.name}: {marks}, or it was recorded with another limit.", "note"))
    elif unmarked and known.limit is None and not dataset.terminals.any() and not len(against):
        all_rows = "the one row is" if len(dataset) == 1 else f"all {len(dataset):,} rows are"
        sentence = f"timeouts: no ends are marked, so that {all_rows} one episode."
        found.append(Finding(sentence, "note", "If they are several, name the environment, whose limit counts: --env."))
    if len(against) and not taken.cut_contradictions:
        sentence = f"next_observations: {_rows(against)} contradicted by the next: the {differ}, and no end is marked."
        found.append(Finding(sentence, "warning", "To cut episodes there: --cut-contradictions."))
    return found


def _recorded_limit(dataset: OfflineDataset) -> int:
    """The limit of steps that the metadata say the data were recorded with, other than their task's; 0: they do not."""
    stored = dataset.metadata.get("recorded_limit")
    return stored if isinstance(stored, int) else 0


def _shifted(dataset: OfflineDataset) -> list[Finding]:
    rows = np.flatnonzero(dataset.shifted_rows())
    if not len(rows):
        return []
    sentence = (
        f"next_observations: {len(rows):,} cut rows ({listed_numbers(rows)}) hold the next episode's first "
        "observation; what followed is taken as unknown, and the rows are left out."
    )
    return [Finding(sentence, "warning", "Store the observation before the reset there to keep them.")]


def _infidelity(dataset: OfflineDataset) -> list[Finding]:
    verdict = Verdict.of(dataset.metadata) if KEY in dataset.metadata else None
    if verdict == NOT_MEASURED:
        remedy = "The command that made them measures it, with --force and without --no-report: its model is kept."
        return [Finding("synthetic rows: when they were made, their fidelity was not measured.", "note", remedy)]
    if verdict is not None and verdict.word == NOT_MEASURED.word:
        why = beginning(verdict.sentence, _SAID)
        return [Finding(f"synthetic rows: when they were made, their fidelity was not measured: {why}", "note")]
    if verdict is None or verdict.word not in (USELESS, LOOK_FIRST):
        return []
    said = beginning(verdict.sentence, _SAID)
    sentence = f"synthetic rows: when they were made, their fidelity report said: {said}"
    return [Finding(sentence, "warning" if verdict.word == USELESS else "note")]


def _rows(rows: Ints) -> str:
    """The rows as the beginning of a sentence: row 7 is, or 9 rows (199, 399, ...) are."""
    return f"row {rows[0]} is" if len(rows) == 1 else f"{len(rows):,} rows ({listed_numbers(rows)}) are"
