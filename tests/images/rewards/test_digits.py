from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from diffrl.images.rewards import ask, digits, parse
from diffrl.support import folder
from diffrl.support.errors import UserError


@pytest.mark.long
@pytest.mark.parametrize("held_out", [False, True])
def test_classifiers_know_digits_they_never_saw(held_out: bool, cache: Path) -> None:
    """As accurate as the docstring says, and read back from the cache bit for bit."""
    images, labels = digits.unseen()
    assert images.shape == (297, 1, 8, 8)
    network = digits.classifier(held_out)
    measured = 0.970 if held_out else 0.976
    assert digits.accuracy(lambda x: network(x)) == pytest.approx(measured, abs=0.02)
    assert digits.accuracy(lambda x: network(x)) > 0.95
    assert len(list((cache / "models").glob("digit*.safetensors"))) >= 1
    again = digits.classifier(held_out)
    assert torch.equal(again(images), network(images))
    reward = parse("digit-held-out" if held_out else "digit")
    right = ask(reward, images, [str(label) for label in labels.tolist()])
    wrong = ask(reward, images, [str((label + 1) % 10) for label in labels.tolist()])
    assert right.mean() > 0.9
    assert wrong.mean() < 0.02


def test_the_digit_classifier_is_a_third_and_gives_probabilities() -> None:
    classify = digits.digit_classifier()
    assert digits.accuracy(classify) > 0.97
    images, _ = digits.unseen()
    probabilities = classify(images)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(297))
    assert probabilities.min() >= 0
    networks = [digits.classifier(False), digits.classifier(True)]
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = torch.stack([classify(noise).argmax(-1), *(net(noise).argmax(-1) for net in networks)])
    assert (answers[0] != answers[1]).float().mean() > 0.2
    assert (answers[1] != answers[2]).float().mean() > 0.2


def test_halves_and_test_share_no_digit() -> None:
    images, labels = digits.shuffled()
    assert len(images) == len(labels) == 1797
    assert digits.unseen()[0].data_ptr() == images[1500:].data_ptr()
    assert images.max() == 1
    assert images.min() == 0


def test_a_digit_is_one_output_and_all_ten_sum_to_one() -> None:
    images, _ = digits.unseen()
    values = torch.stack([ask(parse(f"digit:{d}"), images[:20], [""] * 20) for d in range(10)])
    torch.testing.assert_close(values.sum(0), torch.ones(20))
    assert torch.equal(ask(parse("digit"), images[:20], ["3"] * 20), values[3])


def test_ascent_on_the_pixels_makes_an_eight() -> None:
    """The gradient is of the right sign; the held-out network is less convinced (over-optimisation)."""
    images, labels = digits.unseen()
    x = images[labels == 3][:8].clone().requires_grad_()
    reward = parse("digit:8")
    before = ask(reward, x, [""] * 8)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(ask(reward, x, [""] * 8).log().sum(), x)
        x = (
            (x + 0.1 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None])
            .clamp(0, 1)
            .detach()
            .requires_grad_()
        )
    after = ask(reward, x, [""] * 8)
    assert before.mean() < 0.1 < 0.9 < after.mean()
    assert ask(parse("digit-held-out:8"), x, [""] * 8).mean() < after.mean()


def test_larger_images_and_colours_are_the_same_digit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of those in colour it is said, once: emoji would be seen as digits, too."""
    monkeypatch.setattr(folder, "_said", set())
    images, _ = digits.unseen()
    x = images[:5]
    reward = parse("digit:4")
    values = ask(reward, x, [""] * 5)
    large = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(ask(reward, large, [""] * 5), values)
    assert not capsys.readouterr().err, "as tiny-latents makes them"
    for _ in range(2):
        torch.testing.assert_close(ask(reward, large.expand(-1, 3, -1, -1), [""] * 5), values)
    said = " ".join(capsys.readouterr().err.split())
    assert said == "digit:4 is for handwritten digits: it sees images of 3x32x32 in grey, averaged to 1x8x8."


@pytest.mark.parametrize(("prompt", "digit"), [("0", 0), (" 7 ", 7), ("a handwritten 9.", 9)])
def test_the_prompt_names_a_digit(prompt: str, digit: int) -> None:
    assert digits.named_digit(prompt) == digit


@pytest.mark.parametrize("prompt", ["", "seven", "12", "3 or 5", "٣"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="does not name one digit"):
        digits.named_digit(prompt)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(UserError, match=r"\(2, 1, 7, 8\)"):
        digits.to_8x8(torch.zeros(2, 1, 7, 8))


def test_a_broken_file_in_the_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path))
    monkeypatch.setitem(digits.STEPS, True, 3)
    path = tmp_path / "models" / "digit-held-out-1.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"cut")
    made = digits.classifier(True).state_dict()
    written = path.read_bytes()
    assert written != b"cut"
    path.unlink()
    again = digits.classifier(True).state_dict()
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert path.read_bytes() == written


def test_a_classifier_that_was_kept_in_another_type_is_made_again(cache: Path) -> None:
    """As a caller's default type left it once."""
    expected = {name: value.clone() for name, value in digits.classifier().state_dict().items()}
    (file,) = (cache / "models").glob("digit-1.safetensors")
    safetensors.torch.save_file({name: value.double() for name, value in expected.items()}, file)
    torch.set_default_dtype(torch.float64)
    try:
        again = digits.classifier().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for state in (again, safetensors.torch.load_file(file)):
        assert all(
            torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items()
        )


def test_fitting_the_digit_classifier_draws_nothing_of_numpys_global_generator() -> None:
    before = repr(np.random.get_state())  # noqa: NPY002
    digits.digit_classifier.__wrapped__()
    assert repr(np.random.get_state()) == before  # noqa: NPY002
