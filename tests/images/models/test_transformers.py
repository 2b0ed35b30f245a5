"""FLUX.1, FLUX.2-klein, Z-Image, Qwen-Image and SD 3.5: our sampling of a tiny pipeline is diffusers' own."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune, resume
from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.pipelines import PipelineModel, load_pipeline
from diffrl.images.models.transformers import EvenSchedule, pack, unpack
from diffrl.support.errors import UserError
from tests.images import newer, tiny
from tests.images.models.pipeline_cases import PROMPTS, diffusers_pipeline, noise, ours, stir
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding

KINDS = ("flux", "flux-dev", "klein", "zimage", "qwenimage", "sd35")


@pytest.fixture(scope="module")
def newer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("newer")
    return {
        "flux": newer.save_flux(base / "flux"),
        "flux-dev": newer.save_flux(base / "flux-dev", embeds=True),
        "klein": newer.save_klein(base / "klein"),
        "zimage": newer.save_zimage(base / "zimage"),
        "qwenimage": newer.save_qwenimage(base / "qwenimage"),
        "sd35": tiny.save_sd3(base / "sd35", qk_norm="rms_norm", dual_attention_layers=(0,)),
    }


def loaded(folder: Path, **options: Any) -> PipelineModel:
    """The model at 32 x 32 pixels with fresh adapters; without options one for all tests, which leave it as it is."""
    return load_pipeline(str(folder), **{"lora": Lora(), "size": 32, **options}) if options else _read(folder)


@functools.cache
def _read(folder: Path) -> PipelineModel:
    return load_pipeline(str(folder), lora=Lora(), size=32)


@functools.cache
def plain_pipeline(folder: Path) -> Any:
    return diffusers_pipeline(folder)


def theirs(kind: str, pipeline: Any, x: Tensor, guidance: float = 1.0, steps: int = 4, side: int = 32) -> Tensor:
    """As `pipeline_cases.theirs`, with each pipeline's own words for latents and guidance."""
    named: dict[str, Any] = {"guidance_scale": guidance}
    if kind == "zimage":
        named = {"guidance_scale": guidance - 1}
    elif kind in ("flux", "qwenimage") and guidance == 1:
        named = {}
    elif kind in ("flux", "qwenimage"):
        named = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
    latents = pack(x) if kind in ("flux", "flux-dev", "qwenimage") else x
    size = {"height": side, "width": side}
    images: Tensor = pipeline(
        prompt=list(PROMPTS), latents=latents, num_inference_steps=steps, output_type="pt", **size, **named
    ).images
    return images


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_pipelines_own(kind: str, newer_folders: dict[str, Path]) -> None:
    """From the same noise, with and without guidance, which matters; so do the prompts, of unequal lengths."""
    model, pipeline = loaded(newer_folders[kind]), plain_pipeline(newer_folders[kind])
    x = noise(model, 2)
    plain, guided = (ours(model, x, guidance=guidance) for guidance in (1.0, 6.0))
    assert_equal_to_rounding(plain, theirs(kind, pipeline, x), ROUNDINGS)
    assert_equal_to_rounding(guided, theirs(kind, pipeline, x, 6.0), ROUNDINGS)
    assert plain.shape == (2, 3, 32, 32)
    assert plain.std() > 0.05
    assert (plain - guided).abs().max() > 1e-5
    newer.assert_prompts_matter(model, x, PROMPTS)


