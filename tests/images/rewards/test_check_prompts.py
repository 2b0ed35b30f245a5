"""A reward that reads prompts refuses one that it cannot take before a run makes an image."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrl.cli import main
from diffrl.images.rewards import RewardError, ask, ask_parts, parse
from diffrl.images.rewards.base import check_prompts
from diffrl.support.errors import UserError
from tests.images.rewards.test_reward_registry import bring, site

__all__ = ["site"]  # a fixture

GIVEN = {"include": [{"class": "ball", "count": 2}]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("reward", "good", "bad", "said"),
    [
        ("ocr", 'a sign that says "OPEN"', "a sign", "which text is to be read"),
        ("emoji", "a blue heart", "seven", "is for prompts of --model tiny-emoji"),
        ("emoji-clip", "a blue heart", "seven", "which object"),
        ("digit", "7", "a blue heart", "does not name one digit"),
        ("jpeg + 2*digit", "7", "seven hearts", "does not name one digit"),
    ],
)
def test_prompts_are_refused_as_a_call_does(reward: str, good: str, bad: str, said: str) -> None:
    """Also where the reward is part of a sum; without a prompt that is bad nothing is said."""
    built = parse(reward)
    check_prompts(built, [good], [{}])
    with pytest.raises(UserError, match=said):
        check_prompts(built, [good, bad], [{}, {}])
    with pytest.raises(UserError, match=said):
        ask(built, torch.rand(2, 3, 32, 32), [good, bad])


@pytest.mark.parametrize("reward", ["digit:8", "emoji:blue heart", "emoji-clip:blue heart"])
def test_a_reward_with_a_prompt_of_its_own_is_asked_without_any(reward: str) -> None:
    assert ask(parse(reward), torch.rand(4, 3, 32, 32), []).shape == (4,)


def test_rewards_that_read_no_prompts_take_all() -> None:
    """So do those with a prompt of their own; and None, where nothing is held out."""
    for reward in (None, parse("jpeg"), parse("digit:7"), parse("emoji:blue heart"), parse("ocr:OPEN")):
        check_prompts(reward, ["anything", ""], [{}, {}])


def test_genevals_metadata_are_looked_at_before(tmp_path: Path) -> None:
    """No detector is asked."""
    (tmp_path / "detector.py").write_text("def find(images):\n    raise SystemExit\n")
    reward = parse(f"geneval:{tmp_path}/detector.py#find")
    check_prompts(reward, ["two balls"], [GIVEN])
    with pytest.raises(RewardError, match="the prompt 'two' needs GenEval's metadata"):
        check_prompts(reward, ["two balls", "two"], [GIVEN, {}])


def test_a_run_is_refused_before_it_has_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --reward and as --held-out."""
    for option in ("--reward", "--held-out"):
        words = ["finetune", "--model", "tiny-emoji", "--reward", "jpeg", option, "ocr", "--out", str(tmp_path / "run")]
        assert main(words) == 2
        assert "which text is to be read" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


OWN = """
class Own:
    name, differentiable = "own", False

    def __call__(self, images, prompts, metadata):
        return images.flatten(1).mean(1)

    def check_prompts(self, prompts, metadata):
        if "blue heart" in prompts:
            raise UserError("own: 'blue heart' is no prompt.")
        prompts[0].index("a")

from diffrl.images.rewards import Entry
from diffrl.support.errors import UserError
own = Own()
TOY = Entry("toy", "mean brightness", "none", lambda argument, options: own)
"""


@pytest.mark.parametrize("whose", ["a file's", "a package's"])
def test_a_reward_of_ones_own_is_shown_the_prompts(
    whose: str, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it raises is its own line, also where it is no UserError; and no run has begun."""
    if whose == "a package's":
        bring(site, OWN)
        spec, name = "toy", "own"
    else:
        (tmp_path / "own.py").write_text(OWN)
        spec = name = f"python:{tmp_path}/own.py#own"
    built = parse(f"{spec} + jpeg")
    check_prompts(built, ["a cat"], [{}])
    with pytest.raises(UserError, match="own: 'blue heart' is no prompt"):
        check_prompts(built, ["a cat", "blue heart"], [{}, {}])
    with pytest.raises(RewardError, match=re.escape(f"The reward {name} raised, asked about the prompts, ValueError")):
        check_prompts(built, ["dog"], [{}])
    (tmp_path / "prompts.txt").write_text("blue heart\n")
    words = ["--model", "tiny-emoji", "--reward", spec, "--prompts", f"{tmp_path}/prompts.txt"]
    assert main(["finetune", *words, "--out", str(tmp_path / "run")]) == 2
    assert "own: 'blue heart' is no prompt." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "prompts", "metadata", "said"),
    [
        (torch.rand(3, 3, 8, 8), ["a"] * 2, None, "3 images with 2 prompts"),
        (torch.rand(3, 3, 8, 8), ["a"] * 3, [{}] * 2, "3 images with 2 metadata"),
        (255 * torch.ones(2, 3, 8, 8), ["a"] * 2, None, r"pixels from 255 to 255; they must be in \[0, 1\]"),
        (torch.linspace(-1, 1, 384).view(2, 3, 8, 8), ["a"] * 2, None, "pixels from -1 to 1"),
        (torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), ["a"] * 2, None, "pixels from 255 to 255"),
    ],
)
def test_what_is_asked_is_looked_at(images: torch.Tensor, prompts: list[str], metadata: Any, said: str) -> None:
    """Another number of prompts, or images on another scale, would be answered with numbers that mean nothing."""
    for reward in ("jpeg", "jpeg + png"):
        for question in (ask, ask_parts):
            with pytest.raises(UserError, match=said):
                question(parse(reward), images, prompts, metadata)


def test_rounding_is_no_mistake() -> None:
    """A bfloat16's: 1 + 2^-7 is the next number after 1, and is asked about; beyond that it is said by how much."""
    images = torch.rand(2, 3, 8, 8)
    images[0, 0, 0, 0] = 1 + 2**-7
    assert len(ask(parse("jpeg"), images, ["a"] * 2)) == 2
    images[0, 0, 0, 0] = 1.0079
    with pytest.raises(UserError, match=r"to 1\.0079; they must be in \[0, 1\]: clamp them, or divide"):
        ask(parse("jpeg"), images, ["a"] * 2)
