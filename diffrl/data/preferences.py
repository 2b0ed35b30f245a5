"""Preferences of one trajectory segment over another: their files, and how to make them from a data set's rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import safe_open

from diffrl.data.arrays import as_numbers
from diffrl.data.d4rl import digest
from diffrl.data.offline import Bools, Floats, Ints, OfflineDataset
from diffrl.data.values import segment_advantages, segment_returns
from diffrl.support import schema
from diffrl.support.errors import UserError, shown
from diffrl.support.files import atomic_path, is_safetensors, read_json, reading, regular_file
from diffrl.support.schema import Fraction, Many, Share
from diffrl.support.schema import held as checked

FORMAT, JSON_FORMAT = "diffrl-preferences-1", "diffrl-preferences-json-1"
"""The entry `format` of a file's header, and of a JSON file."""
_OTHERS = (".json", ".npz", ".npy", ".hdf5", ".h5", ".csv", ".pt", ".pkl")
"""How other kinds of file end."""
_COLUMNS = ("observations_w", "actions_w", "observations_l", "actions_l")
_KINDS = ("observations", "actions")
_TEACHER = 0x7EAC
"""Sets a teacher's random numbers apart from others of the same seed."""
_ROUNDING = 1e-9
"""Returns that differ by less than this share of the largest are equal."""
_ATTEMPTS = 100
"""How often pairs of equal worth are drawn again before all segments are taken to be equal."""


