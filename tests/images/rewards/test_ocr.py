"""Text that Pillow has drawn is read by the real networks; the reward is the edit distance's, written out plainly."""

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffrl.images.rewards import RewardError, ask, parse
from diffrl.images.rewards.ocr import OCR
from diffrl.support.errors import UserError


def drawn(*texts: str, side: int = 160) -> Tensor:
    pictures = []
    for text in texts:
        picture = Image.new("RGB", (side, side), "white")
        font = ImageFont.load_default(side / 6)
        ImageDraw.Draw(picture).multiline_text((side / 10, side / 3), text, fill=(0, 0, 160), font=font)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    return torch.stack(pictures)


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recursion's table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = min(table[i, j] + (a[i] != b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1)
    return int(table[-1, -1])


def test_what_is_written_is_read_and_what_is_not_scores_lower() -> None:
    images = drawn("OPEN 24", "OPEN 42", "", "HELLO")
    values = ask(parse("ocr:open 24"), images, [""] * 4)
    assert values.tolist() == pytest.approx([1, 1 - 2 / 6, 0, 1 - distance("hello", "open24") / 6])
    grey = images[:1].mean(1, keepdim=True)
    assert ask(parse("ocr:open 24"), grey, [""]).tolist() == [1]


def test_the_text_is_each_prompts_own() -> None:
    images = drawn("CLOSED", "CLOSED", "CLOSED", "CLOSED")
    prompts = ['a sign that says "closed"', "a sign, “Closed”", 'a sign that says "cloned"', "a sign"]
    values = ask(parse("ocr"), images, prompts, [{}, {}, {}, {"text": "closed"}])
    assert values.tolist() == pytest.approx([1, 1, 1 - 1 / 6, 1])
    with pytest.raises(RewardError, match=r"which text is to be read\? The prompt 'a sign' has none") as caught:
        ask(parse("ocr"), images[:1], ["a sign"])
    assert "\n" not in str(caught.value)


def test_the_value_is_that_of_the_edit_distance() -> None:
    reward = OCR()
    for wanted, read in itertools.product(["open", "Open 24", "ab"], ["", "opne", "reopened", "O P E N", "xyzxyzxyz"]):
        a, b = wanted.replace(" ", "").lower(), read.replace(" ", "").lower()
        expected = 1.0 if a in b else 1 - min(distance(a, b), len(a)) / len(a)
        assert reward.value(wanted, read) == pytest.approx(expected)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'diffrl\[ocr\]'"):
        parse("ocr")
    with pytest.raises(UserError, match="the text to be read"):
        OCR("  ")
