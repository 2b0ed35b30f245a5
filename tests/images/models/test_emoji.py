"""tiny-emoji: its transform, its weights, and what a run on it says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffrl.cli import main
from diffrl.images.emoji_words import PROMPTS
from diffrl.images.model import Lora
from diffrl.images.models import emoji, load_model
from diffrl.images.rewards.emoji import emoji_classifier
from diffrl.images.run import choose
from diffrl.support.errors import UserError
from diffrl.support.folder import Damaged

EPS = torch.finfo(torch.float32).eps


def test_the_transform_is_orthonormal_and_exact_on_what_it_keeps() -> None:
    """States -> pixels -> states is the identity, to rounding; so are smooth pictures; brightness is kept exactly."""
    rows = emoji.basis().flatten(1).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 24, 3, 5, generator=generator)
    torch.testing.assert_close(
        emoji.to_states(emoji.to_pixels(states)), states, rtol=0, atol=64 * EPS / min(emoji.SPREADS)
    )
    pixels = torch.randn(2, 3, 12, 20, generator=generator)
    kept = emoji.to_pixels(emoji.to_states(pixels))
    torch.testing.assert_close(kept.sum(1), pixels.sum(1), rtol=0, atol=2e-5)  # all of the brightness
    means = torch.nn.functional.avg_pool2d
    torch.testing.assert_close(means(kept, 4), means(pixels, 4), rtol=0, atol=5e-6)  # and each block's colour
    assert (kept - pixels).abs().max() > 0.1  # the fine colour is not


def test_a_coefficient_is_the_discrete_cosine_transforms() -> None:
    """SciPy's DCT-II of a block's brightness, before it is standardised."""
    from scipy.fft import dctn

    block = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)).expand(1, 3, 4, 4)
    expected = torch.from_numpy(dctn(block[0, 0].double().numpy(), norm="ortho")).flatten() * 3**0.5
    spreads, means = (torch.tensor(values) for values in (emoji.SPREADS, emoji.MEANS))
    coefficients = emoji.to_states(block)[0, :, 0, 0] * spreads + means
    torch.testing.assert_close(coefficients[:16], expected.float(), rtol=0, atol=2e-6)
    assert coefficients[16:].abs().max() < 1e-6  # a grey block has no colour


@pytest.fixture(scope="module")
def model() -> emoji.EmojiModel:
    made = load_model("tiny-emoji", lora=None)
    assert isinstance(made, emoji.EmojiModel)
    return made


def test_it_is_there_without_training(model: emoji.EmojiModel) -> None:
    assert model.shape == (24, 8, 8)
    images = torch.rand(2, 3, 32, 32)
    assert model.decode(model.encode(images)).shape == images.shape
    assert model.conditions(["blue heart"])["class_labels"].tolist() == [PROMPTS.index("blue heart")]
    with pytest.raises(UserError, match="did you mean 'heart'"):
        model.conditions(["hart"])
    with pytest.raises(UserError, match=r"\(3, 32, 32\)"):
        model.encode(torch.rand(1, 1, 8, 8))


def test_samples_are_what_the_prompts_say(model: emoji.EmojiModel) -> None:
    """Of a picture of each prompt, nine in ten by the classifier (.9 is what the model is shipped for)."""
    from diffrl.images.config import FinetuneConfig
    from diffrl.images.samples import RunState, Setup, chain_of, plain, roll_out

    config = FinetuneConfig(model="tiny-emoji", eval_samples=len(PROMPTS))
    setup = Setup(config, model, chain_of(model, config), plain(PROMPTS), None)
    samples = roll_out(setup, RunState(), torch.arange(len(PROMPTS)), setup.noise_path(0))
    assert float(emoji_classifier().agree(samples.images, PROMPTS).float().mean()) >= 0.9


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(emoji.WEIGHTS, tmp_path / "weights")
    file = tmp_path / "weights/tiny-emoji/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(emoji, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(Damaged, match="checksum"):
        load_model("tiny-emoji", lora=None)


def test_adapters_name_the_weights_that_they_were_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On others they mean nothing: those that name others are refused, those that name none are said to."""
    load_model("tiny-emoji", lora=Lora(rank=1)).save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny-emoji"
    assert settings["revision"] == emoji.shipped_weights()
    load_model("tiny-emoji", lora=None, adapter=tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "revision": "0" * 64}))
    with pytest.raises(UserError, match="was trained on other weights of tiny-emoji than this version") as raised:
        load_model("tiny-emoji", lora=None, adapter=tmp_path)
    assert "\n" not in str(raised.value)
    before = {**settings, "base_model_name_or_path": None, "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(before))
    load_model("tiny-emoji", lora=None, adapter=tmp_path)
    assert "does not say on which weights of tiny-emoji" in " ".join(capsys.readouterr().err.split())


def test_a_run_on_it_is_measured_by_its_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "finetune --queries 8 --batch 8 --updates 1 --steps 2 --eval-samples 4 --held-out emoji --out run"
    assert main([*words.split(), "--reward", "colour:blue + symmetry"]) == 0
    (first, last) = json.loads(Path("run/evaluations.json").read_text())
    assert {"class_accuracy", "class_entropy", "held_out", "reward: colour:blue", "reward: symmetry"} <= set(last)
    assert first["kl"] == 0.0


def test_a_picture_shows_many_objects_and_colours() -> None:
    """Of 84 prompts ten, no two of one object, a column each; of ten or fewer all."""
    chosen, columns = choose([prompt for prompt in PROMPTS for _ in range(2)])
    assert columns == [PROMPTS[i // 2] for i in chosen[:10]]
    assert len(columns) == 10
    assert chosen == [i + row for row in range(2) for i in chosen[:10]]
    objects = [PROMPTS[i // 2].split()[-1] for i in chosen[:10]]
    assert len(set(objects)) == 10
    assert len({PROMPTS[i // 2].split()[0] for i in chosen[:10]}) >= 6
    assert choose(["a", "a", "b", "b"]) == ([0, 1, 2, 3], ["a", "a", "b", "b"])