@dataclass(frozen=True, eq=False)
class Preferences:
    """N pairs of segments of H steps, the preferred one (w) and the other (l), in the environment's own units.

    Kept as float32, from arrays or lists; UserError is raised for what are no such arrays. As a file: safetensors with
    these tensors, `equal` (uint8) where any pair is, in its header `format` = diffrl-preferences-1 and `about` (JSON).
    """

    observations_w: Floats
    """(N, H, O)"""
    actions_w: Floats
    """(N, H, A)"""
    observations_l: Floats
    """(N, H, O)"""
    actions_l: Floats
    """(N, H, A)"""
    equal: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    """(N,) of which pairs neither is preferred, and w and l are names alone; by default of none."""

    def __post_init__(self) -> None:
        for name in (*_COLUMNS, "equal"):
            dtype = np.bool_ if name == "equal" else np.float32
            object.__setattr__(self, name, as_numbers(name, getattr(self, name), dtype))
        if not len(self.equal):
            object.__setattr__(self, "equal", np.zeros(self.observations_w.shape[:1], np.bool_))
        if self.equal.shape != self.observations_w.shape[:1]:
            raise UserError(f"equal has shape {self.equal.shape}; expected one entry a pair.")
        for name in _COLUMNS:
            column = getattr(self, name)
            if column.ndim != 3 or 0 in column.shape:
                raise UserError(f"{name} has shape {column.shape}; expected (pairs, steps, size).")
            if not np.isfinite(column).all():
                raise UserError(f"{name} of pair {np.argwhere(~np.isfinite(column))[0, 0]} is not finite.")
        for kind in _KINDS:
            w, l = getattr(self, f"{kind}_w"), getattr(self, f"{kind}_l")  # noqa: E741
            if w.shape != l.shape or w.shape[:2] != self.observations_w.shape[:2]:
                raise UserError(
                    f"{kind}_w and {kind}_l have shapes {w.shape} and {l.shape}; expected the same of both, and as "
                    f"many pairs and steps as observations_w has, {self.observations_w.shape[:2]}."
                )

    def __len__(self) -> int:
        return len(self.observations_w)

    @property
    def horizon(self) -> int:
        """H, the steps of a segment."""
        return int(self.observations_w.shape[1])

    def flipped(self) -> Preferences:
        """The same pairs with the opposite preferences."""
        return Preferences(self.observations_l, self.actions_l, self.observations_w, self.actions_w, self.equal)

    def take(self, pairs: Bools | Ints) -> Preferences:
        """Those pairs, by their numbers (n,) or a mask (N,)."""
        return replace(self, **{name: getattr(self, name)[pairs] for name in (*_COLUMNS, "equal")})

    def check_sizes(self, observation_size: int, action_size: int, source: str) -> None:
        """Raise UserError unless the columns are of these sizes. `source` is named in it."""
        sizes = self.observations_w.shape[2], self.actions_w.shape[2]
        if sizes != (observation_size, action_size):
            raise UserError(
                f"{source} holds observations of {sizes[0]} and actions of {sizes[1]} dimensions; the run's have "
                f"{observation_size} and {action_size}."
            )

    def check_preferred(self, source: str) -> None:
        """Raise UserError where no pair has a preference between segments that differ. `source` is named in it."""
        if self.equal.all():
            raise UserError(f"All {len(self)} pairs of {source} are labelled equal, so there is nothing to learn.")
        told = ~self.equal
        if all(np.array_equal(getattr(self, f"{kind}_w")[told], getattr(self, f"{kind}_l")[told]) for kind in _KINDS):
            raise UserError(
                f"In {source} the preferred segment of each of the {len(self)} pairs is the other one too, so there is "
                "nothing to learn; expected two segments that differ."
            )

    def write(self, path: Path | str, about: dict[str, object] | None = None) -> Path:
        """Write the pairs to a safetensors file and give its path. about: where they come from, kept in its header.

        Raises UserError for a path that ends as another kind of file does.
        """
        if Path(path).suffix.lower() in _OTHERS:
            raise UserError(f"{path}: preferences are written as safetensors; expected no other kind of file's name.")
        tensors: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(getattr(self, name)) for name in _COLUMNS}
        if self.equal.any():
            tensors["equal"] = self.equal.astype(np.uint8)
        header = {"format": FORMAT, "about": json.dumps(about or {})}
        with atomic_path(path) as temporary:
            safetensors.numpy.save_file(tensors, temporary, metadata=header)
        return Path(path)

    @classmethod
    def read(cls, path: Path | str) -> Preferences:
        """Read the pairs in a file that `write` made. Raises UserError where it is not one."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"There is no file of preferences {path}; `--preferences auto` makes them from the data.")
        regular_file(path, "a file of preferences")
        if not is_safetensors(path):
            raise UserError(f"{path} is not a file of preferences (JSON of `diffrl augment label`, or safetensors).")
        with reading(f"{path} is damaged"), safe_open(path, "np") as file:
            header, names = file.metadata() or {}, set(file.keys())
            if header.get("format") != FORMAT or not names.issuperset(_COLUMNS):
                raise UserError(
                    f"{path} is not a file of preferences: expected the format {FORMAT} and the tensors "
                    f"{', '.join(_COLUMNS)}, as `diffrl.data.preferences.Preferences.write` has them."
                )
            columns = [file.get_tensor(name) for name in (*_COLUMNS, "equal") if name in names]
        try:
            return cls(*columns)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def label_segments(
    dataset: OfflineDataset,
    pairs: int,
    segment: int,
    seed: int,
    *,
    by: Literal["advantage", "return"] = "advantage",
    discount: float = 0.99,
    temperature: float = 0.0,
    label_noise: float = 0.0,
) -> Preferences:
    """Draw pairs of segments from a data set's episodes and prefer the better one of each.

    by: what a segment's worth J is, its undiscounted return, or how much better it went than its start promised
    (`segment_advantages`, with `discount`). The latter is what the loss means: contrastive preference learning models
    preferences by regret. By returns, whatever is done where little can be earned, as at the start of an episode, is
    dispreferred.

    The segments start anywhere from which `segment` steps are left in the episode (and, for advantages, the state after
    them is known), uniformly. The first is preferred with probability sigmoid((J_1 - J_2) / temperature) (Bradley &
    Terry 1952); at temperature 0 the one with the larger J is, and pairs of equal ones, which say nothing, are drawn
    again. Then a share `label_noise` of the labels is swapped. Raises UserError where no episode is long enough, or
    where (almost) all segments are of equal worth.
    """
    rng = np.random.default_rng((seed, 0x9EF))
    starts = np.concatenate([np.arange(a, b - segment + 1) for a, b in dataset.episodes()])
    if by == "advantage" and len(starts):
        starts = starts[dataset.successors()[1][starts + segment - 1]]
    if len(starts) < 2:
        longest = int(dataset.episode_lengths().max(initial=0))
        raise UserError(f"--segment is {segment}, and the longest episode has {longest} steps; expected fewer.")
    if by == "advantage":
        worth = segment_advantages(dataset, starts, segment, discount, seed)
    else:
        worth = segment_returns(dataset, starts, segment, 1.0)
    drawn = rng.integers(len(starts), size=(pairs, 2))
    for _ in range(_ATTEMPTS):
        J = worth[drawn]
        equal = np.isclose(J[:, 0], J[:, 1], rtol=1e-9, atol=1e-9) & (temperature == 0)
        if not equal.any():
            break
        drawn[equal] = rng.integers(len(starts), size=(int(equal.sum()), 2))
    else:
        raise UserError(
            f"Of segments of {segment} steps hardly any two differ in {by}, so there is nothing to prefer: try a "
            "longer --segment, or a --temperature above 0."
        )
    gap = J[:, 0] - J[:, 1]
    # (1 + tanh(x / 2)) / 2 is the logistic function, and overflows nowhere.
    chance = (1 + np.tanh(gap / temperature / 2)) / 2 if temperature > 0 else (gap > 0).astype(np.float64)
    first = rng.random(pairs) < chance
    first ^= rng.random(pairs) < label_noise
    w, l = starts[np.where(first, drawn.T, drawn.T[::-1])]  # noqa: E741
    return _columns(dataset, w, l, segment, np.zeros(pairs, np.bool_))


def _columns(dataset: OfflineDataset, w: Ints, l: Ints, segment: int, equal: Bools) -> Preferences:  # noqa: E741
    """The segments of `segment` rows from each of the rows w (N,) and l (N,) on."""
    rows = {"w": w[:, None] + np.arange(segment), "l": l[:, None] + np.arange(segment)}
    return Preferences(**{f"{k}_{s}": getattr(dataset, k)[rows[s]] for s in "wl" for k in _KINDS}, equal=equal)


def _name(dataset: OfflineDataset) -> str:
    """What errors call a data set."""
    return str(dataset.metadata.get("dataset", "the data set"))


# --- labels of a data set's own segments ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """N pairs of segments of one data set, and which of each is preferred: a person's labels, or a teacher's.

    A segment is told by its id, the row at which it starts. As a file: JSON,

        {"format": "diffrl-preferences-json-1", "dataset": NAME, "fingerprint": SHA-256, "segment": H,
         "pairs": [{"segments": [ID, ID], "label": 0 | 1 | "equal"}, ...], "about": {...}}

    with label 0 where the first is preferred. Raises UserError for shapes and labels that are none, a segment compared
    with itself, and a pair with opposite labels.
    """

    dataset: str
    """The data set's name, for errors."""
    fingerprint: str
    """`data_fingerprint` of it."""
    segment: int
    """H, the rows of a segment."""
    pairs: Ints
    """(N, 2) the ids of both segments."""
    labels: NDArray[np.float64]
    """(N,) 0: the first is preferred; 1: the second; .5: neither."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where the labels come from, as JSON holds it."""

    def __post_init__(self) -> None:
        checked(self.segment, Many, "The preferences' `segment`")
        if self.pairs.shape != (len(self.labels), 2):
            raise UserError(f"pairs have shape {self.pairs.shape}; expected ({len(self.labels)}, 2), two ids a label.")
        if (bad := ~np.isin(self.labels, list(_WORDS))).any():
            raise UserError(f"pair {bad.argmax()}: the label is {self.labels[bad][0]:g}; expected 0, 1 or 0.5.")
        first, second = self.pairs.T
        if (same := first == second).any():
            raise UserError(f"pair {same.argmax()}: segment {first[same][0]} is compared with itself.")
        preferred: dict[tuple[int, int], int] = {}
        for n, (a, b, label) in enumerate(zip(first.tolist(), second.tolist(), self.labels.tolist(), strict=True)):
            w, l = (a, b) if label == 0 else (b, a)  # noqa: E741
            if label != 0.5 and (l, w) in preferred:
                raise UserError(
                    f"pairs {preferred[l, w]} and {n} contradict each other: opposite labels of the segments {a} and "
                    f"{b}. Remove one of the pairs."
                )
            if label != 0.5:
                preferred.setdefault((w, l), n)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls, dataset: OfflineDataset, segment: int, about: dict[str, Any] | None = None) -> LabelledPairs:
        """No pairs yet of a data set's segments. Raises UserError where it has no two segments of so many rows."""
        segment_starts(dataset, segment)
        none = np.zeros((0, 2), np.int64)
        return cls(_name(dataset), data_fingerprint(dataset), segment, none, np.zeros(0), about or {})

    def added(self, first: int, second: int, label: float) -> LabelledPairs:
        """These and one more pair. Raises UserError where it contradicts them."""
        pairs = np.append(self.pairs, np.array([[first, second]], np.int64), 0)
        return replace(self, pairs=pairs, labels=np.append(self.labels, label))

    def without_last(self) -> LabelledPairs:
        """These without the last pair, if there is any."""
        return replace(self, pairs=self.pairs[:-1], labels=self.labels[:-1])

    def head(self, pairs: int) -> LabelledPairs:
        """The first `pairs` pairs."""
        return replace(self, pairs=self.pairs[:pairs], labels=self.labels[:pairs])

    def flipped(self) -> LabelledPairs:
        """The same pairs with the opposite preferences."""
        return replace(self, labels=1 - self.labels)

    def check(self, dataset: OfflineDataset, source: str) -> None:
        """Raise UserError unless every segment lies within an episode of the data set, which is the labels' own.

        source: what to call the labels in the error, such as their file.
        """
        if self.fingerprint != (found := data_fingerprint(dataset)):
            raise UserError(
                f"{source} labels segments of another data set: of {self.dataset[:60]} with SHA-256 "
                f"{self.fingerprint[:12]}; {_name(dataset)} has {found[:12]}. Give the data set that was labelled, "
                "and as many of its rows (--rows)."
            )
        try:
            starts = segment_starts(dataset, self.segment, "Give the options that say where episodes end.")
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if (outside := ~np.isin(self.pairs, starts)).any():
            pair, id = int(np.argwhere(outside)[0, 0]), int(self.pairs[outside][0])
            if not 0 <= id < len(dataset):
                raise UserError(f"{source}, pair {pair}: there is no segment {id}; expected 0 to {len(dataset) - 1}.")
            last = int(dataset.episodes()[dataset.episode_indices()[0][id], 1]) - 1
            raise UserError(
                f"{source}, pair {pair}: segment {id} crosses its episode's end; {self.segment} rows from row {id} on "
                f"were expected, and the episode's last is row {last}. Give the options that say where episodes end as "
                "they were when it was labelled (--env, --time-limit-terminals, --cut-contradictions). Labels of an "
                "older version, which counted no episodes by a limit of steps, go on with --env none."
            )

    def write(self, path: Path | str) -> Path:
        """Write the JSON file, whole or not at all, and give its path. What `about` holds must be JSON."""
        about = {"format": JSON_FORMAT, "dataset": self.dataset, "fingerprint": self.fingerprint}
        head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
        rows = zip(self.pairs.tolist(), self.labels.tolist(), strict=True)
        lines = ",\n".join(json.dumps({"segments": ids, "label": _WORDS[label]}) for ids, label in rows)
        text = f'{{{head}"segment": {self.segment},\n"pairs": [\n{lines}\n],\n"about": {json.dumps(self.about)}}}\n'
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def read(cls, path: Path | str, dataset: OfflineDataset, *, empty: bool = False) -> LabelledPairs:
        """Read a JSON file of labels of this data set's segments: see `check`.

        empty: whether a file without pairs will do, as where labelling has just begun. Raises UserError where it is no
        such file.
        """
        path = Path(path)
        values = read_json(path, advice=_EXPECTED)
        if not isinstance(values, dict) or values.get("format") != JSON_FORMAT:
            raise UserError(f"{path} is no file of labelled pairs: it lacks the format {JSON_FORMAT}. {_EXPECTED}")
        about = schema.read(_File, {key: values[key] for key in values if key != "format"}, str(path))
        try:
            labelled = [_pair(pair, n) for n, pair in enumerate(about.pairs)]
            pairs = np.array([ids for ids, _ in labelled], np.int64).reshape(-1, 2)
            labels = np.array([label for _, label in labelled], np.float64)
            found = cls(about.dataset, about.fingerprint, about.segment, pairs, labels, about.about)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if not (len(found) or empty):
            raise UserError(f"{path} holds no pairs, so there is nothing to learn: label some first.")
        found.check(dataset, str(path))
        return found

    def segments(self, dataset: OfflineDataset) -> Preferences:
        """What was seen and done in the segments, the preferred one first; of equal ones, the first."""
        w, l = np.where(self.labels > 0.5, self.pairs.T[::-1], self.pairs.T)  # noqa: E741
        return _columns(dataset, w, l, self.segment, self.labels == 0.5)


