"""Labelling: which pair comes next, what is chosen, and that it is saved at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal, TypeAlias

import numpy as np

from diffrl.augment.label.scenes import JSON, Scene, drawn
from diffrl.augment.label.worth import CANDIDATES, LEAST, LabelModels, Worth
from diffrl.data.offline import Ints, OfflineDataset
from diffrl.data.preferences import LabelledPairs, draw_pairs, segment_starts
from diffrl.support.errors import UserError, shown
from diffrl.support.seeds import mix
from envs.datasets import called

EVERY = 10
"""Labels between two reward models; with active choice, pairs that are chosen by one model."""
LABELS: dict[Any, float] = {0: 0.0, 1: 1.0, "equal": 0.5}
"""What the page may say of a pair, as the file has it, and the label that it is."""
_ORDER, _POOL = 1, 2
"""What random numbers are for: the order of random pairs; candidates."""

Pair: TypeAlias = tuple[int, int]
Learned: TypeAlias = "Future[tuple[Any, Worth | None] | None]"


class Session:
    """The labels of one file, and the page's calls that change them: `state`, `choose`, `undo`, `finish`.

    The calls come one at a time. Random pairs come in an order that the seed alone determines, so that who goes on
    later gets the pairs that are left. With `active` they are chosen in tens: of random candidates those that a reward
    model disagrees on most, which has learned from the labels up to ten before, so that nobody waits for it to learn.
    These depend on the seed and the labels given alone.

    labels: those that the file has. out: the file. pairs: how many labels there shall be. models: None measures
    nothing, and chooses at random. Raises UserError where there are not so many pairs.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        labels: LabelledPairs,
        out: Path,
        *,
        pairs: int,
        seed: int,
        scene: Scene | None = None,
        models: LabelModels | None = None,
        active: bool = False,
    ) -> None:
        self._dataset, self.labels, self._out, self._pairs, self._seed = dataset, labels, out, pairs, seed
        self._scene, self._learner, self._active = scene or Scene(), models, active and models is not None
        self._starts = segment_starts(dataset, labels.segment)
        # The first of more pairs are those of fewer.
        self._order = draw_pairs(self._starts, pairs, np.random.default_rng(mix((seed, _ORDER))))
        self._undone: list[Pair] = []
        self._chosen: dict[bytes, Ints] = {}
        self._models: dict[bytes, Learned] = {}
        self._worth = {n: Worth(n, asked, accuracy) for n, asked, accuracy in _points(labels.about)}
        self._unsaved, self._points_lock, self._closing = False, Lock(), Event()
        self._thread = ThreadPoolExecutor(1, "reward-model")
        self.finished = Event()
        """Set when the person says on the page that it is enough."""
        self._learn(len(labels) // EVERY * EVERY)

    # --- what the page asks for ---

    def state(self, asked: Any = None) -> JSON:
        """The pair to label, None where all are; how many labels there are; what they are worth."""
        pair = self._next()
        drawing = None if pair is None else drawn(self._dataset, self._scene, pair, self.labels.segment)
        return self.progress() | {"pair": None if pair is None else list(pair), "drawing": drawing}

    def progress(self, asked: Any = None) -> JSON:
        """How many labels there are, and what they are worth: `worth` has [labels, held-out pairs, accuracy].

        `intervals` has [lowest, highest] of each accuracy, see `Worth.interval`.
        """
        with self._points_lock:
            points = [self._worth[n] for n in sorted(self._worth) if n <= len(self.labels)]
        return {
            "dataset": called(self.labels.dataset),
            "labels": len(self.labels),
            "pairs": self._pairs,
            "worth": [list(point) for point in points],
            "intervals": [list(point.interval) for point in points],
            "learning": any(not model.done() for model in self._models.values()),
            "measured_every": EVERY if self._learner is not None else None,
            "measured_from": LEAST,
        }

    def choose(self, asked: Any) -> JSON:
        """Label a pair: {"number": labels so far, "pair": [a, b], "label": 0 | 1 | "equal"}; gives the next `state`.

        Saved before it answers. Raises UserError for another pair than the one that is asked about, which a second page
        may have labelled.
        """
        if not isinstance(asked, dict) or set(asked) != {"number", "pair", "label"}:
            raise UserError(f"The page sent {shown(asked)}; expected number, pair and label.")
        label, pair = asked["label"], self._next()
        if isinstance(label, bool) or not isinstance(label, int | str) or label not in LABELS:
            raise UserError(f'The page sent the label {shown(label)}; expected 0, 1 or "equal".')
        if pair is None or asked["number"] != len(self.labels) or asked["pair"] != list(pair):
            raise UserError("This pair has been labelled already, perhaps on another page.")
        self._save(self.labels.added(*pair, LABELS[label]))
        if self._undone and self._undone[-1] == pair:
            self._undone.pop()
        if len(self.labels) % EVERY == 0:
            self._learn(len(self.labels))
        return self.state()

    def undo(self, asked: Any = None) -> JSON:
        """Take the last label back, if there is one, and ask about its pair again; gives the `state`."""
        if len(self.labels):
            last: list[int] = self.labels.pairs[-1].tolist()
            self._save(self.labels.without_last())
            self._undone.append((last[0], last[1]))
        return self.state()

    def finish(self, asked: Any = None) -> JSON:
        """End the command."""
        self.finished.set()
        return self.progress()

    def calls(self) -> dict[str, Any]:
        """The calls by name."""
        names: Sequence[Literal["state", "progress", "choose", "undo", "finish"]]
        names = ("state", "progress", "choose", "undo", "finish")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Stop the model that is learning, and save what those before have said of the labels."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._unsaved and len(self.labels):
            self._save(self.labels)

    # --- which pair is next ---

    def _next(self) -> Pair | None:
        if len(self.labels) >= self._pairs:
            return None
        given = {_key(pair) for pair in self.labels.pairs.tolist()}
        while self._undone and _key(self._undone[-1]) in given:
            self._undone.pop()
        if self._undone:
            return self._undone[-1]
        left = (pair for part in (self._disputed(), self._order) for pair in part.tolist() if _key(pair) not in given)
        a, b = next(left)
        return a, b

    def _disputed(self) -> Ints:
        """The pairs (n, 2) that the model of the last ten but one chooses beside the labels before them; or none."""
        begun = len(self.labels) // EVERY * EVERY
        none = np.zeros((0, 2), np.int64)
        if not self._active or begun - EVERY < max(LEAST, 2 * EVERY):
            return none
        labels = self.labels.head(begun)
        if (key := _digest(labels)) not in self._chosen:
            assert self._learner is not None
            learned = self._learn(begun - EVERY).result()
            n, known = len(self._starts), len(labels)
            pool = min(CANDIDATES, n * (n - 1) // 2 - known)
            rng = np.random.default_rng(mix((self._seed, known, _POOL)))
            candidates = draw_pairs(self._starts, pool, rng, labels.pairs)
            segment = labels.segment
            # Of labels that are all equal nothing can be learned: then the pairs stay random.
            of_model = none if learned is None else self._learner.most_disputed(learned[0], candidates, segment, EVERY)
            self._chosen = {key: of_model}
        return self._chosen[key]

    # --- what the labels are worth ---

    def _learn(self, number: int) -> Learned:
        """The model of the first `number` labels, in the background; measured at the same time."""
        labels = self.labels.head(number)
        key = _digest(labels)
        if key not in self._models:
            self._models = dict(list(self._models.items())[-2:])
            self._models[key] = self._thread.submit(self._learned, labels)
        return self._models[key]

    def _learned(self, labels: LabelledPairs) -> tuple[Any, Worth | None] | None:
        learned = None if self._learner is None else self._learner.learn(labels, self._closing)
        if learned is not None and learned[1] is not None:
            with self._points_lock:
                self._worth[len(labels)], self._unsaved = learned[1], True
        return learned

    def _save(self, labels: LabelledPairs) -> None:
        """Write the labels, and then take them: what is not on the disk has not been given."""
        with self._points_lock:
            self._worth = {n: worth for n, worth in self._worth.items() if n <= len(labels)}
            points = [list(self._worth[n]) for n in sorted(self._worth)]
            self._unsaved = False
        labels = replace(labels, about=labels.about | {"accuracy": points})
        labels.write(self._out)
        self.labels = labels


def _key(pair: Sequence[int]) -> Pair:
    """A pair in either order."""
    return min(pair), max(pair)


def _digest(labels: LabelledPairs) -> bytes:
    """What tells labels from others."""
    return labels.pairs.tobytes() + labels.labels.tobytes()


def _points(about: dict[str, Any]) -> list[tuple[int, int, float]]:
    """What an earlier session measured; nothing of what somebody else may have written there."""
    points = about.get("accuracy")
    return [
        (point[0], point[1], float(point[2]))
        for point in (points if isinstance(points, list) else [])
        if isinstance(point, list)
        and [type(value) for value in point] in ([int, int, float], [int, int, int])
        and 0 <= point[2] <= 1 <= point[1]
        and point[0] % EVERY == 0
    ]