def test_schnell_reads_the_tokens_that_it_was_trained_with(
    newer_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """256, as its model card has it, whatever the pipeline's default: its files tell. A cut prompt is told."""
    folder = newer.save_flux(tmp_path / "schnell", shifted=False)
    model, pipeline = loaded(folder, lora=Lora(2)), diffusers_pipeline(folder)
    x, size = noise(model, 2), {"height": 32, "width": 32}
    given = {"prompt": PROMPTS, "latents": pack(x), "num_inference_steps": 4, "output_type": "pt", **size}
    card, default = (pipeline(**given, **more).images for more in ({"max_sequence_length": 256}, {}))
    assert_equal_to_rounding(ours(model, x), card, ROUNDINGS)
    assert (card - default).abs().max() > 1e-4
    lengths = {kind: loaded(newer_folders[kind]).conditions(["a"]) for kind in ("flux", "flux-dev")}
    assert [c["encoder_hidden_states"].shape[1] for c in lengths.values()] == [512, 512]
    model.conditions(["a" * 300])
    assert "reads 256 tokens of a prompt" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sd35"])
def test_another_size_is_the_pipelines_own(kind: str, newer_folders: dict[str, Path]) -> None:
    """With the shift of its own number of tokens; by default the size is the pipeline's; others are refused."""
    model, pipeline = loaded(newer_folders[kind], size=48), plain_pipeline(newer_folders[kind])
    x = noise(model, 2)
    assert_equal_to_rounding(ours(model, x, steps=2), theirs(kind, pipeline, x, steps=2, side=48), ROUNDINGS)
    shape = type(model).state_shape(model.name, pipeline, pipeline.transformer, None)
    assert math.prod(shape) == 4 * 128 * 128
    with pytest.raises(UserError, match=r"A size of 30 pixels does not fit .* a multiple of 4"):
        loaded(newer_folders[kind], size=30)


def test_a_row_is_the_same_alone_and_beside_a_longer_prompt(newer_folders: dict[str, Path]) -> None:
    for kind in KINDS:
        model = loaded(newer_folders[kind])
        x, t = noise(model, 2), model.times(4)[1:3]
        with torch.no_grad():
            both = model.network(model.conditions(["a", "a much longer prompt"]), guidance=2.0)(x, t)
            one = model.network(model.conditions(["a"]), guidance=2.0)(x[:1], t[0])
        assert_equal_to_rounding(both[:1], one, ROUNDINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_inverts_the_scale_of_decoding(kind: str, newer_folders: dict[str, Path]) -> None:
    """The mean of the autoencoder's posterior, as latents of the model; FLUX.2's by its pipeline's own function."""
    model = loaded(newer_folders[kind])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vae = model.pipeline.vae
    with torch.no_grad():
        if kind == "klein":
            expected = model.pipeline._encode_vae_image(2 * images - 1, None)
        elif kind == "qwenimage":
            mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
            z = vae.encode(2 * images[:, :, None] - 1).latent_dist.mean[:, :, 0]
            expected = (z - mean[:, None, None]) / std[:, None, None]
        else:
            z = vae.encode(2 * images - 1).latent_dist.mean
            expected = (z - vae.config.shift_factor) * vae.config.scaling_factor
    latents = model.encode(images)
    assert latents.shape[1:] == model.shape
    assert_equal_to_rounding(latents, expected, ROUNDINGS)


def test_packing_is_fluxs_own() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_in_plain_diffusers_and_back(kind: str, newer_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(newer_folders[kind], lora=Lora(rank=2, alpha=6))
    stir(model)
    model.save(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    x = noise(model, 2)
    images = ours(model, x)
    pipeline = diffusers_pipeline(newer_folders[kind])
    plain = theirs(kind, pipeline, x)
    pipeline.load_lora_weights(tmp_path)
    assert_equal_to_rounding(images, theirs(kind, pipeline, x), ROUNDINGS)
    assert (images - plain).abs().max() > 1e-4
    again = load_model(str(newer_folders[kind]), lora=Lora(rank=7), adapter=tmp_path, size=32)
    assert torch.equal(ours(again, x), images)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["klein", "zimage", "qwenimage"])
def test_all_projections_of_attention_are_adapted(kind: str, newer_folders: dict[str, Path]) -> None:
    """No block without an adapter; layers that are named are taken at their word."""
    model = loaded(newer_folders[kind])
    network: Any = model.tuned.network
    adapted = {name.split(".lora_")[0] for name in model.tuned.parameters()}
    blocks = {name.rsplit(".", 1)[0] for name, _ in network.named_modules() if name.endswith((".attn", ".attention"))}
    assert blocks == {name.split(".att")[0] for name in adapted}
    few = loaded(newer_folders[kind], lora=Lora(targets=("to_add_out", "to_q")))
    assert all(".to_q." in name or ".to_add_out." in name for name in few.tuned.parameters())


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_all_adapters_have_one(kind: str, newer_folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = loaded(newer_folders[kind], checkpointing=checkpointing)
        stir(model)
        calls: list[int] = []
        network: Any = model.tuned.network
        blocks = network.layers if kind == "zimage" else network.transformer_blocks
        blocks[0].register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        m = model.network(model.conditions(PROMPTS))(noise(model, 2), model.times(4)[1])
        gradients.append(
            torch.autograd.grad(m.square().mean(), list(model.tuned.parameters().values()), allow_unused=True)
        )
        assert len(calls) == (2 if checkpointing else 1)
    for name, plain, checkpointed in zip(model.tuned.parameters(), *gradients, strict=True):
        unused = "to_add_out" in name or "add_q" in name  # what becomes of the text after the last block is dropped
        assert unused or plain.abs().max() > 0, name
        if plain is not None:
            assert_equal_to_rounding(plain, checkpointed, ROUNDINGS)


def test_a_network_trained_whole_is_saved_as_a_pipeline(newer_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(newer_folders["qwenimage"], lora=None)
    for parameter in model.tuned.parameters().values():
        parameter.data.mul_(1.1)
    model.save(tmp_path)
    x = noise(model, 2)
    images = ours(model, x)
    assert_equal_to_rounding(images, theirs("qwenimage", diffusers_pipeline(tmp_path), x), ROUNDINGS)
    assert torch.equal(ours(loaded(tmp_path), x), images)


def test_guidance_of_a_distilled_model_is_refused(tmp_path: Path) -> None:
    model = loaded(newer.save_klein(tmp_path / "klein", distilled=True))
    condition = model.conditions(PROMPTS)
    model.network(condition)
    with pytest.raises(UserError, match="is distilled, and takes no guidance: --guidance 1"):
        model.network(condition, guidance=4.0)


def test_training_times_have_the_shift_of_the_grid(newer_folders: dict[str, Path]) -> None:
    """Their median is the grid's middle, t = 1/2 shifted: of an even grid that step."""
    for kind in KINDS[:-1]:
        model = loaded(newer_folders[kind])
        schedule = model._schedule
        if kind == "qwenimage":  # its grid is stretched besides, so that its last step ends at .02
            schedule = EvenSchedule({**model.pipeline.scheduler.config, "shift_terminal": None}, 64)
        t = schedule.training_times(20_000, torch.Generator().manual_seed(0))
        assert ((t > 0) & (t < 1)).all()
        middle = float(schedule.times(50)[25])
        share = float((t < middle).float().mean())
        assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 20_000)), kind
        if kind != "klein":
            assert middle == pytest.approx(float(schedule.times(2)[1]))


def test_lean_drops_the_text_encoders_and_changes_nothing(newer_folders: dict[str, Path]) -> None:
    """The same encodings, guidance among them; another prompt is refused; the autoencoder works by tiles."""
    for kind in ("flux", "klein", "zimage", "qwenimage", "sd35"):
        full, lean = loaded(newer_folders[kind]), loaded(newer_folders[kind], lean=True)
        lean.settle(PROMPTS)
        assert not [part for name, part in lean.pipeline.components.items() if name.startswith("text_encoder") and part]
        x, t = noise(full, 2), full.times(4)[1]
        with torch.no_grad():
            m = lean.network(lean.conditions(PROMPTS), guidance=3.0)(x, t)
            assert torch.equal(m, full.network(full.conditions(PROMPTS), guidance=3.0)(x, t))
            assert torch.equal(lean.decode(x[:1]), full.decode(x[:1])), "an image of one tile"
        assert lean.pipeline.vae.use_tiling
        assert not full.pipeline.vae.use_tiling
        with pytest.raises(UserError, match=r"has dropped its text encoders \(--lean\), and the prompt 'b' was not"):
            lean.conditions(["b"])


def test_a_lean_run_goes_on_and_its_adapters_load(newer_folders: dict[str, Path], tmp_path: Path) -> None:
    """From prompts to a model, and on from its checkpoint, with no text encoder after the first moments."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nthe dog\n")
    config = FinetuneConfig(
        algo="nft",
        model=str(newer_folders["zimage"]),
        prompts=prompts,
        reward="jpeg",
        lora=2,
        size=32,
        lean=True,
        guidance=3.0,
        steps=2,
        batch=4,
        group=2,
        queries=4,
        updates=1,
        eval_samples=2,
        warm_up=0,
        out=tmp_path / "run",
    )
    run = finetune(config, quiet=True)
    resume(run, steps=8, quiet=True)
    pipeline = diffusers_pipeline(newer_folders["zimage"])
    x = noise(_read(newer_folders["zimage"]), 2)
    before = theirs("zimage", pipeline, x)
    pipeline.load_lora_weights(run / "model")
    assert not torch.equal(theirs("zimage", pipeline, x), before)


def test_tiles_are_those_of_diffusers(newer_folders: dict[str, Path]) -> None:
    """A larger image than a tile is decoded as the autoencoder's own tiling does it, and not as a whole."""
    full, lean = loaded(newer_folders["flux"], size=96), loaded(newer_folders["flux"], size=96, lean=True)
    for model in (full, lean):
        model.pipeline.vae.tile_sample_min_size, model.pipeline.vae.tile_latent_min_size = 32, 16
    z = noise(full, 1)
    with torch.no_grad():
        scaled = z / full.pipeline.vae.config.scaling_factor + full.pipeline.vae.config.shift_factor
        expected = full.pipeline.vae._tiled_decode(scaled) if hasattr(full.pipeline.vae, "_tiled_decode") else None
        if expected is None:
            expected = full.pipeline.vae.tiled_decode(scaled, return_dict=False)[0]
        assert_equal_to_rounding(lean.decode(z), (expected / 2 + 0.5).clamp(0, 1), ROUNDINGS)
        assert not torch.equal(lean.decode(z), full.decode(z))


def test_a_models_lora_is_a_copy(newer_folders: dict[str, Path]) -> None:
    lora = Lora(rank=3)
    model = loaded(newer_folders["klein"], lora=lora)
    assert lora == Lora(rank=3)
    assert model.tuned.lora == dataclasses.replace(lora, targets=type(model).targets)  # type: ignore[type-var]