@dataclass(frozen=True)
class _File:
    """The keys of a JSON file, besides `format`."""

    dataset: str
    fingerprint: str
    segment: Many
    pairs: tuple[Any, ...]
    about: dict[str, Any] = field(default_factory=dict)


_WORDS: dict[float, int | str] = {0.0: 0, 1.0: 1, 0.5: "equal"}
"""A label in a file, by what it is here."""
_EXPECTED = "Expected a file that `diffrl augment label` wrote."


def _pair(pair: Any, number: int) -> tuple[list[int], float]:
    """The ids and the label of one of a file's pairs. Raises UserError where it is none."""
    if not isinstance(pair, dict) or set(pair) != {"segments", "label"}:
        raise UserError(f"pair {number} is {shown(pair)}; expected the keys segments and label.")
    ids, label = pair["segments"], pair["label"]
    if not isinstance(ids, list) or len(ids) != 2 or any(type(id) is not int or not 0 <= id < 2**63 for id in ids):
        raise UserError(f"pair {number}: segments are {shown(ids)}; expected two ids, each the number of a row.")
    for value, word in _WORDS.items():
        if type(label) is type(word) and label == word:
            return ids, value
    raise UserError(f'pair {number}: the label is {shown(label)}; expected 0, 1 or "equal".')


