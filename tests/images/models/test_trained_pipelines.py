"""What is trained of a pipeline: the reference beside it, its gradients, and files that diffusers loads."""

from pathlib import Path

import pytest
import torch

from diffrl.alignment.losses import ddpo_is_loss
from diffrl.diffusion import DenoisingChain
from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.pipelines import load_pipeline
from tests.images import tiny
from tests.images.models.pipeline_cases import PROMPTS, TEXT, diffusers_pipeline, noise, ours, stir, theirs
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding


@pytest.mark.parametrize(
    ("kind", "lora"), [*((kind, Lora()) for kind in (*TEXT, "ddpm")), ("sd", None), ("ddpm", None)]
)
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


@pytest.mark.long
@pytest.mark.parametrize(("kind", "alpha"), [("sd", None), ("sd", 16), ("sdxl", 16), ("sd3", 16)])
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
    assert_equal_to_rounding(images, theirs(pipeline, x), ROUNDINGS)
    assert (images - plain).abs().max() > 1e-3

    again = load_model(str(folders[kind]), lora=Lora(rank=7), adapter=tmp_path)
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
    model = load_model(str(folders["sd"]), lora=None, adapter=tmp_path)
    x = noise(model, 2)
    assert_equal_to_rounding(ours(model, x), theirs(pipeline, x), ROUNDINGS)


def test_adapters_of_a_pixel_network_load_in_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    model = load_pipeline(str(folders["ddpm"]), lora=Lora(rank=2, alpha=6))
    stir(model)
    model.save(tmp_path)
    x, t = noise(model, 2), model.times(4)[1]
    condition = model.conditions(["", ""])
    network = PeftModel.from_pretrained(diffusers_pipeline(folders["ddpm"]).unet, tmp_path)
    with torch.no_grad():
        assert_equal_to_rounding(model.network(condition)(x, t), network(x, 500).sample, ROUNDINGS)
        again = load_model(str(folders["ddpm"]), lora=None, adapter=tmp_path)
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


def test_checkpointing_covers_the_autoencoder(folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_pipeline(str(folders["sd"]), lora=Lora(), checkpointing=checkpointing)
        calls: list[int] = []
        model.pipeline.vae.decoder.mid_block.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        x0 = noise(model, 1).requires_grad_()
        gradients.append(torch.autograd.grad(model.decode(x0).square().sum(), x0)[0])
        assert len(calls) == (2 if checkpointing else 1)
    assert_equal_to_rounding(*gradients, ROUNDINGS)
    assert gradients[0].abs().max() > 0


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
        ).register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        network = model.network(model.conditions(prompts))
        loss = network(noise(model, 2), model.times(4)[1]).square().mean()
        named = model.tuned.parameters()
        gradients.append(torch.autograd.grad(loss, list(named.values())))
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
    for name, plain, checkpointed in zip(named, *gradients, strict=True):
        assert_equal_to_rounding(plain, checkpointed, ROUNDINGS)
        unused = kind == "sd3" and "blocks.1.attn.add_q_proj" in name  # the last block answers for the image alone
        assert (plain.abs().max() > 0) != unused, name


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


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_half_precision_is_near(kind: str, folders: dict[str, Path]) -> None:
    model = load_pipeline(str(folders[kind]), lora=Lora(), precision="bf16", channels_last=True)
    full = load_pipeline(str(folders[kind]), lora=Lora())
    for part in (model.pipeline.vae, model.pipeline.text_encoder, model.tuned.network):
        assert {p.dtype for p in part.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.tuned.parameters().values())
    x = noise(model, 2)
    images, expected = ours(model, x, steps=2), ours(full, x, steps=2)
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=0.1)
