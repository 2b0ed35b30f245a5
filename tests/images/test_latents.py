"""tiny-latents: diffusers' own scheduler says the same of it, its seed decides all of it, and it learns its digits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.diffusion import denoising_loss, sample
from diffrl.images.examples import Digits
from diffrl.images.model import Lora
from diffrl.images.models import latents, training
from diffrl.images.models.latents import read_latents, tiny_latents, train_latents
from diffrl.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from tests.images.tiny import ROUNDINGS  # noqa: E402
from tests.rounding import assert_equal_to_rounding  # noqa: E402


class Few(Digits):
    """The first 64 digits: enough for what is tested here, and read in no time."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.images, self.prompts = self.images[:64], self.prompts[:64]


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "Digits", Few)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    train_latents(folder, vae_steps=2, steps=2)
    return folder


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(folder: Path) -> dict[str, Tensor]:
    model = read_latents(folder)
    return model.tuned.state_dict() | {f"vae.{n}": p for n, p in model.pipeline.vae.state_dict().items()}


@pytest.mark.long
def test_a_seed_decides_all_of_it(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    train_latents(tmp_path / "same", vae_steps=2, steps=2)
    train_latents(tmp_path / "other", vae_steps=2, steps=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (weights(f) for f in (folder, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    assert not torch.equal(first["vae.encoder.conv_in.weight"], other["vae.encoder.conv_in.weight"])


def test_it_is_trained_at_first_use_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path))
    monkeypatch.setattr(latents, "VAE_STEPS", 1)
    monkeypatch.setattr(latents, "STEPS", 1)
    first = tiny_latents(quiet=True)
    monkeypatch.setattr(latents, "train_latents", lambda *_, **__: pytest.fail("trained again"))
    second = tiny_latents(quiet=True)
    state = second.tuned.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.tuned.state_dict().items())
    assert not list(tmp_path.rglob("*.bin"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few: pytest.MonkeyPatch) -> Path:
    """A training of four steps of either part that is not cut."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    train_latents(folder, vae_steps=4, steps=4)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "at"),
    [
        ("vae_progress", 3),
        ("progress", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("vae_progress", 2), ("progress", 3))),
    ],
)
def test_a_training_that_is_cut_goes_on_bit_for_bit(
    part: str, at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what was kept last of either part: weights, Adam, rates and random numbers. It is then gone."""
    monkeypatch.setattr(training, "KEEP_EVERY", 2)

    def cut(done: int, of: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    folder = tmp_path / "models" / "tiny"
    with pytest.raises(KeyboardInterrupt):
        train_latents(folder, vae_steps=4, steps=4, **{part: cut})
    assert not folder.exists()
    made: dict[str, list[int]] = {"vae_progress": [], "progress": []}
    hear = {name: (lambda done, of, heard=heard: heard.append(done)) for name, heard in made.items()}
    train_latents(folder, vae_steps=4, steps=4, **hear)
    assert made[part] == [3, 4]
    assert made["vae_progress"] == ([3, 4] if part == "vae_progress" else [])
    again = weights(folder)
    assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_its_denoiser_and_its_steps_are_the_schedulers(folder: Path) -> None:
    model = read_latents(folder)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(4)
    x = noise = draws(2, *model.shape)
    condition = model.conditions(["3", ""])
    with torch.no_grad():
        for label in scheduler.timesteps:
            v = model.tuned(x, label, class_labels=condition["class_labels"]).sample
            x = scheduler.step(v, label, x).prev_sample
        denoise = model.prediction.denoiser(model.network(condition))
        ours = sample(model.prediction.process, denoise, noise, model.times(4))
    assert torch.allclose(ours, x, atol=1e-4)


def test_times_and_labels_are_inverse(folder: Path) -> None:
    model = read_latents(folder)
    table = -torch.log(model.pipeline.scheduler.alphas_cumprod.double())
    assert torch.allclose(model._schedule.label(table), torch.arange(1000.0), atol=1e-4)
    assert torch.allclose(model._schedule.label((table[4] + table[5]) / 2), torch.tensor(4.5))
    times = model.training_times(1000, torch.Generator().manual_seed(0))
    assert (times > 0).all()
    assert (times.unique()[:, None] - table.float()).abs().min(1).values.max() == 0


def test_guidance_is_between_its_prompt_and_none(folder: Path) -> None:
    model = read_latents(folder)
    x, t = draws(2, *model.shape), torch.tensor([0.5, 2.0])
    condition, none = model.conditions(["3", "7"]), model.conditions(["", ""])
    with torch.no_grad():
        m_c, m_u = model.network(condition)(x, t), model.network(none)(x, t)
        guided = model.network(condition, guidance=2.5)(x, t)
    assert (m_c - m_u).abs().max() > 1e-4
    assert_equal_to_rounding(guided, m_u + 2.5 * (m_c - m_u), ROUNDINGS)


@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_supervised_steps_lower_the_loss(folder: Path, lora: Lora | None) -> None:
    model = read_latents(folder, lora=lora)
    images, prompts, extras = Digits((32, 32)).batch(torch.arange(8))
    x0, condition = model.encode(images), model.conditions(prompts, extras)
    assert x0.shape == (8, *model.shape)
    t = model.training_times(8, torch.Generator().manual_seed(0))
    noise = draws(*x0.shape)
    optimiser = torch.optim.AdamW(model.tuned.parameters().values(), 1e-3 if lora is None else 1e-2)
    values = []
    for _ in range(6):
        loss = denoising_loss(model.prediction, model.network(condition), x0, t, noise, event_dims=3).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < values[0]


@pytest.mark.parametrize("lora", [None, Lora(2)])
def test_what_is_saved_loads_elsewhere(folder: Path, tmp_path: Path, lora: Lora | None) -> None:
    model = read_latents(folder, lora=lora)
    with torch.no_grad():
        for name, parameter in model.tuned.parameters().items():
            parameter += 0.1 * draws(*parameter.shape, seed=len(name))
    model.save(tmp_path)
    if lora is None:
        loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", use_safetensors=True)
    else:
        peft = pytest.importorskip("peft")
        base = diffusers.UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    inputs = draws(2, *model.shape), torch.tensor(300.0)
    classes = torch.tensor([3, 10])
    with torch.no_grad():
        ours = model.tuned(*inputs, class_labels=classes).sample
        assert_equal_to_rounding(loaded.eval()(*inputs, class_labels=classes).sample, ours, ROUNDINGS)
        assert not torch.allclose(model.tuned(*inputs, class_labels=classes, reference=True).sample, ours, atol=1e-5)


def test_decoding_is_differentiable_and_in_range(folder: Path) -> None:
    model = read_latents(folder)
    x0 = draws(2, *model.shape).requires_grad_()
    images = model.decode(x0)
    assert images.shape == (2, 1, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    images.mean().backward()
    assert x0.grad is not None
    assert x0.grad.abs().max() > 0


def test_latents_have_deviation_1_and_pass_as_the_autoencoders_own(folder: Path) -> None:
    model, images = read_latents(folder), Digits((32, 32)).images[:64]
    x0 = model.encode(images)
    assert x0.std().item() == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        own = (model.pipeline.vae(images[:4] * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
        assert_equal_to_rounding(model.decode(x0[:4]), own, ROUNDINGS)


def test_prompts_and_extras_it_cannot_take_are_said(folder: Path) -> None:
    model = read_latents(folder)
    with pytest.raises(UserError, match="0 to 9, or empty; got 'cat'"):
        model.conditions(["1", "cat"])
    with pytest.raises(UserError, match="no use for control"):
        model.conditions(["1"], {"control": torch.zeros(1, 3, 32, 32)})


@pytest.mark.slow
def test_trained_in_full_it_draws_its_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "Digits", Digits)
    from sklearn.svm import SVC

    def small(images: Tensor) -> object:
        return F.avg_pool2d(images, 4).flatten(1).numpy()

    train_latents(tmp_path / "tiny")
    model, examples = read_latents(tmp_path / "tiny"), Digits((32, 32))
    classifier = SVC().fit(small(examples.images), examples.prompts)
    prompts = [str(i % 10) for i in range(500)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        error = (model.decode(model.encode(examples.images[:256])) - examples.images[:256]).square().mean()
        denoise = model.prediction.denoiser(model.network(model.conditions(prompts)))
        x = torch.randn(500, *model.shape, generator=generator)
        x0 = sample(model.prediction.process, denoise, x, model.times(10), eta=1.0, generator=generator)
        share = classifier.score(small(model.decode(x0)), prompts)
    assert -10 * error.log10() > 30
    assert share > 0.93
