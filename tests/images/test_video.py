"""Stable Video Diffusion, of a tiny random configuration: our denoiser and sampler against diffusers' own pipeline."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import VE, Prediction, denoising_loss, sample
from diffrl.images.model import Lora
from diffrl.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffrl.images.models.video import Video  # noqa: E402
from tests.images.tiny import ROUNDINGS, save_ddpm, save_svd, svd_scheduler  # noqa: E402
from tests.rounding import assert_equal_to_rounding, rounding  # noqa: E402

SIZE, FRAMES, FACTOR = 16, 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_svd(tmp_path_factory.mktemp("models") / "svd", size=SIZE, frames=FRAMES)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int) -> tuple[list[Any], Tensor]:
    """n images, as PIL's and as (n, 3, H, W) in [0, 1]."""
    from PIL import Image

    pixels = torch.randint(256, (n, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels], pixels.permute(0, 3, 1, 2) / 255


def test_edm_on_ve_is_the_schedulers_v_prediction_negated() -> None:
    euler, prediction = svd_scheduler(), Prediction("edm", VE())
    euler.set_timesteps(5)
    x, v = draws(2, 3, 4), draws(2, 3, 4, seed=1)
    for t, sigma in zip(euler.timesteps, euler.sigmas[:-1], strict=True):
        euler._step_index = None
        scaled = euler.scale_model_input(x * sigma, t)
        ours, label = prediction.inputs(x * sigma, sigma)
        assert_equal_to_rounding(ours, scaled, 8)
        assert_equal_to_rounding(label, t, 8, size=1.0)
        theirs = euler.step(v, t, x * sigma).pred_original_sample
        assert_equal_to_rounding(prediction.to_x0(-v, x * sigma, sigma), theirs, 16)


def test_sampling_is_the_pipelines(folder: Path) -> None:
    images, pixels = pictures(2)
    model = Video(folder, noise=0.0)
    assert model.shape == (FRAMES, 4, SIZE // FACTOR, SIZE // FACTOR)
    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    z, steps = draws(2, *model.shape), 4
    pipeline.scheduler.set_timesteps(steps)
    unit = pipeline.scheduler.init_noise_sigma / model.times(steps)[0]  # sqrt(1 + k^2) / k: "leading" spacing has it
    shared: dict[str, Any] = {"num_inference_steps": steps, "noise_aug_strength": 0.0, "output_type": "latent"}
    for guidance in (1.0, 2.5):
        theirs = pipeline(
            images, SIZE, SIZE, latents=z, min_guidance_scale=guidance, max_guidance_scale=guidance, **shared
        ).frames
        condition = model.conditions(["", ""], {"reference": pixels})
        denoise = model.prediction.denoiser(model.network(condition, guidance=guidance))
        times = model.times(steps)
        with torch.no_grad():
            ours = sample(model.prediction.process, denoise, z * unit * times[0], times)
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))
        with torch.no_grad():
            frames = pipeline.decode_latents(theirs, FRAMES, FRAMES).transpose(1, 2)
            assert_equal_to_rounding(model.decode(theirs), (frames / 2 + 0.5).clamp(0, 1), ROUNDINGS)


def test_gradients_of_pixels_out_of_range_lead_back(folder: Path) -> None:
    """As of images: a loss that would have a pixel darker reaches the latents of one too bright; the opposite not."""
    model = Video(folder)
    model.vae.decode = lambda z, num_frames: SimpleNamespace(sample=z[:, :3])
    z = torch.full((1, *model.shape), 5.0, requires_grad=True)
    (back,) = torch.autograd.grad(model.decode(z).sum(), z)
    (away,) = torch.autograd.grad(-model.decode(z).sum(), z)
    assert (back[:, :, :3] > 0).all()
    assert not away.any()


