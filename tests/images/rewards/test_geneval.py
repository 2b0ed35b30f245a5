"""Counts, colours and places of shapes that are drawn, by a detector that is exact on them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from diffrl.images.rewards import RewardError, ask, companion, parse
from diffrl.images.rewards.geneval import Detection, GenEval, sides
from diffrl.support.errors import UserError

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
Shape = tuple[str, str, int, int]
"""Its colour, what it is, and its centre (x, y)."""


def drawn(*shapes: Shape, side: int = 96) -> Tensor:
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    for color, kind, x, y in shapes:
        box = (x - 8, y - 8, x + 8, y + 8)
        (pen.rectangle if kind == "cube" else pen.ellipse)(box, fill=COLORS[color])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def detect(images: Tensor) -> list[list[Detection]]:
    """Exact for shapes that do not touch: a connected patch of one colour is a cube where it fills its box."""
    found: list[list[Detection]] = []
    for image in images:
        found.append([])
        pixels = (image * 255).round().permute(1, 2, 0).numpy()
        for color, rgb in COLORS.items():
            patches, _ = ndimage.label((pixels == rgb).all(-1))
            for number, (rows, columns) in enumerate(ndimage.find_objects(patches)):
                fill = (patches[rows, columns] == number + 1).mean()
                box = (columns.start, rows.start, columns.stop, rows.stop)
                found[-1].append(Detection("cube" if fill == 1 else "ball", box, 0.95, color))
    return found


def value(include: Any, *shapes: Shape, exclude: Any = (), partly: bool = False, **row: Any) -> float:
    metadata = {"include": include, "exclude": list(exclude), **row}
    return float(ask(GenEval(detect, partly=partly), drawn(*shapes)[None], ["p"], [metadata]))


BALL, BALL2, BALL3 = ("red", "ball", 20, 20), ("blue", "ball", 70, 20), ("red", "ball", 20, 70)
CUBE = ("green", "cube", 70, 70)


def test_counts() -> None:
    two = [{"class": "ball", "count": 2}]
    three = [{"class": "ball", "count": 3}]
    assert value(two, BALL, BALL2, exclude=three) == 1
    assert value(two, BALL, CUBE, exclude=three) == 0
    assert value(two, BALL, BALL2, BALL3) == 1, "at least two, and nothing is excluded"
    assert value(two, BALL, BALL2, BALL3, exclude=three) == 0
    for shapes, part in (((), 0), ((BALL,), 0.5), ((BALL, BALL2), 1), ((BALL, BALL2, BALL3), 0.5)):
        assert value(two, *shapes, exclude=three, partly=True) == part
    many = [("red", "ball", x, y) for x, y in itertools.product((12, 40, 70), (12, 40))]
    assert value(two, *many, partly=True) == 0, "never below 0"
    assert value([], BALL, exclude=[{"class": "cube", "count": 1}], partly=True) == 1
    assert value([], CUBE, exclude=[{"class": "cube", "count": 1}], partly=True) == 0


def test_colors() -> None:
    red = [{"class": "ball", "count": 2, "color": "red"}]
    assert value(red, BALL, BALL3) == 1
    assert value(red, BALL, BALL2) == 0
    assert value(red, BALL, BALL3, partly=True) == 1
    assert value(red, BALL, BALL2, partly=True) == pytest.approx((1 + 0.5) / 2)
    assert value(red, BALL, partly=True) == pytest.approx((0.5 + 0) / 2), "no colour where the count is not met"


def test_places() -> None:
    for side, (x, y) in {"left of": (20, 48), "right of": (80, 48), "above": (48, 20), "below": (48, 80)}.items():
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[side]
        shapes = ("green", "cube", 48, 48), ("red", "ball", x, y)
        for asked, expected in ((side, 1), (other, 0)):
            include = [{"class": "cube", "count": 1}, {"class": "ball", "count": 1, "position": [asked, 0]}]
            assert value(include, *shapes) == expected
            assert value(include, *shapes, partly=True) == pytest.approx((2 + expected) / 3)
    include = [{"class": "cube", "count": 1}, {"class": "ball", "count": 1, "position": ["left of", 0]}]
    assert value(include, BALL) == 0, "of nothing nothing is left"
    assert value(include, BALL, partly=True) == pytest.approx(1 / 3)


def test_sides_are_those_of_genevals_published_rule() -> None:
    """Written with its arrays: the offset of the centres, less a tenth of both boxes' sides, beside its length."""
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        a, b = np.sort(generator.uniform(0, 10, (2, 2, 2)), 1)
        offset = a.mean(0) - b.mean(0)
        left = np.maximum(np.abs(offset) - 0.1 * (np.diff(a, axis=0)[0] + np.diff(b, axis=0)[0]), 0) * np.sign(offset)
        dx, dy = left / np.linalg.norm(offset)
        expected = {"left of"} if dx < -0.5 else {"right of"} if dx > 0.5 else set()
        expected |= {"above"} if dy < -0.5 else {"below"} if dy > 0.5 else set()
        assert sides(a.flatten(), b.flatten()) == expected
        seen |= {frozenset(expected)}
    assert len(seen) == 9
    assert sides((0, 0, 2, 2), (0, 0, 2, 2)) == set()


