"""Are the right things there, as many, of the right colour, in the right place? GenEval's questions (Ghosh et al. 2023,
arXiv 2310.11513), answered by an object detector that the user brings.

What an image has to show stands in its prompt's metadata, as GenEval's `evaluation_metadata.jsonl` has it:

    {"prompt": "a photo of two red cubes left of a ball", "tag": "position",
     "include": [{"class": "ball", "count": 1},
                 {"class": "cube", "count": 2, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "cube", "count": 3}]}

"include": each class as often, at least; "color": each of them; "position": each of them relative to each object of the
entry with that number. "exclude": fewer of the class than so many.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.support.errors import first_line, out_of_memory, said_by, shown

CONFIDENT, COUNTED = 0.3, 0.9
"""Scores from which a detection counts; the second where the tag is "counting"."""
MOST = 16
"""Objects of a class that are looked at, the most confident ones."""
APART = 0.1
"""How far two centres must be apart, of the sum of the boxes' sides, for one to be beside the other."""
SIDES = ("left of", "right of", "above", "below")


class Detection(NamedTuple):
    """An object in an image: its class, its box (left, top, right, bottom) in pixels, its score, and its colour."""

    label: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str = ""
    """"" where the detector does not say; a prompt that asks for a colour then cannot be met."""


class Detector(Protocol):
    """Finds objects: images (B, 3 or 1, H, W) in [0, 1] -> for each the detections in it, in any order.

    A plain tuple in the order of `Detection` will do for one.
    """

    def __call__(self, images: Tensor, /) -> Sequence[Sequence[Detection | tuple[Any, ...]]]:
        """The detections in each of the images."""


