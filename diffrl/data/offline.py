"""A data set on the host: flat NumPy arrays, one row a time step, laid out as in a D4RL file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffrl.data.arrays import DISCRETE, as_numbers, discrete_values, listed_numbers
from diffrl.data.fidelity import SYNTHETIC_ROWS, of_first
from diffrl.support.errors import DataError, counted

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]

ACTION_LIMIT = 1.0
"""The action range of every D4RL task and of our agents is [-1, 1]."""

STAND_IN = "stand-in: the row's own observation"
"""The value of `terminal_successors` in the metadata of data that do not hold what follows a terminal row."""
MADE_STAND_IN = "stand-in: what a model generates in the place of the row's own observation"
"""The same of generated rows, whose model learned from data that do not hold it."""
BOTH_STAND_IN = "stand-in: in real rows the row's own observation, in synthetic ones what a model generates for it"
"""The same of both in one file."""
NO_REWARDS = "no_rewards"
"""The key in the metadata of data that have no rewards of their own, but zeros: where rewards are to be had."""
PIXELS = "pixels"
"""The key in the metadata of data whose observations are pictures, made flat here: their shape."""
_ACTION_SLACK = 1e-5  # a tanh in float32, stored and read again
_SAME, _ROUNDING = 1e-3, 1e-5
"""Two observations are equal within `_SAME` deviations of each dimension, and `_ROUNDING` of its value."""
_KINDS: dict[str, type[np.generic]] = {
    **dict.fromkeys(("observations", "actions", "rewards"), np.float32),
    **dict.fromkeys(("terminals", "timeouts"), np.bool_),
    "next_observations": np.float32,
}
"""The columns and their types."""
_SAMPLE = 10_000
"""Rows that deviations and steps are estimated from, evenly spread."""


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Logged experience, N rows in the order they were collected.

    A row that is in neither `terminals` nor `timeouts` is followed by its own successor, the next row.

    Columns may be given as arrays of other real types, lists or tensors. Raises DataError for what is no array of
    numbers, for marks other than 0 and 1, and for actions of whole numbers; what the columns hold `validate` looks at.
    """

    observations: Floats
    """(N, O) what the agent saw."""
    actions: Floats
    """(N, A) what it did, normally in [-1, 1]."""
    rewards: Floats
    """(N,) what it received for it."""
    terminals: Bools
    """(N,) a true end of the episode: nothing to bootstrap from."""
    timeouts: Bools
    """(N,) the episode was cut here: bootstrap, but the next row belongs to another episode."""
    next_observations: Floats | None = None
    """(N, O) what the agent saw next, where the file holds it. `successors()` derives it where not."""
    infos: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Further columns of N rows, such as `qpos`, `qvel`, `goal`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """About the data set as a whole: source, env_id, generator, sha256, ..."""
    cut: bool = False
    """Whether the last episode goes on in the data of which these rows are the `head`."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            values = getattr(self, name)
            if values is None and name != "next_observations":
                none = ", all False where no row is one" if kind is np.bool_ else ""
                raise DataError(f"{name} is None; expected an array of one row a time step{none}.")
            if values is None or (isinstance(values, np.ndarray) and values.dtype == kind and values.ndim):
                continue
            found = as_numbers(name, values, kind)
            if not found.ndim:
                raise DataError(f"{name}: shape (), a single value; expected one row a time step.")
            if name == "actions":
                refuse_whole(np.asarray(values))
            object.__setattr__(self, name, found)

    def __repr__(self) -> str:
        if self.structural_problems():  # which `validate` tells
            return f"OfflineDataset({', '.join(f'{name} {values.shape}' for name, values in self.columns().items())})"
        rows, episodes = counted(len(self), "rows"), counted(self.n_episodes, "episodes")
        return f"OfflineDataset({rows}, {episodes}, {self.observation_size} -> {self.action_size})"

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def observation_size(self) -> int:
        """O, the number of dimensions of an observation."""
        return int(self.observations.shape[1])

    @property
    def action_size(self) -> int:
        """A, the number of dimensions of an action."""
        return int(self.actions.shape[1])

    @property
    def has_next(self) -> bool:
        """Whether every row's successor is stored."""
        return self.next_observations is not None

    def episodes(self) -> Ints:
        """(E, 2) first row and one past the last row of every episode. The last row always ends an episode."""
        if len(self) == 0:
            return np.zeros((0, 2), np.int64)
        ends = self.terminals | self.timeouts
        stops = np.flatnonzero(ends) + 1
        if not ends[-1]:
            stops = np.append(stops, len(self))
        return np.stack([np.append(0, stops[:-1]), stops], axis=1)

    @property
    def has_terminal_next(self) -> bool:
        """Whether the observation that follows a terminal row is stored, and is not a stand-in.

        A file derived from one without next observations has stand-ins there, and its metadata say so.
        """
        said = str(self.metadata.get("terminal_successors", "")).startswith("stand-in:")
        return self.has_next and not said and not self.shifted_rows().any()

    def stand_ins(self) -> dict[str, str]:
        """The metadata of data that store the successors of these rows: that of terminal rows they are stand-ins.

        Nothing where they are not, or no row is terminal.
        """
        if self.has_terminal_next or not self.terminals.any():
            return {}
        said = str(self.metadata.get("terminal_successors", ""))
        return {"terminal_successors": said if said.startswith("stand-in:") else STAND_IN}

    @property
    def marks_timeouts(self) -> bool:
        """Whether a row is marked as a timeout. The last one says nothing: it ends an episode whatever happened."""
        return bool(self.timeouts[:-1].any())

    @property
    def n_episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.episodes())

    def episode_lengths(self) -> Ints:
        """(E,) steps of every episode."""
        lengths: Ints = np.diff(self.episodes(), axis=1)[:, 0]
        return lengths

    def episode_returns(self) -> npt.NDArray[np.float64]:
        """(E,) undiscounted sum of rewards of every episode, summed in double precision."""
        if len(self) == 0:
            return np.zeros(0)
        with np.errstate(invalid="ignore"):  # of rewards that are not finite, which `problems` tells
            return np.add.reduceat(self.rewards.astype(np.float64), self.episodes()[:, 0])

    def return_range(self) -> tuple[float, float] | None:
        """The smallest and the largest return of the episodes that these rows came from, as the metadata say.

        None: the metadata say nothing, and the rows' own episodes are those.
        """
        stored = self.metadata.get("return_range")
        return None if stored is None else (float(stored[0]), float(stored[1]))

    def episode_indices(self) -> tuple[Ints, Ints]:
        """(N,) the episode's number and (N,) the time within it, both from 0, for every row."""
        lengths = self.episode_lengths()
        episodes = np.repeat(np.arange(len(lengths)), lengths)
        return episodes, np.arange(len(self)) - np.repeat(self.episodes()[:, 0], lengths)

    def successors(self) -> tuple[Floats, Bools]:
        """(N, O) next observations and (N,) whether they are known.

        Where the file holds none they are the next row's observations, never taken across a timeout: such a row,
        and a last row that is cut off, have no known successor. A terminal row needs none, since nothing is
        bootstrapped from it: its own observation stands in. Stored ones are known, but for `shifted_rows()`. The values
        of unknown successors mean nothing.
        """
        if self.next_observations is not None:
            return self.next_observations, ~self.shifted_rows()
        following = np.concatenate([self.observations[1:], self.observations[-1:]])
        following[self.terminals] = self.observations[self.terminals]
        known = self.terminals | ~self.timeouts
        known[-1:] = self.terminals[-1:]
        return following, known

    def shifted_rows(self) -> Bools:
        """(N,) cut rows whose stored next observation is not theirs: it was taken across the reset.

        Who stores the observations moved up by one row as next observations stores, at a timeout, the first observation
        of the next episode. It is judged so where that is equal at most timeouts (see `follows`), and a reset lies
        between: the step there is longer than nine in ten others, or episodes start much alike. Without either the
        environment goes on after a cut, as maze2d's does, and what is stored is true; so it is where nothing differs.
        """
        shifted = np.zeros(len(self), np.bool_)
        cuts = np.flatnonzero(self.timeouts & ~self.terminals)
        if self.next_observations is None or not len(cuts) or (self.observations == self.observations[0]).all():
            return shifted
        inner = cuts[cuts < len(self) - 1]
        some = inner[:: len(inner) // _SAMPLE + 1]
        if 2 * self.follows(some).sum() > len(some) and self._resets_after(some):
            shifted[inner[self.follows(inner)]] = True
            shifted[-1] = not self.terminals[-1]  # of which there is nothing true to store either
        return shifted

    def contradicted_rows(self) -> Ints:
        """The rows inside episodes whose stored next observation is not the next row's, by number: see `follows`."""
        inside = np.flatnonzero(~(self.terminals | self.timeouts)[:-1])
        return inside[:0] if self.next_observations is None else inside[~self.follows(inside)]

    def follows(self, rows: Ints) -> Bools:
        """(n,) whether the stored next observation of each of the rows (n,), none the last, is the next row's.

        Equal is what differs in no dimension by more than a thousandth of its deviation and 1e-5 of its value.
        """
        assert self.next_observations is not None
        result = np.ones(len(rows), np.bool_)
        with np.errstate(invalid="ignore", over="ignore"):
            deviations = self._deviations()
            for start in range(0, len(rows), 2**16):  # in blocks: the columns may be large
                block = rows[start : start + 2**16]
                stored, following = self.next_observations[block], self.observations[block + 1]
                slack = _SAME * deviations + _ROUNDING * np.abs(following)
                result[start : start + 2**16] = ~(np.abs(stored - following) > slack).any(axis=1)
        return result

    def sampled_moments(self) -> tuple[Floats, Floats]:
        """(O,) means and (O,) standard deviations of the observations, of a sample: 10,000 rows at most, in float32."""
        sample = self.observations[:: len(self) // _SAMPLE + 1].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            return sample.mean(axis=0).astype(np.float32), sample.std(axis=0).astype(np.float32)

    def _deviations(self) -> Floats:
        """(O,) standard deviations of the observations, of a sample."""
        return self.sampled_moments()[1]

    def _resets_after(self, cuts: Ints) -> bool:
        """Whether the environment was reset after the rows `cuts`, none the last, as far as observations tell."""
        inside = np.flatnonzero(~(self.terminals | self.timeouts)[:-1])
        inside = inside[:: len(inside) // _SAMPLE + 1]
        scale = self._deviations()
        scale[scale == 0] = 1
        if not len(inside):
            return False  # every row is an episode of its own: nothing tells
        jumps, steps = (
            np.linalg.norm((self.observations[rows + 1] - self.observations[rows]) / scale, axis=1)
            for rows in (cuts, inside)
        )
        ranks = np.searchsorted(np.sort(steps), jumps) / len(steps)
        starts = (self.observations[cuts + 1] / scale).var(axis=0)
        return bool(np.median(ranks) > 0.9 or (len(cuts) >= 8 and starts.mean() < 0.5))

    def stored_bounds(self) -> tuple[Floats, Floats] | None:
        """(A,) the lowest and (A,) the highest action, where the metadata have them, as `action_low`, `action_high`.

        Raises DataError where they do not fit the actions.
        """
        low, high = self.metadata.get("action_low"), self.metadata.get("action_high")
        if low is None or high is None:
            return None
        try:
            both = [np.broadcast_to(np.asarray(bound, np.float32), (self.action_size,)) for bound in (low, high)]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"action_low and action_high do not fit actions of {self.action_size} dimensions: {low}, {high}."
            ) from error
        return both[0], both[1]

    def with_successors(self) -> OfflineDataset:
        """The data set of the rows whose successors are known, with these stored as next observations.

        A row before one that is left out becomes the end of its episode, by a timeout.
        """
        following, known = self.successors()
        timeouts = self.timeouts.copy()
        timeouts[:-1] |= ~known[1:] & ~self.terminals[:-1]
        columns = self.columns() | {"timeouts": timeouts, "next_observations": following}
        metadata = {key: value for key, value in self.metadata.items() if key not in ("sha256", "terminal_successors")}
        return replace(
            self,
            **{key: values[known] for key, values in columns.items()},
            infos={key: values[known] for key, values in self.infos.items()},
            metadata=metadata | self.stand_ins(),
        )

    def head(self, rows: int) -> OfflineDataset:
        """The first `rows` rows; where that cuts an episode, its last row becomes a timeout."""
        if rows < 1:
            raise DataError(f"{rows} rows were asked for; ask for at least 1.")
        if rows >= len(self):
            return self
        untrue = ("sha256", *(() if self.terminals[:rows].any() else ("terminal_successors",)))
        metadata = {key: value for key, value in of_first(self.metadata, rows).items() if key not in untrue}
        if metadata.get(SYNTHETIC_ROWS) == 0 and metadata.get("terminal_successors") in (MADE_STAND_IN, BOTH_STAND_IN):
            metadata["terminal_successors"] = STAND_IN
        timeouts = self.timeouts[:rows].copy()
        cut = not (self.terminals[rows - 1] or timeouts[-1])
        timeouts[-1] |= cut
        return replace(
            self,
            cut=cut,
            observations=self.observations[:rows],
            actions=self.actions[:rows],
            rewards=self.rewards[:rows],
            terminals=self.terminals[:rows],
            timeouts=timeouts,
            next_observations=None if self.next_observations is None else self.next_observations[:rows],
            infos={key: value[:rows] for key, value in self.infos.items()},
            metadata=metadata,
        )

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, `next_observations` only where it is stored."""
        return {name: values for name in _KINDS if (values := getattr(self, name)) is not None}

    def structural_problems(self) -> list[str]:
        """Shapes and lengths that do not fit together, one sentence each: key, found, expected, what to do."""
        n = len(self)
        if n == 0:
            return ["rewards: 0 rows; expected at least 1. The data set is empty: write or download it again."]
        if advice := _laid_out_otherwise(self.columns()):
            return [advice]
        found = []
        lengths = [values.shape[0] for values in self.columns().values() if values.ndim]
        usual = max(lengths, key=lambda rows: (lengths.count(rows), rows == n))
        for key, values in self.columns().items():
            dimensions = 2 if key in ("observations", "actions", "next_observations") else 1
            if values.ndim != dimensions or (dimensions == 2 and values.shape[1] == 0):
                wanted = f"({usual}, size)" if dimensions == 2 else f"({usual},)"
                advice = "Flatten each row to one vector." if dimensions == 2 else "Give one number a row."
                found.append(f"{key}: shape {values.shape}; expected {wanted}. {advice}")
            elif len(values) != usual and dimensions == 2 and values.shape[1] == usual:
                found.append(
                    f"{key}: shape {values.shape}; expected ({usual}, size). Is it transposed? Write it with the rows "
                    "first."
                )
            elif len(values) != usual:
                found.append(
                    f"{key}: {counted(len(values), 'rows')}; expected {usual:,}, as in "
                    f"{'most other columns' if usual != n else 'rewards'}. The file may be cut short."
                )
        told = any(problem.startswith(("observations:", "next_observations:")) for problem in found)
        following = self.next_observations
        if following is not None and following.shape[1:] != self.observations.shape[1:] and not told:
            shapes = f"{following.shape}, observations {self.observations.shape}"
            found.append(f"next_observations: shape {shapes}; expected the same. Leave next_observations out.")
        return found

    def problems(self, action_limit: float | None = ACTION_LIMIT) -> list[str]:
        """What makes this data set unfit for training, one sentence each: key, row, found, expected, what to do.

        These are `structural_problems()`, values that are not finite, and actions outside `stored_bounds()`, or where
        there are none outside [-`action_limit`, `action_limit`] (None: actions are not looked at).
        """
        found = self.structural_problems()
        if found:
            return found
        for key, values in self.columns().items():
            bad = ~np.isfinite(values)
            if bad.any():
                row, value = _first(bad, values)
                found.append(
                    f"{key}: row {row} holds {value} ({counted(int(bad.sum()), 'such values')} in all); expected "
                    "finite float32 numbers. Remove the episode, or write the file again."
                )
        if action_limit is not None:
            stored = self.stored_bounds()
            low, high = stored or (np.float32(-action_limit), np.float32(action_limit))
            source = "as its metadata say" if stored else ""
            complaint = outside_bounds(self.actions, low, high, _ACTION_SLACK, source, bool(stored), _AS_THEY_ARE)
            found += [complaint] if complaint else []
        return found

    def validate(self, name: str, action_limit: float | None = ACTION_LIMIT) -> OfflineDataset:
        """Return the data set itself if it has no `problems()`; else raise DataError naming `name`, key and row."""
        problems = self.problems(action_limit)
        if problems:
            raise DataError("\n".join(f"{name}: {problem}" for problem in problems))
        return self

    def clip_actions(self, limit: float = ACTION_LIMIT) -> OfflineDataset:
        """This data set with actions clipped, as environments do that clip actions themselves.

        They are clipped to `stored_bounds()`, or where there are none to [-limit, limit].
        """
        low, high = self.stored_bounds() or (np.float32(-limit), np.float32(limit))
        return replace(self, actions=np.clip(self.actions, low, high))


def _laid_out_otherwise(columns: dict[str, npt.NDArray[Any]]) -> str | None:
    """What to do where columns are (episodes, steps, ...), or all transposed; None: they are neither."""
    observations, actions, rewards = (columns[key].shape for key in ("observations", "actions", "rewards"))
    shapes = f"observations: shape {observations}, and rewards {rewards}"
    if len(observations) == 3 and len(rewards) > 1 and actions[:1] == observations[:1] == rewards[:1]:
        return (
            f"{shapes}; expected one row a step. If these are (episodes, steps): join the first two axes of every "
            "column, and mark the last row of each episode that was cut in timeouts."
        )
    if len(observations) == 2 and rewards == (1, observations[1]) and observations[1] > 1:
        return f"{shapes}; expected one row a step. Are they transposed? Write every column with the rows first."
    return None


def count_timeouts(terminals: Bools, max_episode_steps: int) -> Bools:
    """(N,) timeouts for a file that holds none: every row that is step `max_episode_steps` of its episode.

    A terminal row is none. An episode starts after a terminal row or after a timeout.
    """
    rows = np.arange(len(terminals))
    starts = np.concatenate([[0], np.flatnonzero(terminals) + 1])
    since_start = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    timeouts: Bools = (since_start % max_episode_steps == max_episode_steps - 1) & ~terminals
    return timeouts


_NAME_IT = (
    "--env ID gives the true bounds, those of the environment they are from; without one, store them in "
    "metadata/action_low and metadata/action_high."
)
_AS_THEY_ARE = "Read with action_limit=None they are taken as they are, in the units of their environment."


def outside_bounds(
    actions: Floats,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slack: float,
    source: str = "",
    known: bool = False,
    unknown: str = _NAME_IT,
    named: str = "",
) -> str | None:
    """What is wrong with actions (N, A) that exceed their bounds by `slack` of the larger one; None where none does.

    low, high: scalars or (A,). source: what the bounds are, as "the bounds of Pendulum-v1". known: whether they are so,
    and not only assumed. unknown: what to do where they are not known, a sentence. named: the environment to be named
    where they are clipped, where the data do not name it.
    """
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    most = slack * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    outside = ((actions < low - most) | (actions > high + most)) & np.isfinite(actions)
    if not outside.any():
        return None
    row, column = (int(i[0]) for i in np.nonzero(outside))
    values = discrete_values(actions)
    if values is not None:
        real = "" if known else f" If they are real-valued: {unknown}"
        remedy = f"Their values are {listed_numbers(values)} alone: discrete actions are not supported.{real}"
    elif np.abs(actions[np.isfinite(actions)]).max() <= 1 + _ACTION_SLACK:
        remedy = "Where they are scaled to [-1, 1]: --actions normalised."
    else:
        remedy = "" if known else f"{unknown} "
        options = f"--env {named} --clip-actions" if named else "--clip-actions"
        remedy += f"Only if it clips actions itself: `diffrl data convert SOURCE NEW.hdf5 {options}`."
    return (
        f"actions: row {row} holds {actions[row, column]:.6g} ({outside.any(axis=1).sum():,} such rows in all); "
        f"expected {shown_bounds(low, high)}{source and ', '}{source}. {remedy}"
    )


def shown_bounds(low: npt.ArrayLike, high: npt.ArrayLike) -> str:
    """Bounds of actions as text: [-2, 2], or where dimensions differ [-2, 2] or [0, 1]."""
    pairs = dict.fromkeys(f"[{a:.4g}, {b:.4g}]" for a, b in np.broadcast(np.atleast_1d(low), np.atleast_1d(high)))
    return " or ".join(list(pairs)[:3]) + (" ..." if len(pairs) > 3 else "")


def refuse_whole(actions: npt.NDArray[Any], source: str = "") -> None:
    """Raise DataError for actions of a type of whole numbers. source: what the error begins with."""
    if actions.dtype.kind in "biu":
        kind = "booleans" if actions.dtype.kind == "b" else f"whole numbers ({actions.dtype})"
        found = f"{source}actions are {kind}, {listed_numbers(np.unique(actions))}"
        raise DataError(f"{found}; expected real-valued (N, A) actions: {DISCRETE}")


def _first(bad: Bools, values: npt.NDArray[Any]) -> tuple[int, float]:
    """The number of the first row of values (N, ...) at which `bad` (N, ...) is True, and the value there."""
    index = int(np.flatnonzero(bad)[0])
    return index // (bad.size // len(bad)), float(values.flat[index])
