"""Colour and symmetry in closed form, and tiny-emoji's own rewards, through the registry as --reward spells them."""

import math

import pytest
import torch

from diffrl.images.emoji_words import COLOURS, OBJECTS, PROMPTS, class_of, words_of
from diffrl.images.rewards import RewardError, ask, parse
from diffrl.images.rewards.emoji import emoji_classifier, network, to_32x32
from diffrl.support.errors import UserError

CORNERS = {
    "red": (1, 0, 0),
    "yellow": (1, 1, 0),
    "green": (0, 1, 0),
    "cyan": (0, 1, 1),
    "blue": (0, 0, 1),
    "magenta": (1, 0, 1),
}
EPS = torch.finfo(torch.float32).eps


def images(n: int = 4, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def value(spec: str, batch: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
    return ask(parse(spec), batch, prompts or ["heart"] * len(batch))


def plain(rgb: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float32)[None, :, None, None].expand(1, 3, 5, 7)


def test_a_pure_colour_is_cosine_of_hues() -> None:
    """Of every two of the six corners of the circle: cos of the angle between them; red is 1 to the bit."""
    assert value("colour:red", plain((1, 0, 0))).item() == 1.0
    for i, mine in enumerate(CORNERS):
        for j, rgb in enumerate(CORNERS.values()):
            got = value(f"colour:{mine}", plain(rgb)).item()
            assert got == pytest.approx(math.cos((i - j) * math.pi / 3), abs=4 * EPS)


def test_colour_is_linear_and_blind_to_greys() -> None:
    """Half of each of two images, and a grey added; three hues a third of the circle apart add up to nothing."""
    a, b = images(seed=1), images(seed=2)
    both = (value("colour:blue", a) + value("colour:blue", b)) / 2
    torch.testing.assert_close(value("colour:blue", (a + b) / 4 + 0.25), both / 2, rtol=0, atol=8 * EPS)
    thirds = sum(value(f"colour:{hue}", a) for hue in ("15", "135", "255"))
    torch.testing.assert_close(thirds, torch.zeros(4), rtol=0, atol=8 * EPS)
    torch.testing.assert_close(value("colour:240", a), value("colour:blue", a), rtol=0, atol=0)
    assert value("colour:green", a[:, :1]).abs().max() < 4 * EPS  # of one channel: grey


def test_symmetry_is_the_correlation_with_the_mirror_image() -> None:
    """1 to the bit of what is its own mirror image; NumPy's correlation of one channel; -1 of what is opposite."""
    x = images(seed=3)
    assert value("symmetry", (x + x.flip(-1)) / 2).tolist() == [1.0] * 4
    assert value("symmetry", torch.full((1, 3, 8, 8), 0.3)).item() == pytest.approx(1.0, abs=8 * EPS)
    gray = x[:, :1]
    expected = [torch.corrcoef(torch.stack([g.flatten(), g.flip(-1).flatten()]).double())[0, 1] for g in gray]
    torch.testing.assert_close(value("symmetry", gray), torch.stack(expected).float(), rtol=0, atol=1e-4)
    slope = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    assert value("symmetry", slope).item() == pytest.approx(-1.0, abs=1e-4)
    torch.testing.assert_close(value("symmetry", x.flip(-1)), value("symmetry", x), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(
    "spec", ["colour:blue", "symmetry", "emoji", "emoji:blue heart", "emoji-held-out", "emoji-clip"]
)
def test_gradients_are_those_of_finite_differences(spec: str) -> None:
    """Along a random direction, in float32; a reward is its own image's alone."""
    reward, x = parse(spec), images(2).requires_grad_()
    (gradient,) = torch.autograd.grad(ask(reward, x, ["red apple", "frog"]).sum(), x)
    assert gradient.abs().max() > 0
    (first,) = torch.autograd.grad(ask(reward, x, ["red apple", "frog"])[0], x)
    assert first[1].abs().max() == 0
    v = gradient / gradient.norm()
    h = 1e-2
    with torch.no_grad():
        ahead, behind = (ask(reward, x + s * h * v, ["red apple", "frog"]).double().sum() for s in (1, -1))
    assert float((ahead - behind) / (2 * h)) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_emoji_is_the_product_of_object_and_colour() -> None:
    """Over all objects the prompts without a colour add up to 1, and so do the six colours of each to its object."""
    x = images(1)
    plain_ = {name: value(f"emoji:{name}", x).item() for name in OBJECTS}
    assert sum(plain_.values()) == pytest.approx(1.0, abs=16 * EPS)
    for name in OBJECTS[:3]:
        assert sum(value(f"emoji:{colour} {name}", x).item() for colour in COLOURS) == pytest.approx(plain_[name])
    torch.testing.assert_close(value("emoji", x, ["pink cat"]), value("emoji:pink cat", x), rtol=0, atol=0)


def test_the_classifier_agrees_with_its_own_answers() -> None:
    """The object it holds most probable, in its most probable colour, and in no other."""
    classifier, x = emoji_classifier(), images(3)
    things, colours = network("classifier")(x).split([len(OBJECTS), len(COLOURS)], -1)
    torch.testing.assert_close(classifier(x), things.softmax(-1), rtol=0, atol=0)
    for i, (thing, colour) in enumerate(zip(things.argmax(-1).tolist(), colours.argmax(-1).tolist(), strict=True)):
        agreed = [p for p in PROMPTS if classifier.agree(x[i : i + 1], [p]).item()]
        assert agreed == [OBJECTS[thing], f"{COLOURS[colour]} {OBJECTS[thing]}"]


def test_images_of_other_sizes_are_averaged() -> None:
    x = images(2)
    torch.testing.assert_close(to_32x32(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), x)
    assert to_32x32(x[:, :1, :8, :8]).shape == (2, 3, 32, 32)


def test_prompts_are_words() -> None:
    """Each prompt's class is its place; an article changes nothing."""
    assert [class_of(prompt) for prompt in PROMPTS] == list(range(len(PROMPTS)))
    assert words_of("A Blue heart") == (COLOURS.index("blue"), OBJECTS.index("heart"))
    assert words_of("an apple") == (None, OBJECTS.index("apple"))


def test_prompts_of_another_model_are_told_what_else_there_is() -> None:
    with pytest.raises(RewardError, match=r"for prompts of --model tiny-emoji; .* 'emoji:blue heart'. .* no '7'"):
        value("emoji", images(1), ["7"])
    assert 0 < value("emoji:star", images(1), ["7"]).item() < 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("colour:blu", "did you mean 'blue'"),
        ("colour", "needs an argument: colour:HUE"),
        ("symmetry:x", "takes no argument"),
        ("emoji:blue hart", "did you mean 'heart'"),
        ("emoji:mauve heart", "the colours: red"),
        ("emoji:two blue hearts", "expected an object"),
    ],
)
def test_mistakes_are_named(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(spec)
