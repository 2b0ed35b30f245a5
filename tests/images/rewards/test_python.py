"""Rewards of a user's own file."""

from pathlib import Path

import pytest
import torch

from diffrl.images.rewards import RewardError, ask, parse
from diffrl.support.errors import UserError

FILE = """
import numpy as np

def brightness(images, prompts, metadata):
    return [float(x.mean()) + m["more"] for x, m in zip(images, metadata)]

def contrast(images, prompts, metadata):
    return images.std((1, 2, 3))

contrast.differentiable = True

def words(images, prompts, metadata):
    return np.array(["a"] * len(images))

def fails(images, prompts, metadata):
    raise ValueError("boom")

def short(images, prompts, metadata):
    return [1.0]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_is_a_reward(file: Path) -> None:
    """Lists become tensors, metadata arrives, weights apply, and a gradient passes where the function says so."""
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    reward = parse(f"2*python:{file}#brightness")
    values = ask(reward, images, ["p"] * 3, [{"more": float(i)} for i in range(3)])
    torch.testing.assert_close(values, 2 * (images.mean((1, 2, 3)) + torch.arange(3.0)))
    assert not reward.differentiable
    contrast = parse(f"python:{file}#contrast")
    assert contrast.differentiable
    ask(contrast, images.requires_grad_(), ["p"] * 3).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("absent.py#f", "no Python file absent.py"),
        ("{file}", "FILE.py#NAME"),
        ("{file}#brightnes", "did you mean 'brightness'"),
        ("{broken}#f", "ZeroDivisionError"),
    ],
)
def test_mistakes_are_named(argument: str, said: str, file: Path, tmp_path: Path) -> None:
    """No file, no name, a wrong name, a file that fails."""
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UserError, match=said):
        parse("python:" + argument.format(file=file, broken=broken))


def test_nonsense_is_named(file: Path) -> None:
    """Words for numbers; one value for three images."""
    images = torch.zeros(3, 1, 4, 4)
    with pytest.raises(UserError, match="no tensor, array or list of numbers"):
        ask(parse(f"python:{file}#words"), images, ["p"] * 3)
    with pytest.raises(RewardError, match=r"raised ValueError: boom \(.*mine.py, line 16\)"):
        ask(parse(f"python:{file}#fails"), images, ["p"] * 3)
    with pytest.raises(RewardError, match="expected"):
        ask(parse(f"python:{file}#short"), images, ["p"] * 3)
