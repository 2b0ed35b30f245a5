"""Our sampling of a pipeline is the pipeline's own; what is trained is saved as diffusers loads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import DenoisingChain, sample
from diffrl.finetune.losses import ddpo_is_loss
from diffrl.finetune.model import Lora
from diffrl.finetune.models.pipelines import PipelineModel, load_pipeline
from tests.finetune import tiny

PROMPTS = ["a cat", "the dog!"]
TEXT = ("sd", "sdxl", "sd3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny.save_sd(base / "sd"),
        "sdxl": tiny.save_sdxl(base / "sdxl"),
        "sd3": tiny.save_sd3(base / "sd3"),
        "ddpm": tiny.save_ddpm(base / "ddpm"),
        "classes": tiny.save_ddpm(base / "classes", classes=10, clip_sample=False),
    }


def diffusers_pipeline(folder: Path, **scheduler: Any) -> Any:
    """diffusers' own, a discrete one with the DDIM scheduler that ends at alpha_bar = 1."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "transformer"):
        settings = {"set_alpha_to_one": True, "clip_sample": False, **scheduler}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


def noise(model: PipelineModel, *leading: int, seed: int = 0) -> Tensor:
    return torch.randn(*leading, *model.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(model: PipelineModel, x: Tensor, *, steps: int = 4, guidance: float = 1.0, **options: Any) -> Tensor:
    network = model.network(model.conditions(PROMPTS), guidance=guidance)
    process = model.prediction.process
    return model.decode(sample(process, model.prediction.denoiser(network), x, model.times(steps), **options))


def theirs(pipeline: Any, x: Tensor, *, steps: int = 4, guidance: float = 1.0, **options: Any) -> Tensor:
    images: Tensor = pipeline(
        prompt=PROMPTS,
        latents=x,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **options,
    ).images
    return images


def stir(model: PipelineModel, seed: int = 0) -> None:
    """Random adapters, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.tuned.parameters().values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", TEXT)
def test_a_deterministic_sample_is_the_pipelines_own(kind: str, guidance: float, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora())
    x = noise(model, 2)
    images = ours(model, x, guidance=guidance)
    expected = theirs(diffusers_pipeline(folders[kind]), x, guidance=guidance)
    assert images.shape == expected.shape
    assert torch.allclose(images, expected, atol=5e-6)
    assert images.std() > 0.05


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_sample_with_noise_is_the_pipelines_own(kind: str, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora())
    x = noise(model, 2)
    pipeline = diffusers_pipeline(folders[kind])
    expected = theirs(pipeline, x, guidance=3.0, eta=1.0, generator=torch.Generator().manual_seed(7))
    z = torch.Generator().manual_seed(7)
    steps = torch.stack([torch.randn(x.shape, generator=z) for _ in range(4)])
    assert torch.allclose(ours(model, x, guidance=3.0, eta=1.0, noise=steps), expected, atol=5e-6)


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
    assert torch.allclose(mine, latents.images, atol=2e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions(prediction: str, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**tiny.SCHEDULE, clip_sample=False, prediction_type=prediction)
    folder = tiny.save_sd(tmp_path / "sd", scheduler=scheduler)
    model = load_pipeline(str(folder), lora=Lora())
    x = noise(model, 2)
    assert torch.allclose(ours(model, x), theirs(diffusers_pipeline(folder), x), atol=5e-6)


def test_pixels_without_prompts_are_the_pipelines_own(folders: dict[str, Path]) -> None:
    from diffusers import DDIMPipeline

    model = load_pipeline(str(folders["ddpm"]), lora=Lora())
    plain = diffusers_pipeline(folders["ddpm"])
    pipeline = DDIMPipeline(plain.unet, plain.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images
    network = model.network(model.conditions(["", ""]))
    with torch.no_grad():
        x0 = sample(
            model.prediction.process, model.prediction.denoiser(network), noise(model, 2), model.times(5), eta=0
        )
        assert torch.allclose(model.decode(x0), expected, atol=5e-6)


def test_pixels_of_ddpm_are_the_chain_with_the_models_clip(folders: dict[str, Path]) -> None:
    # DDPMPipeline's own sampler: the posterior, its x_0 clamped.
    from diffusers import DDPMPipeline

    model = load_pipeline(str(folders["ddpm"]), lora=Lora())
    pipeline = DDPMPipeline.from_pretrained(folders["ddpm"], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="pt").images
    z = torch.Generator().manual_seed(3)
    x, *steps = (torch.randn(2, *model.shape, generator=z) for _ in range(5))
    chain = DenoisingChain(model.prediction.process, model.times(5), clip=model.clip, event_dims=3)
    denoise = model.prediction.denoiser(model.network(model.conditions(["", ""])))
    with torch.no_grad():
        rollout = chain.rollout(denoise, x, noise=torch.stack([*steps, torch.zeros_like(x)]))
        assert torch.allclose(model.decode(rollout.x), expected, atol=2e-5)


def test_classes(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["classes"]), lora=Lora())
    x, t = noise(model, 2), model.times(4)[1]
    m = model.network(model.conditions(["3", "7"]))(x, t)
    swapped = model.network(model.conditions(["7", "3"]))(x.flip(0), t)
    assert torch.allclose(m, swapped.flip(0), atol=1e-5)
    assert not torch.allclose(m, model.network(model.conditions(["7", "3"]))(x, t), atol=1e-3)


@pytest.mark.parametrize("kind", [*TEXT, "ddpm"])
@pytest.mark.parametrize("lora", [Lora(), None])
def test_the_reference_is_the_plain_network_bit_for_bit(kind: str, lora: Lora | None, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=lora)
    prompts = ["", ""] if kind == "ddpm" else PROMPTS
    condition, x, t = model.conditions(prompts), noise(model, 2), model.times(4)[1]
    plain = diffusers_pipeline(folders[kind])
    network = plain.transformer if kind == "sd3" else plain.unet
    label = model.network(condition)  # of an untrained model
    before = label(x, t)
    stir(model)
    with torch.no_grad():
        named = dict(condition)
        if kind == "sdxl":
            named = {
                "encoder_hidden_states": named.pop("encoder_hidden_states"),
                "added_cond_kwargs": named,  # type: ignore[dict-item]
            }
        time_label = t * 1000 if kind == "sd3" else plain.scheduler.alphas_cumprod.log().neg().sub(t).abs().argmin()
        expected = network(x, timestep=time_label.expand(2), return_dict=False, **named)[0]
    reference = model.network(condition, reference=True)(x, t)
    assert torch.equal(reference, expected)
    assert torch.equal(before, expected)
    assert not torch.allclose(model.network(condition)(x, t), expected, atol=1e-3)


@pytest.mark.parametrize("alpha", [None, 16])
@pytest.mark.parametrize("kind", TEXT)
def test_saved_adapters_load_in_plain_diffusers_and_back(
    kind: str, alpha: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora(rank=4, alpha=alpha))
    stir(model)
    model.save(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    x = noise(model, 2)
    images = ours(model, x)
    pipeline = diffusers_pipeline(folders[kind])
    plain = theirs(pipeline, x)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(images, theirs(pipeline, x), atol=5e-6)
    assert not torch.allclose(images, plain, atol=1e-2)

    again = load_pipeline(str(folders[kind]), lora=Lora(rank=7), adapter=tmp_path)
    assert again.tuned.state_dict().keys() == model.tuned.state_dict().keys()
    assert torch.equal(ours(again, x), images)


def test_adapters_that_diffusers_saved_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = diffusers_pipeline(folders["sd"])
    with tiny.seeded(1):
        targets = ["to_q", "ff.net.2"]
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets))
    configuration = pipeline.unet.peft_config["default"].to_dict()
    state = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=configuration)
    model = load_pipeline(str(folders["sd"]), lora=None, adapter=tmp_path)
    x = noise(model, 2)
    assert torch.allclose(ours(model, x), theirs(pipeline, x), atol=5e-6)


def test_adapters_of_a_pixel_network_load_in_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    model = load_pipeline(str(folders["ddpm"]), lora=Lora(rank=2, alpha=6))
    stir(model)
    model.save(tmp_path)
    x, t = noise(model, 2), model.times(4)[1]
    condition = model.conditions(["", ""])
    network = PeftModel.from_pretrained(diffusers_pipeline(folders["ddpm"]).unet, tmp_path)
    with torch.no_grad():
        assert torch.allclose(model.network(condition)(x, t), network(x, 500).sample, atol=1e-6)
        again = load_pipeline(str(folders["ddpm"]), lora=None, adapter=tmp_path)
        assert torch.equal(again.network(condition)(x, t), model.network(condition)(x, t))


@pytest.mark.parametrize("kind", ["sd", "sd3", "ddpm"])
def test_a_network_trained_whole_is_saved_as_a_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_pipeline(str(folders[kind]), lora=None)
    for parameter in model.tuned.parameters().values():
        parameter.data.mul_(1.1)
    model.save(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    again = load_pipeline(str(tmp_path), lora=Lora())
    prompts = ["", ""] if kind == "ddpm" else PROMPTS
    x, t = noise(model, 2), model.times(4)[1]
    m = model.network(model.conditions(prompts))(x, t)
    assert torch.equal(again.network(again.conditions(prompts), reference=True)(x, t), m)
    assert not torch.allclose(model.network(model.conditions(prompts), reference=True)(x, t), m, atol=1e-3)
    diffusers_pipeline(tmp_path)


@pytest.mark.parametrize("kind", [*TEXT, "ddpm"])
def test_checkpointing_changes_no_gradient_and_is_active(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["", ""] if kind == "ddpm" else PROMPTS
    gradients = []
    for checkpointing in (False, True):
        model = load_pipeline(str(folders[kind]), lora=Lora(), checkpointing=checkpointing)
        stir(model)
        assert not model.tuned.network.training
        calls = []
        hook = model.tuned.network.get_submodule(
            "transformer_blocks.0" if kind == "sd3" else "mid_block.resnets.1"
        ).register_forward_hook(lambda *_, seen=calls: seen.append(1))
        network = model.network(model.conditions(prompts))
        loss = network(noise(model, 2), model.times(4)[1]).square().mean()
        parameters = list(model.tuned.parameters().values())
        gradients.append(torch.autograd.grad(loss, parameters))
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)
        assert plain.abs().max() > 0


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


def test_guidance_of_one_calls_the_network_once_on_one_batch(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sd"]), lora=Lora())
    sizes = []
    model.tuned.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    condition, x, t = model.conditions(PROMPTS), noise(model, 2), model.times(4)[:2]
    model.network(condition)(x, t[0])
    m = model.network(condition, guidance=2.0)(x, t)
    assert sizes == [2, 4]
    one = model.network({name: value[1:] for name, value in condition.items()}, guidance=2.0)(x[1:], t[1])
    assert torch.allclose(m[1:], one, atol=1e-5)  # a time a row goes with its row


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
    assert torch.allclose(latents, expected, atol=1e-6)
    assert not any(p.requires_grad for p in vae.parameters())
    inside = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample / 2 + 0.5
    assert torch.allclose(model.decode(latents), inside.clamp(0, 1), atol=1e-6)


def test_the_chain_on_stable_diffusion_learns_by_ddpo(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sd"]), lora=Lora(), seed=1)
    chain = DenoisingChain(model.prediction.process, model.times(4), event_dims=3)
    denoise = model.prediction.denoiser(model.network(model.conditions(PROMPTS), guidance=2.0))
    rollout = chain.rollout(denoise, noise(model, 2), torch.Generator().manual_seed(0))
    assert rollout.states.shape == (5, 2, *model.shape)
    assert not rollout.states.requires_grad or rollout.states.grad_fn is None
    log_prob = chain.log_prob(denoise, rollout.states)
    assert torch.equal(log_prob, rollout.log_probs)  # ratio 1, to the bit

    advantages = torch.tensor([1.0, -1.0])
    loss, _ = ddpo_is_loss(log_prob, rollout.log_probs, advantages, clip_nats=10.0)
    loss.backward()
    trained = model.tuned.parameters()
    assert all("lora_" in name for name in trained)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    everything = [*model.tuned.network.named_parameters(), *model.pipeline.vae.named_parameters()]
    everything += list(model.pipeline.text_encoder.named_parameters())
    assert not [name for name, p in everything if p.grad is not None and "lora_" not in name]
    torch.optim.SGD(list(trained.values()), lr=1e-6).step()
    with torch.no_grad():
        change = (chain.log_prob(denoise, rollout.states) - rollout.log_probs).sum(0)
    assert change[0] > 0 > change[1]


def test_draft_reaches_the_adapters_through_the_autoencoder(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sd"]), lora=Lora(), checkpointing=True)
    chain = DenoisingChain(model.prediction.process, model.times(4), event_dims=3)
    denoise = model.prediction.denoiser(model.network(model.conditions(PROMPTS)))
    rollout = chain.rollout(denoise, noise(model, 2), torch.Generator().manual_seed(0), differentiable_steps=1)
    model.decode(rollout.x).mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.tuned.parameters().values())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_half_precision_is_near(kind: str, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora(), precision="bf16", channels_last=True)
    full = load_pipeline(str(folders[kind]), lora=Lora())
    assert next(model.pipeline.vae.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.tuned.parameters().values())
    x = noise(model, 2)
    images, expected = ours(model, x, steps=2), ours(full, x, steps=2)
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=0.1)


def test_another_size(folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders["sdxl"]), lora=Lora(), size=64)
    assert model.shape == (4, 32, 32)
    assert model.conditions(["a"])["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    x = noise(model, 2)
    expected = theirs(diffusers_pipeline(folders["sdxl"]), x, steps=2, height=64, width=64)
    assert torch.allclose(ours(model, x, steps=2), expected, atol=5e-6)


@pytest.mark.parametrize("absent", [(3,), (1,), (2, 3), (1, 2, 3)])
def test_text_encoders_of_stable_diffusion_3_may_be_absent(absent: tuple[int, ...], tmp_path: Path) -> None:
    import json

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
        assert torch.allclose(ours(model, x), theirs(diffusers_pipeline(folder), x), atol=5e-6)
