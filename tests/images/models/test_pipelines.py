"""Our sampling of a pipeline is the pipeline's own."""

import json
from pathlib import Path

import pytest
import torch

from diffrl.diffusion import DenoisingChain, sample
from diffrl.images.model import Lora
from diffrl.images.models import pipelines, text
from diffrl.images.models.pipelines import load_pipeline
from tests.images import tiny
from tests.images.models.pipeline_cases import PROMPTS, TEXT, diffusers_pipeline, noise, ours, theirs
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", TEXT)
def test_a_deterministic_sample_is_the_pipelines_own(kind: str, guidance: float, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora())
    x = noise(model, 2)
    images = ours(model, x, guidance=guidance)
    expected = theirs(diffusers_pipeline(folders[kind]), x, guidance=guidance)
    assert images.shape == expected.shape
    assert_equal_to_rounding(images, expected, ROUNDINGS)
    assert images.std() > 0.05


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_sample_with_noise_is_the_pipelines_own(kind: str, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora())
    x = noise(model, 2)
    pipeline = diffusers_pipeline(folders[kind])
    expected = theirs(pipeline, x, guidance=3.0, eta=1.0, generator=torch.Generator().manual_seed(7))
    z = torch.Generator().manual_seed(7)
    steps = torch.stack([torch.randn(x.shape, generator=z) for _ in range(4)])
    assert_equal_to_rounding(ours(model, x, guidance=3.0, eta=1.0, noise=steps), expected, ROUNDINGS)