def test_the_condition_is_of_its_image_alone_and_noised_as_asked(folder: Path) -> None:
    _, pixels = pictures(2)
    clean, noisy = Video(folder, noise=0.0), Video(folder, noise=0.5)
    one, two = (noisy.conditions([""] * len(x), {"reference": x}) for x in (pixels[1:], pixels))
    assert_equal_to_rounding(one["latents"], two["latents"][1:], ROUNDINGS)
    plain = clean.conditions(["", ""], {"reference": pixels})
    assert torch.equal(plain["embedding"], two["embedding"])
    assert (plain["latents"] - two["latents"]).abs().mean() > 0.01
    assert two["ids"].tolist() == [[6, 127, 0.5]] * 2
    with pytest.raises(UserError, match="needs 'reference' images alone, got none"):
        clean.conditions([""])
    with pytest.raises(UserError, match="got control, reference"):
        clean.conditions([""], {"control": pixels[:1], "reference": pixels[:1]})


@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_supervised_steps_lower_the_loss_and_leave_the_reference(folder: Path, lora: Lora | None) -> None:
    model = Video(folder, lora=lora, seed=3)
    _, pixels = pictures(2)
    x0 = model.encode(pixels[:, None].expand(-1, FRAMES, -1, -1, -1))
    assert x0.shape == (2, *model.shape)
    condition = model.conditions(["", ""], {"reference": pixels})
    generator = torch.Generator().manual_seed(0)
    t, noise = model.training_times(2, generator), torch.randn(x0.shape, generator=generator)

    def loss(reference: bool = False) -> Tensor:
        network = model.network(condition, reference=reference)
        return denoising_loss(model.prediction, network, x0, t, noise, event_dims=len(model.shape)).mean()

    before = loss(reference=True)
    optimiser = torch.optim.AdamW(model.tuned.parameters().values(), 1e-3 if lora is None else 1e-2)
    values = []
    for _ in range(5):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[0] == pytest.approx(before.item(), rel=rounding(torch.float32, ROUNDINGS))
    assert loss() < values[0]
    assert torch.equal(loss(reference=True), before)


@pytest.mark.parametrize("lora", [None, Lora(2)])
def test_what_is_saved_loads_elsewhere(folder: Path, tmp_path: Path, lora: Lora | None) -> None:
    model = Video(folder, lora=lora)
    with torch.no_grad():
        for name, parameter in model.tuned.parameters().items():
            parameter += 0.05 * draws(*parameter.shape, seed=len(name))
    model.save(tmp_path)
    kind = diffusers.UNetSpatioTemporalConditionModel
    if lora is None:
        loaded = kind.from_pretrained(tmp_path / "unet", use_safetensors=True)
    else:
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "unet"), tmp_path)
    loaded.eval()
    inputs = draws(1, FRAMES, 8, 8, 8), torch.tensor(0.3), draws(1, 1, 16), draws(1, 3)
    with torch.no_grad():
        assert_equal_to_rounding(loaded(*inputs).sample, model.tuned(*inputs).sample, ROUNDINGS)
        assert not torch.equal(loaded(*inputs).sample, model.tuned(*inputs, reference=True).sample)


def test_half_precision_is_near(folder: Path) -> None:
    _, pixels = pictures(1)
    answers = []
    for precision in ("fp32", "bf16"):
        model = Video(folder, lora=Lora(2), precision=precision, noise=0.0)
        condition = model.conditions([""], {"reference": pixels})
        with torch.no_grad():
            answers.append(model.network(condition)(draws(1, *model.shape), torch.tensor(0.1)).float())
            assert model.decode(model.encode(pixels[:, None])).dtype is torch.float32
        assert all(p.dtype is torch.float32 for p in model.tuned.parameters().values())
    assert (answers[0] - answers[1]).abs().max() < 0.1 * answers[0].std()
    assert not torch.equal(*answers)


def test_weights_that_are_missing_are_said(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "svd")
    (tmp_path / "svd" / "image_encoder" / "model.safetensors").rename(tmp_path / "svd" / "image_encoder" / "a.bin")
    with pytest.raises(UserError, match="pickle format"):
        Video(tmp_path / "svd")


def test_what_is_no_such_pipeline_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no diffusers pipeline"):
        Video(tmp_path)
    with pytest.raises(UserError, match="expected a StableVideoDiffusionPipeline"):
        Video(save_ddpm(tmp_path / "ddpm"))
    with pytest.raises(UserError, match=f"that {FACTOR} divides"):
        Video(folder, size=(15, 16))
    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    pipeline.save_pretrained(tmp_path / "eps", safe_serialization=True)
    with pytest.raises(UserError, match="predicts epsilon"):
        Video(tmp_path / "eps")
