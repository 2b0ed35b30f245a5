"""Rewards of a user's own file."""

from pathlib import Path

import pytest
import torch

from diffrl.images.rewards import RewardError, ask, ask_parts, parse
from diffrl.images.rewards.base import without_gradient
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

def listed(images, prompts, metadata):
    return ["good"] * len(images)
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
    for name, given in (("words", r"array\(.*\)"), ("listed", r"\['good', 'good', 'good'\]")):
        expected = f"#{name} gave {given}, which is no tensor, array or list of numbers; expected one number an image"
        with pytest.raises(UserError, match=expected):
            ask(parse(f"python:{file}#{name}"), images, ["p"] * 3)
    with pytest.raises(RewardError, match=r"raised ValueError: boom \(.*mine.py, line 16\)"):
        ask(parse(f"python:{file}#fails"), images, ["p"] * 3)
    with pytest.raises(RewardError, match="expected"):
        ask(parse(f"python:{file}#short"), images, ["p"] * 3)


IN_PLACE = """
import torch

def mul(images, prompts, metadata):
    images.mul_(0)
    prompts.clear()
    for row in metadata:
        row["deep"]["list"].append(1)
    return torch.arange(len(images)).float()

def view(images, prompts, metadata):
    images.numpy()[:] = 0
    return [0.0] * len(images)

def gradient(images, prompts, metadata):
    return images.sub_(0.5).mean((1, 2, 3))

gradient.differentiable = True

def constant(images, prompts, metadata):
    return torch.ones(len(images))

constant.differentiable = True

kept = torch.zeros(2)

def buffer(images, prompts, metadata):
    kept[:] = images.mean((1, 2, 3))
    return kept
"""


@pytest.fixture
def in_place(tmp_path: Path) -> Path:
    path = tmp_path / "in_place.py"
    path.write_text(IN_PLACE)
    return path


@pytest.mark.parametrize("name", ["mul", "view"])
def test_a_reward_that_works_in_place_changes_nothing_of_ours(in_place: Path, name: str) -> None:
    """Images, prompts and metadata are its own copies, so the other terms of a sum are what they are without it."""
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before, prompts, metadata = images.clone(), ["a", "b", "c"], [{"deep": {"list": [0]}} for _ in range(3)]
    alone = ask(parse("png"), images, prompts, metadata)
    _, parts = ask_parts(parse(f"python:{in_place}#{name} + png"), images, prompts, metadata)
    assert torch.equal(parts["png"], alone)
    assert torch.equal(images, before)
    assert prompts == ["a", "b", "c"]
    assert metadata == [{"deep": {"list": [0]}}] * 3


def test_a_gradient_through_changed_images_is_refused(in_place: Path) -> None:
    """By name, where it is asked for a gradient; and values without one, which backward() would trip over."""
    images = torch.rand(2, 1, 4, 4)
    changing, constant = (parse(f"python:{in_place}#{name}") for name in ("gradient", "constant"))
    torch.testing.assert_close(ask(changing, images, ["", ""]), images.mean((1, 2, 3)) - 0.5)
    images.requires_grad_()
    with pytest.raises(RewardError, match=r"in_place.py#gradient changes the images in place.*images.clone"):
        ask(changing, images, ["", ""])
    with pytest.raises(RewardError, match=r"in_place.py#constant says that it is differentiable.*no gradient"):
        ask(constant, images, ["", ""])


def test_values_that_a_reward_fills_again_are_copied(in_place: Path) -> None:
    """Answers of two calls that share memory would both be the second."""
    reward = parse(f"python:{in_place}#buffer")
    first = ask(reward, torch.zeros(2, 1, 4, 4), ["", ""])
    ask(reward, torch.ones(2, 1, 4, 4), ["", ""])
    assert first.tolist() == [0, 0]


ODD = """
import numpy as np
import torch

def two(images, prompts):
    return [0.0] * len(images)

async def later(images, prompts, metadata):
    return [0.0] * len(images)

class Own:
    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)

class Later:
    async def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)

own, later_too = Own(), Later()

def imaginary(images, prompts, metadata):
    return torch.fft.fft(images.mean((1, 2, 3)))

def array(images, prompts, metadata):
    return np.array([1j] * len(images))
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two", r"must take \(images, prompts, metadata\), and it takes \(images, prompts\)"),
        ("Own", r"is a class, which must take \(images, prompts, metadata\): name an object of it"),
        ("later", "`async def`"),
        ("later_too", "`async def`"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_refused_as_its_file_is_read(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    with pytest.raises(UserError, match=said):
        parse(f"python:{tmp_path / 'odd.py'}#{name}")


@pytest.mark.filterwarnings("error")
def test_complex_values_are_refused(tmp_path: Path) -> None:
    """Of a tensor and of an array: their imaginary part would be lost. An object of a class is a reward."""
    (tmp_path / "odd.py").write_text(ODD)
    for name in ("imaginary", "array"):
        with pytest.raises(RewardError, match="complex"):
            ask(parse(f"python:{tmp_path / 'odd.py'}#{name}"), torch.rand(3, 1, 4, 4), ["p"] * 3)
    assert ask(parse(f"python:{tmp_path / 'odd.py'}#own"), torch.rand(3, 1, 4, 4), ["p"] * 3).tolist() == [0, 0, 0]


def test_how_a_function_gets_a_gradient_is_said(file: Path) -> None:
    reward = parse(f"python:{file}#brightness")
    assert "write brightness.differentiable = True below it" in str(without_gradient(reward.name, "draft"))