class GenEval:
    """Whether images show what their prompts' metadata ask for: 1 or 0, or, `partly`, how much of it, in [0, 1].

    GenEval's verdict is the first. The second is Flow-GRPO's reward (arXiv 2505.05470, section 4.1): the mean over all
    that is asked for, of a count 1 - |found - wanted| / wanted, at least 0; of a colour the share that has it, of a
    position 1 or 0, both only where the count is met.

    Not differentiable. A call raises RewardError for a prompt without GenEval's metadata, and for a detector that fails
    or answers with something else than detections.
    """

    differentiable = False

    def __init__(self, detector: Detector, name: str = "geneval", *, partly: bool = False) -> None:
        self.detector, self.name, self.partly = detector, name, partly

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        self.check_prompts(prompts, metadata)
        found = self._detections(images)
        judge = part_of if self.partly else verdict
        values = [judge(objects(detections, row), row) for detections, row in zip(found, metadata, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _detections(self, images: Tensor) -> list[list[Detection]]:
        """The detector's answer, checked."""
        try:
            found = self.detector(images)
        except Exception as error:  # whatever a user's detector may raise
            if out_of_memory(error):
                raise
            raise RewardError(f"The detector of {self.name} raised {said_by(error)}.") from error
        try:
            checked = [[_detection(entry) for entry in entries] for entries in found]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"The detector of {self.name} gave what is no detection (label, box, score, color): {first_line(error)}"
            ) from error
        if len(checked) != len(images):
            raise RewardError(f"The detector of {self.name} gave {len(checked)} lists for {len(images)} images.")
        return checked

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise RewardError for a prompt without GenEval's metadata."""
        for prompt, row in zip(prompts, metadata, strict=True):
            self._check(prompt, row)

    def _check(self, prompt: str, row: Mapping[str, Any]) -> None:
        """Raise RewardError for metadata that are not GenEval's."""
        include, exclude = row.get("include", []), row.get("exclude", [])
        try:
            asked = [_asked(entry) for entry in [*include, *exclude]]
            sides = [(i, entry["position"]) for i, entry in enumerate(include) if "position" in entry]
            sound = all(side in SIDES and type(of) is int and 0 <= of < i for i, (side, of) in sides)
        except (TypeError, ValueError, KeyError, AttributeError):
            asked, sound = [], False
        if not asked or not sound:
            raise RewardError(
                f'{self.name}: the prompt {prompt!r} needs GenEval\'s metadata, such as "include": [{{"class": "ball", '
                f'"count": 2}}] in --prompts FILE.jsonl; it has {shown(dict(row))}'
            )


def _asked(entry: Mapping[str, Any]) -> tuple[str, int]:
    """Class and count of an entry. Raises ValueError, TypeError or KeyError for others."""
    if type(entry["count"]) is not int or entry["count"] < 1 or not isinstance(entry.get("color", ""), str):
        raise ValueError("a count is a whole number of at least 1, a color a text")
    return str(entry["class"]), entry["count"]


def _detection(entry: Sequence[Any]) -> Detection:
    """A detection of anything like one. Raises TypeError or ValueError."""
    found = Detection(*entry)
    left, top, right, bottom = (float(side) for side in found.box)
    if not all(map(math.isfinite, (left, top, right, bottom, float(found.score)))) or right < left or bottom < top:
        raise ValueError(f"box {shown(found.box)} with score {shown(found.score)}")
    return Detection(str(found.label), (left, top, right, bottom), float(found.score), str(found.color))


def objects(detections: Sequence[Detection], row: Mapping[str, Any]) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first."""
    least = COUNTED if row.get("tag") == "counting" else CONFIDENT
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda entry: -entry.score):
        if detection.score > least:
            found.setdefault(detection.label, []).append(detection)
    return {label: entries[:MOST] for label, entries in found.items()}


def verdict(found: Mapping[str, Sequence[Detection]], row: Mapping[str, Any]) -> float:
    """GenEval's: 1 where all that is to be there is, and nothing else; of more objects the most confident count."""
    matched: list[Sequence[Detection]] = []
    correct = True
    for entry in row.get("include", []):
        label, count = _asked(entry)
        chosen = found.get(label, [])[:count]
        met = len(chosen) == count
        met = met and ("color" not in entry or all(one.color == entry["color"] for one in chosen))
        met = met and ("position" not in entry or _placed(chosen, matched, entry["position"]))
        matched.append(chosen if met else [])
        correct = correct and met
    for entry in row.get("exclude", []):
        label, count = _asked(entry)
        correct = correct and len(found.get(label, [])) < count
    return float(correct)


def part_of(found: Mapping[str, Sequence[Detection]], row: Mapping[str, Any]) -> float:
    """Flow-GRPO's: the mean over counts, colours and positions of how far each is met."""
    matched: list[Sequence[Detection]] = []
    values: list[float] = []
    for entry in row.get("include", []):
        label, count = _asked(entry)
        chosen = found.get(label, [])
        values.append(max(0.0, 1 - abs(len(chosen) - count) / count))
        met = len(chosen) == count
        if "color" in entry:
            having = sum(one.color == entry["color"] for one in chosen)
            values.append(having / count if met else 0.0)
            met = met and having == count
        if "position" in entry:
            met = met and _placed(chosen, matched, entry["position"])
            values.append(float(met))
        matched.append(chosen if met else [])
    if not values:  # nothing to be there, and only things that are not to be
        return verdict(found, row)
    return sum(values) / len(values)


def _placed(chosen: Sequence[Detection], matched: Sequence[Sequence[Detection]], position: tuple[str, int]) -> bool:
    """Whether all chosen ones are on that side of all objects of another entry, which must have been met itself."""
    side, of = position
    return bool(matched[of]) and all(side in sides(one.box, other.box) for one in chosen for other in matched[of])


def sides(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """On which sides of the box b the box a is: none, one, or two, as "left of" and "above".

    What the centres are apart, less `APART` of both boxes' sides, must be more than half of their distance.
    """
    offsets = [((a[i] + a[i + 2]) - (b[i] + b[i + 2])) / 2 for i in (0, 1)]
    extents = [(a[i + 2] - a[i]) + (b[i + 2] - b[i]) for i in (0, 1)]
    distance = math.hypot(*offsets)
    if distance == 0:
        return set()
    x, y = (
        math.copysign(max(abs(offset) - APART * extent, 0), offset) / distance
        for offset, extent in zip(offsets, extents, strict=True)
    )
    where = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {side for side, holds in where.items() if holds}