def is_labelled(path: Path | str) -> bool:
    """Whether a file holds `LabelledPairs`, by its name, which ends in .json; any other has `Preferences`."""
    return Path(path).suffix.lower() == ".json"


def read_preferences(path: Path | str, dataset: OfflineDataset) -> Preferences:
    """Read preferences from either kind of file, of labelled segments of this data set or of whole segments.

    See `is_labelled` for which it is. Raises UserError where it is neither, or is not of data like these.
    """
    if is_labelled(path):
        return LabelledPairs.read(path, dataset).segments(dataset)
    found = Preferences.read(path)
    found.check_sizes(dataset.observation_size, dataset.action_size, str(path))
    return found


def data_fingerprint(dataset: OfflineDataset) -> str:
    """SHA-256 of the observations, by which labels know their data set.

    Of these alone: they stay as they are when the same data are taken in other units, or get other rewards.
    """
    return digest({"observations": dataset.observations})


def segment_starts(dataset: OfflineDataset, segment: int, advice: str = "") -> Ints:
    """The ids (n,) of all segments of so many rows that lie within an episode, ascending.

    Raises UserError where there are no two of them: the data have no episodes, or `segment` is longer than all. advice:
    what to do then, a sentence; by default to ask for segments that half of the episodes are long enough for.
    """
    longest = int(dataset.episode_lengths().max(initial=0))
    if longest <= 1:
        raise UserError(
            f"{_name(dataset)} has no episodes: each of its {len(dataset):,} rows is one of its own, as in generated "
            "transitions. Segments need data whose rows follow one another."
        )
    starts = np.concatenate([np.arange(a, b - segment + 1) for a, b in dataset.episodes()])
    if len(starts) < 2:
        lengths = np.sort(dataset.episode_lengths())[::-1]
        works = lengths[len(lengths) // 2] if len(lengths) > 1 else longest - 1
        advice = advice or f"Ask for --segment {works}, or fewer."
        raise UserError(f"Segments have {segment} rows, and the longest episode has {longest} steps. {advice}")
    return starts


def draw_pairs(starts: Ints, pairs: int, rng: np.random.Generator, beside: Ints | None = None) -> Ints:
    """Draw pairs (n, 2) of segments of these ids, uniformly: no two alike in either order, and none of those `beside`.

    beside: (m, 2) pairs. Raises UserError where there are not so many.
    """
    taken = np.zeros((0, 2), np.int64) if beside is None else beside
    seen = {(min(a, b), max(a, b)) for a, b in taken.tolist()}
    possible = len(starts) * (len(starts) - 1) // 2 - len(seen)
    if pairs > possible:
        raise UserError(
            f"{pairs:,} pairs were asked for; only {possible:,} are left of {len(starts):,} segments, as many as lie "
            "within an episode: ask for fewer pairs, or for shorter segments (a smaller --segment)."
        )
    drawn: list[tuple[int, int]] = []
    while len(drawn) < pairs:
        for a, b in starts[rng.integers(len(starts), size=(pairs, 2))].tolist():
            key = min(a, b), max(a, b)
            if a != b and key not in seen and len(drawn) < pairs:
                seen.add(key)
                drawn.append((a, b))
    return np.array(drawn, np.int64).reshape(-1, 2)


def teach(
    dataset: OfflineDataset, pairs: int, segment: int, seed: int, *, noise: float = 0.0, ties: float = 0.0
) -> LabelledPairs:
    """Label pairs of a data set's segments by their true returns, as a teacher would who errs and hesitates.

    The segments start anywhere, uniformly, and no pair comes twice. A share `ties` of the pairs, those whose returns
    differ least, is called equal, as are all of exactly equal returns. Of the others the segment of the larger return
    is preferred; then each of these labels is turned round with probability `noise`. All of it stands in `about`, with
    the numbers of labels that were in fact turned round and equal. Raises UserError where no episode is long enough,
    there are not so many pairs, or all returns are equal.
    """
    checked(pairs, Many, "The number of pairs to label")
    checked(noise, Fraction, "The share of wrong labels")
    checked(ties, Share, "The share of equal labels")
    rng = np.random.default_rng((seed, _TEACHER))
    drawn = draw_pairs(segment_starts(dataset, segment), pairs, rng)
    returns = segment_returns(dataset, drawn.reshape(-1), segment, 1.0).reshape(-1, 2)
    gap = returns[:, 1] - returns[:, 0]
    size = np.abs(gap)
    equal = size <= _ROUNDING * np.abs(returns).max()
    equal[np.argsort(size, kind="stable")[: round(ties * pairs)]] = True
    if equal.all():
        raise UserError(
            f"All {pairs} pairs of segments of {segment} steps have equal returns, so nothing is preferred: try a "
            "longer --segment, or more pairs."
        )
    wrong = (rng.random(pairs) < noise) & ~equal
    labels = np.where(equal, 0.5, (gap > 0) ^ wrong)
    about = {
        "teacher": "the data's own rewards, summed over a segment",
        "seed": seed,
        "noise": noise,
        "ties": ties,
        "turned round": int(wrong.sum()),
        "equal": int(equal.sum()),
        "largest difference called equal": float(size[equal].max(initial=0.0)),
    }
    return LabelledPairs(_name(dataset), data_fingerprint(dataset), segment, drawn, labels, about)