def test_only_confident_detections_count_and_the_most_confident_first() -> None:
    def unsure(images: Tensor) -> list[list[Any]]:
        return [[("ball", (0, 0, 1, 1), 0.2), ("ball", (0, 0, 1, 1), 0.5, "blue"), ("ball", (5, 5, 6, 6), 0.95, "red")]]

    def verdict(**row: Any) -> float:
        return float(ask(GenEval(unsure), torch.zeros(1, 3, 8, 8), ["p"], [row]))

    assert verdict(include=[{"class": "ball", "count": 2}]) == 1
    assert verdict(include=[{"class": "ball", "count": 3}]) == 0
    assert verdict(include=[{"class": "ball", "count": 2}], tag="counting") == 0
    assert verdict(include=[{"class": "ball", "count": 1, "color": "red"}]) == 1
    assert verdict(include=[{"class": "ball", "count": 1, "color": "blue"}]) == 0


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"include": 3},
        {"include": [{"class": "ball"}]},
        {"include": [{"class": "ball", "count": 0}]},
        {"include": [{"class": "ball", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"class": "a", "count": 1}, {"class": "ball", "count": 1, "position": ["under", 0]}]},
    ],
)
def test_other_metadata_are_refused_in_a_line(row: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"the prompt 'two' needs GenEval's metadata") as caught:
        ask(GenEval(detect), torch.zeros(1, 3, 8, 8), ["two"], [row])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "gave 0 lists for 1 images"),
        (3, "gave what is no detection"),
        ([[("ball",)]], "gave what is no detection"),
        ([[("ball", (0, 0, math.nan, 1))]], "gave what is no detection"),
        ([[("ball", (5, 0, 1, 1))]], "gave what is no detection"),
    ],
)
def test_detectors_that_answer_nonsense_are_named(answer: Any, said: str) -> None:
    row = {"include": [{"class": "ball", "count": 1}]}
    with pytest.raises(RewardError, match=said):
        ask(GenEval(lambda images: answer), torch.zeros(1, 3, 8, 8), ["p"], [row])

    def fails(images: Tensor) -> Any:
        raise KeyError("boom")

    with pytest.raises(RewardError, match="raised KeyError: 'boom'"):
        ask(GenEval(fails), torch.zeros(1, 3, 8, 8), ["p"], [row])


def test_by_name_with_a_detector_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.images.rewards.test_geneval import detect\n")
    row = json.loads('{"include": [{"class": "ball", "count": 2, "color": "red"}]}')
    spec = f"geneval-part:{file}#detect"
    assert ask(parse(spec), drawn(BALL, BALL2)[None], ["p"], [row]).tolist() == [0.75]
    assert companion(spec) == f"geneval:{file}#detect"
    assert ask(parse(f"geneval:{file}#detect"), drawn(BALL, BALL3)[None], ["p"], [row]).tolist() == [1]
    with pytest.raises(UserError, match="no function 'detct'"):
        parse(f"geneval:{file}#detct")


@pytest.mark.parametrize("name", ["geneval", "geneval-part"])
def test_a_detector_that_is_not_there_is_told_of_its_own_reward(name: str, tmp_path: Path) -> None:
    file = tmp_path / "det.py"
    file.write_text("def find(images):\n    return [[]] * len(images)\n")
    with pytest.raises(UserError, match=rf"^{name}:.*det.py#nodet: .*det.py has no function 'nodet'"):
        parse(f"{name}:{file}#nodet")
