"""A ControlNet branch: zero at first, the only thing that learns, obeyed after a while, and diffusers' own on disk."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import denoising_loss, sample
from diffrl.images.model import Lora
from diffrl.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffrl.images.models.control import Control, control_model  # noqa: E402
from diffrl.images.models.pipelines import load_pipeline  # noqa: E402
from tests.images.tiny import ROUNDINGS, SCHEDULE, save_sd, save_sdxl  # noqa: E402
from tests.rounding import assert_equal_to_rounding  # noqa: E402

SIZE = 32
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("models") / "sd", size=SIZE)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, seed: int = 0) -> Tensor:
    """n flat colours (n, 3, H, W)."""
    return torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, SIZE, SIZE)


def control(folder: Path, controlnet: Path | None = None, **settings: Any) -> Control:
    return control_model(str(folder), controlnet=controlnet, **settings)


def stir(model: Control) -> None:
    """Move the branch off its zeros."""
    with torch.no_grad():
        for name, parameter in model.tuned.parameters().items():
            parameter += 0.05 * draws(*parameter.shape, seed=len(name))


@pytest.mark.parametrize(
    ("kind", "guidance", "precision"), [("sd", 1.0, "fp32"), ("sd", 3.0, "bf16"), ("sdxl", 3.0, "fp32")]
)
def test_a_new_branch_is_the_plain_unet_bit_for_bit(
    folder: Path, tmp_path: Path, kind: str, guidance: float, precision: str
) -> None:
    if kind == "sdxl":
        folder = save_sdxl(tmp_path / "sdxl", size=SIZE)
    plain = load_pipeline(str(folder), lora=Lora(1), precision=precision)  # frozen, as the controlled one is
    model = control(folder, precision=precision)
    x, t = draws(2, *model.shape), model.times(10)[3]
    condition = model.conditions(PROMPTS, {"control": pictures(2)})
    own = plain.conditions(PROMPTS)
    with torch.no_grad():
        m = plain.network(own, guidance=guidance)(x, t)
        assert torch.equal(model.network(condition, guidance=guidance)(x, t), m)
        stir(model)
        assert not torch.allclose(model.network(condition, guidance=guidance)(x, t), m)
        assert torch.equal(model.network(condition, guidance=guidance, reference=True)(x, t), m)


def test_the_branch_alone_has_a_gradient(folder: Path) -> None:
    model = control(folder)
    condition = model.conditions(PROMPTS, {"control": pictures(2)})
    unet = model.base.pipeline.unet  # type: ignore[attr-defined]
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    stir(model)
    x0, t = draws(2, *model.shape), torch.tensor([0.1, 1.0])
    denoising_loss(
        model.prediction, model.network(condition), x0, t, draws(*x0.shape, seed=1), event_dims=3
    ).mean().backward()
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.tuned.parameters().values())
    assert all(torch.equal(before[name], p) for name, p in unet.state_dict().items())
    assert not model.network(condition, reference=True)(x0.requires_grad_(), t).requires_grad


def test_control_is_obeyed_after_a_few_steps(tmp_path: Path) -> None:
    """Clean latents are 2 everywhere, or -2: the control image, white or black, says which, and the prompt does not."""
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, prediction_type="sample", clip_sample=False)
    model = control(save_sd(tmp_path / "sd", size=SIZE, scheduler=scheduler))
    sign = torch.tensor([1.0, -1.0]).repeat(2)
    x0 = 2 * sign[:, None, None, None].expand(-1, *model.shape)
    right = model.conditions(["a"] * 4, {"control": (sign > 0).float()[:, None, None, None].expand(-1, 3, SIZE, SIZE)})
    wrong = right | {"control": 1 - right["control"]}
    t = model.prediction.process.time(torch.tensor(5.0))  # as noisy as to leave little else to go by

    def loss(condition: dict[str, Tensor], seed: int) -> Tensor:
        noise = draws(*x0.shape, seed=seed)
        return denoising_loss(model.prediction, model.network(condition), x0, t, noise, event_dims=3).mean()

    with torch.no_grad():
        start = loss(right, 0)
        assert torch.equal(start, loss(wrong, 0))
    optimiser = torch.optim.AdamW(model.tuned.parameters().values(), 3e-3)
    for step in range(20):
        optimiser.zero_grad()
        loss(right, 1 + step).backward()
        optimiser.step()
    with torch.no_grad():
        end, astray = loss(right, 0), loss(wrong, 0)
    assert end < 0.9 * start
    assert end < 0.9 * astray


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_saved_it_is_diffusers_controlnet(folder: Path, tmp_path: Path, guidance: float) -> None:
    model = control(folder)
    stir(model)
    model.save(tmp_path)
    branch = diffusers.ControlNetModel.from_pretrained(tmp_path, use_safetensors=True)
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=branch, safety_checker=None, use_safetensors=True
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, set_alpha_to_one=True, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images, z = pictures(2, seed=3), draws(2, *model.shape)
    theirs = pipeline(
        PROMPTS, images, num_inference_steps=4, guidance_scale=guidance, latents=z, output_type="latent"
    ).images
    condition = model.conditions(PROMPTS, {"control": images})
    denoise = model.prediction.denoiser(model.network(condition, guidance=guidance))
    with torch.no_grad():
        ours = sample(model.prediction.process, denoise, z, model.times(4))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))


def test_a_trained_branch_goes_on_whole_or_by_adapters(folder: Path, tmp_path: Path) -> None:
    first = control(folder)
    stir(first)
    first.save(tmp_path)
    x, t = draws(2, *first.shape), torch.tensor(0.5)
    condition = first.conditions(PROMPTS, {"control": pictures(2)})
    with torch.no_grad():
        m = first.network(condition)(x, t)
    for lora in (None, Lora(2)):
        model = control(folder, tmp_path, lora=lora)
        network = model.network(model.conditions(PROMPTS, {"control": pictures(2)}))
        with torch.no_grad():
            assert_equal_to_rounding(network(x, t), m, ROUNDINGS)
        network(x, t).square().mean().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.tuned.parameters().values())


def test_the_seed_draws_the_branch(folder: Path) -> None:
    name = "controlnet_cond_embedding.conv_in.weight"
    one, same, other = (control(folder, seed=seed).tuned.state_dict()[name] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_it_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    model = control(folder)
    with pytest.raises(UserError, match="needs a 'control' image a prompt, of 32x32 pixels; got none"):
        model.conditions(PROMPTS)
    with pytest.raises(UserError, match=r"\(2, 3, 32, 32\); got \(2, 3, 16, 16\)"):
        model.conditions(PROMPTS, {"control": torch.zeros(2, 3, 16, 16)})
    with pytest.raises(UserError, match="no use for reference"):
        model.conditions(PROMPTS, {"control": pictures(2), "reference": pictures(2)})
    with pytest.raises(
        UserError, match=r"learn nothing, .* whole \(--lora 0\), or name a trained one \(--adapter FOLDER\)\."
    ):
        control(folder, lora=Lora())
    with pytest.raises(UserError, match="without adapters"):
        Control(load_pipeline(str(folder), lora=Lora()))
    with pytest.raises(UserError, match="weights of ControlNetModel are missing"):
        control(folder, tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        control(folder, tmp_path / "nothing")


@pytest.mark.parametrize("new", [True, False])
def test_the_unet_is_read_as_it_is_kept_and_never_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    """Or there would be four of it in memory. A new branch begins as the float32 in its files."""
    control(folder).save(tmp_path)
    read: list[torch.dtype] = []
    copied: list[type] = []
    kind = diffusers.UNet2DConditionModel
    from_pretrained, deepcopy = kind.from_pretrained.__func__, copy.deepcopy

    def counted(kind: Any, *arguments: Any, **named: Any) -> Any:
        read.append(named["torch_dtype"])
        return from_pretrained(kind, *arguments, **named)

    def noted(one: Any, *memo: Any) -> Any:
        copied.append(type(one))
        return deepcopy(one, *memo)

    monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    monkeypatch.setattr("diffrl.images.model.copy.deepcopy", noted)
    model = control(folder, None if new else tmp_path, precision="bf16")
    assert read == [torch.float32 if new else torch.bfloat16]
    assert diffusers.ControlNetModel in copied
    assert kind not in copied
    exact = kind.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    assert all(torch.equal(p, dict(exact.named_parameters())[n].bfloat16()) for n, p in model._unet.named_parameters())
    begins = dict(model.tuned.network.named_parameters())["conv_in.weight"]
    assert torch.equal(begins, exact.conv_in.weight)


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_frozen_is_in_the_precision_asked_for(folder: Path, tmp_path: Path, adapted: bool) -> None:
    """The U-Net, the autoencoder and the text encoder; under adapters the branch, too. What is trained is float32."""
    if adapted:
        trained = control(folder)
        stir(trained)
        trained.save(tmp_path)
    model = control(folder, tmp_path if adapted else None, lora=Lora(2) if adapted else None, precision="bf16")
    base: Any = model.base
    frozen = [model._unet, base.pipeline.vae, base.pipeline.text_encoder]
    assert {p.dtype for network in frozen for p in network.parameters()} == {torch.bfloat16}
    branch = model.tuned.network.parameters()
    assert {p.dtype for p in branch if not p.requires_grad} == ({torch.bfloat16} if adapted else set())
    assert {p.dtype for p in model.tuned.parameters().values()} == {torch.float32}
    condition = model.conditions(PROMPTS, {"control": pictures(2)})
    x, t = draws(2, *model.shape), model.times(10)[3]
    model.network(condition)(x, t).float().square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.tuned.parameters().values())