def test_the_pipelines_last_alpha_is_all_that_differs(folders: dict[str, Path]) -> None:
    # Stable Diffusion's set_alpha_to_one = False: the last step ends at alpha_bar_0, ours at clean data.
    model = load_pipeline(str(folders["sd"]), lora=Lora())
    x = noise(model, 2)
    pipeline = diffusers_pipeline(folders["sd"], set_alpha_to_one=False)
    latents = pipeline(prompt=PROMPTS, latents=x, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    table = -torch.log(pipeline.scheduler.alphas_cumprod[0])
    network = model.network(model.conditions(PROMPTS))
    times = torch.cat([model.times(4)[:-1], table[None]])
    with torch.no_grad():
        mine = sample(model.prediction.process, model.prediction.denoiser(network), x, times)
    assert_equal_to_rounding(mine, latents.images, ROUNDINGS)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions(prediction: str, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**tiny.SCHEDULE, clip_sample=False, prediction_type=prediction)
    folder = tiny.save_sd(tmp_path / "sd", scheduler=scheduler)
    model = load_pipeline(str(folder), lora=Lora())
    x = noise(model, 2)
    assert_equal_to_rounding(ours(model, x), theirs(diffusers_pipeline(folder), x), ROUNDINGS)


def test_pixels_without_prompts_are_the_pipelines_own(folders: dict[str, Path]) -> None:
    from diffusers import DDIMPipeline

    model = load_pipeline(str(folders["ddpm"]), lora=Lora())
    plain = diffusers_pipeline(folders["ddpm"])
    pipeline = DDIMPipeline(plain.unet, plain.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    expected = torch.as_tensor(made).movedim(-1, 1)
    network = model.network(model.conditions(["", ""]))
    with torch.no_grad():
        x0 = sample(
            model.prediction.process, model.prediction.denoiser(network), noise(model, 2), model.times(5), eta=0
        )
        assert_equal_to_rounding(model.decode(x0), expected, ROUNDINGS)


def test_pixels_of_ddpm_are_the_chain_with_the_models_clip(folders: dict[str, Path]) -> None:
    # DDPMPipeline's own sampler: the posterior, its x_0 clamped.
    from diffusers import DDPMPipeline

    model = load_pipeline(str(folders["ddpm"]), lora=Lora())
    pipeline = DDPMPipeline.from_pretrained(folders["ddpm"], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    expected = torch.as_tensor(made).movedim(-1, 1)
    z = torch.Generator().manual_seed(3)
    x, *steps = (torch.randn(2, *model.shape, generator=z) for _ in range(5))
    chain = DenoisingChain(model.prediction.process, model.times(5), clip=model.clip, event_dims=3)
    denoise = model.prediction.denoiser(model.network(model.conditions(["", ""])))
    with torch.no_grad():
        rollout = chain.rollout(denoise, x, noise=torch.stack([*steps, torch.zeros_like(x)]))
        assert_equal_to_rounding(model.decode(rollout.x), expected, ROUNDINGS)


def test_classes(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["classes"]), lora=Lora())
    x, t = noise(model, 2), model.times(4)[1]
    m = model.network(model.conditions(["3", "7"]))(x, t)
    swapped = model.network(model.conditions(["7", "3"]))(x.flip(0), t)
    assert_equal_to_rounding(m, swapped.flip(0), ROUNDINGS)
    assert not torch.allclose(m, model.network(model.conditions(["7", "3"]))(x, t), atol=1e-3)


def test_prompts_are_encoded_once_without_a_graph(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sd"]), lora=Lora())
    calls = []
    model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    condition = model.conditions(["a", "b", "a"])["encoder_hidden_states"]
    assert len(calls) == 2
    assert not condition.requires_grad
    assert torch.equal(condition[0], condition[2])
    assert not torch.equal(condition[0], condition[1])
    model.conditions(["b"])
    assert len(calls) == 2


def test_the_encodings_asked_for_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "KEPT", 2)
    calls: list[str] = []

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        calls.append(prompt)
        return {"length": torch.tensor([len(prompt)])}

    cache = pipelines.PromptCache(encode)
    assert cache.rows(["a", "bb", "ccc", "a"])["length"].tolist() == [1, 2, 3, 1]
    cache.rows(["bb"])
    cache.rows(["dddd"])
    cache.rows(["dddd"])
    assert calls == ["a", "bb", "ccc", "dddd"]
    cache.rows(["bb", "ccc"])
    assert calls[4:] == ["ccc"]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_prompt_that_is_cut_is_told_once(
    kind: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_told", set())
    model = load_pipeline(str(folders[kind]), lora=Lora())
    capfd.readouterr()
    model.conditions(["a cat"])
    assert capfd.readouterr().err == ""
    model.conditions(["[word] " * 300, "other " * 300])
    said = capfd.readouterr().err
    assert f"reads {256 if kind == 'sd3' else 16} tokens of a prompt, and '[word]" in said
    assert said.count("reads") == 1
    model.conditions(["more " * 300])
    assert capfd.readouterr().err == ""


def test_guidance_of_one_calls_the_network_once_on_one_batch(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sd"]), lora=Lora())
    sizes = []
    model.tuned.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    condition, x, t = model.conditions(PROMPTS), noise(model, 2), model.times(4)[:2]
    model.network(condition)(x, t[0])
    m = model.network(condition, guidance=2.0)(x, t)
    assert sizes == [2, 4]
    one = model.network({name: value[1:] for name, value in condition.items()}, guidance=2.0)(x[1:], t[1])
    assert_equal_to_rounding(m[1:], one, ROUNDINGS)  # a time a row goes with its row


@pytest.mark.parametrize("kind", TEXT)
def test_decoding_is_differentiable_and_encoding_is_the_posteriors_mean(kind: str, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora())
    x = noise(model, 2).requires_grad_()
    images = model.decode(x)
    assert images.shape == (2, 3, 32, 32)
    (gradient,) = torch.autograd.grad(images.mean(), x)
    assert gradient.abs().max() > 0
    vae = model.pipeline.vae
    latents = model.encode(images)
    with torch.no_grad():
        mean = vae.encode(2 * images - 1).latent_dist.mean
        expected = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert_equal_to_rounding(latents, expected, ROUNDINGS)
    assert not any(p.requires_grad for p in vae.parameters())
    inside = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample / 2 + 0.5
    assert_equal_to_rounding(model.decode(latents), inside.clamp(0, 1), ROUNDINGS)


def test_another_size(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sdxl"]), lora=Lora(), size=64)
    assert model.shape == (4, 32, 32)
    assert model.conditions(["a"])["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    x = noise(model, 2)
    expected = theirs(diffusers_pipeline(folders["sdxl"]), x, steps=2, height=64, width=64)
    assert_equal_to_rounding(ours(model, x, steps=2), expected, ROUNDINGS)


@pytest.mark.parametrize("absent", [(3,), (1,), (2, 3), (1, 2, 3)])
def test_text_encoders_of_stable_diffusion_3_may_be_absent(absent: tuple[int, ...], tmp_path: Path) -> None:
    folder = tiny.save_sd3(tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for number in absent:
        suffix = "" if number == 1 else f"_{number}"
        index[f"text_encoder{suffix}"] = index[f"tokenizer{suffix}"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = load_pipeline(str(folder), lora=Lora())
    condition = model.conditions(["a cat"])
    assert condition["encoder_hidden_states"].shape[2] == 64
    assert condition["pooled_projections"].shape == (1, 64)
    whole = load_pipeline(str(tiny.save_sd3(tmp_path / "whole")), lora=Lora()).conditions(["a cat"])
    clip, t5 = condition["encoder_hidden_states"].split([condition["encoder_hidden_states"].shape[1] - 256, 256], 1)
    whole_clip, whole_t5 = whole["encoder_hidden_states"].split([tiny.TOKENS, 256], 1)
    assert torch.equal(t5, torch.zeros_like(t5) if 3 in absent else whole_t5)
    for number, part in ((1, slice(0, 32)), (2, slice(32, 64))):
        states, pooled = clip[..., part], condition["pooled_projections"][..., part]
        if number in absent:
            assert not states.any()
            assert not pooled.any()
        else:
            assert torch.equal(states, whole_clip[..., part])
            assert torch.equal(pooled, whole["pooled_projections"][..., part])
    if absent == (3,):
        x = noise(model, 2)
        assert_equal_to_rounding(ours(model, x), theirs(diffusers_pipeline(folder), x), ROUNDINGS)
