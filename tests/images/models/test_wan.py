"""Wan, of a tiny random configuration: our sampling of images and of videos is diffusers' own."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import denoising_loss
from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune, resume
from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.pipelines import PipelineModel, load_pipeline
from diffrl.images.models.schedules import schedule_of
from diffrl.images.rewards import Sum, ask
from diffrl.images.rewards.base import shown
from diffrl.images.rewards.human import Human
from diffrl.images.world import World
from diffrl.support.errors import UserError
from tests.images import newer, tiny
from tests.images.models.pipeline_cases import PROMPTS, diffusers_pipeline, noise, ours, stir
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding

KINDS = ("wan", "wan22", "a14b")
SECOND = "pytorch_lora_weights_2.safetensors"


@pytest.fixture(scope="module")
def wans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("wan")
    return {
        "wan": newer.save_wan(base / "wan"),
        "wan22": newer.save_wan(base / "wan22", newer=True),
        "a14b": newer.save_wan(base / "a14b", second=True),
    }


def loaded(folder: Path, **options: Any) -> PipelineModel:
    return load_pipeline(str(folder), **{"lora": Lora(), "size": 32, **options})


@functools.cache
def plain_pipeline(folder: Path) -> Any:
    return diffusers_pipeline(folder)


def load_adapters(pipeline: Any, folder: Path) -> None:
    """Both networks' where there are two."""
    pipeline.load_lora_weights(folder)
    if pipeline.transformer_2 is not None:
        pipeline.load_lora_weights(folder, weight_name=SECOND, load_into_transformer_2=True)


def theirs(pipeline: Any, x: Tensor, guidance: float = 1.0, steps: int = 4) -> Tensor:
    """diffusers' videos (B, F, 3, 32, 32) from the latents x."""
    frames = 1 + 4 * (x.shape[2] - 1)
    videos: Tensor = pipeline(
        prompt=list(PROMPTS),
        latents=x,
        num_frames=frames,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
    ).frames
    return videos


@pytest.mark.long
@pytest.mark.parametrize("frames", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_pipelines_own(kind: str, frames: int | None, wans: dict[str, Path]) -> None:
    """From the same noise, with and without guidance, which matters; an image is a video of one frame."""
    model, pipeline = loaded(wans[kind], frames=frames), plain_pipeline(wans[kind])
    x = noise(model, 2)
    plain, guided = (ours(model, x, guidance=guidance) for guidance in (1.0, 6.0))
    one = [video if frames else video[:, 0] for video in (theirs(pipeline, x), theirs(pipeline, x, 6.0))]
    assert_equal_to_rounding(plain, one[0], ROUNDINGS)
    assert_equal_to_rounding(guided, one[1], ROUNDINGS)
    assert plain.shape == ((2, 5, 3, 32, 32) if frames else (2, 3, 32, 32))
    assert plain.std() > 0.01
    assert (plain - guided).abs().max() > 1e-5
    newer.assert_prompts_matter(model, x, PROMPTS)


def test_unipcs_grid_and_its_first_order_are_ours(tmp_path: Path) -> None:
    """Without its corrector, and told whole labels as UniPC tells them, its steps of first order are ours."""
    folder = newer.save_wan(tmp_path / "unipc", unipc=True)
    model, pipeline = loaded(folder), diffusers_pipeline(folder)
    pipeline.scheduler.set_timesteps(4)
    assert torch.equal(model.times(4), pipeline.scheduler.sigmas)
    settings = {"solver_order": 1, "disable_corrector": list(range(4))}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    exact, plain = model._schedule.label, noise(model, 2)
    assert float(exact(torch.tensor(0.5))) == 500
    model._schedule.label = lambda t: exact(t).floor()  # type: ignore[method-assign]
    assert_equal_to_rounding(ours(model, plain), theirs(pipeline, plain)[:, 0], ROUNDINGS)
    t = model._schedule.training_times(20_000, torch.Generator().manual_seed(0))
    middle = 3 * 0.5 / (1 + 2 * 0.5)
    assert float((t < middle).float().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 20_000))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_inverts_the_scale_of_decoding(kind: str, wans: dict[str, Path]) -> None:
    for frames in (1, 5):
        model = loaded(wans[kind], frames=frames)
        videos = torch.rand(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        vae = model.pipeline.vae
        with torch.no_grad():
            z = vae.encode(2 * videos.transpose(1, 2) - 1).latent_dist.mean
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        expected = (z - mean[:, None, None, None]) / std[:, None, None, None]
        latents = model.encode(videos if frames > 1 else videos[:, 0])
        assert latents.shape[1:] == model.shape
        assert_equal_to_rounding(latents, expected, ROUNDINGS)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_in_plain_diffusers_and_back(kind: str, wans: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(wans[kind], lora=Lora(rank=2, alpha=6))
    adapted = {name.split(".lora_")[0] for name in model.tuned.parameters()}
    of = ("transformer.", "transformer_2.") if kind == "a14b" else ("",)
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    parts = {f"{part}blocks.{i}.attn{j}.{end}" for part in of for i in (0, 1) for j in (1, 2) for end in ends}
    assert adapted == parts
    stir(model)
    model.save(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * len(of)
    x = noise(model, 2)
    images = ours(model, x)
    pipeline = diffusers_pipeline(wans[kind])
    plain = theirs(pipeline, x)[:, 0]
    load_adapters(pipeline, tmp_path)
    assert_equal_to_rounding(images, theirs(pipeline, x)[:, 0], ROUNDINGS)
    assert (images - plain).abs().max() > 1e-4
    again = load_model(str(wans[kind]), lora=Lora(rank=7), adapter=tmp_path, size=32)
    assert torch.equal(ours(again, x), images)  # type: ignore[arg-type]


def test_adapters_on_one_network_of_two_are_refused_before_they_are_trained(wans: dict[str, Path]) -> None:
    model = loaded(wans["a14b"], lora=Lora(2, targets=("blocks.0.attn1",)))
    assert {name.split(".")[0] for name in model.tuned.parameters()} == {"transformer", "transformer_2"}
    with pytest.raises(UserError, match="in transformer_2 alone; expected some of each"):
        loaded(wans["a14b"], lora=Lora(2, targets=("transformer_2.blocks.0.attn1",)))


@pytest.mark.parametrize("kind", ["wan", "a14b"])
def test_a_network_trained_whole_is_saved_as_a_pipeline(kind: str, wans: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(wans[kind], lora=None)
    for parameter in model.tuned.parameters().values():
        parameter.data.mul_(1.1)
    model.save(tmp_path)
    x = noise(model, 2)
    images = ours(model, x)
    assert_equal_to_rounding(images, theirs(diffusers_pipeline(tmp_path), x)[:, 0], ROUNDINGS)
    assert torch.equal(ours(loaded(tmp_path), x), images)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_all_adapters_have_one(kind: str, wans: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = loaded(wans[kind], checkpointing=checkpointing, frames=5)
        stir(model)
        calls: list[int] = []
        network: Any = model.tuned.network
        first = getattr(network, "transformer", network).blocks[0]
        first.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        t = torch.tensor([0.9, 0.4])  # of A14B's networks a row each
        m = model.network(model.conditions(PROMPTS))(noise(model, 2), t)
        gradients.append(torch.autograd.grad(m.square().mean(), list(model.tuned.parameters().values())))
        assert len(calls) == (2 if checkpointing else 1)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert_equal_to_rounding(plain, checkpointed, ROUNDINGS)


def test_each_row_is_seen_by_the_network_of_its_time(wans: dict[str, Path]) -> None:
    """The first from .875 on; a batch of several times gives, row by row, what each time alone gives."""
    model = loaded(wans["a14b"])
    networks = model.pipeline.transformer, model.pipeline.transformer_2
    network, x = model.network(model.conditions(PROMPTS * 2)), noise(model, 4)
    t = torch.tensor([0.3, 0.875, 0.874, 1.0])
    with torch.no_grad():
        together = network(x, t)
        states = model.conditions(PROMPTS * 2)["encoder_hidden_states"]
        for row, (time, which) in enumerate(zip(t, (1, 0, 1, 0), strict=True)):
            given = (x[row : row + 1], 1000 * time[None], states[row : row + 1])
            alone, other = (each(*given, return_dict=False)[0] for each in (networks[which], networks[1 - which]))
            assert_equal_to_rounding(together[row : row + 1], alone, ROUNDINGS)
            assert (alone - other).abs().max() > 1e-3


def test_adapters_of_both_networks_must_be_alike(wans: dict[str, Path], tmp_path: Path) -> None:
    for rank in (2, 3):
        model = loaded(wans["a14b"], lora=Lora(rank=rank))
        model.save(tmp_path / str(rank))
    (tmp_path / "2" / SECOND).unlink()
    with pytest.raises(UserError, match="holds adapters of another model"):
        load_model(str(wans["a14b"]), lora=None, adapter=tmp_path / "2", size=32)
    (tmp_path / "3" / SECOND).rename(tmp_path / "2" / SECOND)
    with pytest.raises(UserError, match=r"differ in rank or alpha"):
        load_model(str(wans["a14b"]), lora=None, adapter=tmp_path / "2", size=32)


def test_lean_and_half_precision(wans: dict[str, Path]) -> None:
    full, lean, half = (loaded(wans["wan"], **o) for o in ({}, {"lean": True}, {"precision": "bf16"}))
    lean.settle(PROMPTS)
    assert lean.pipeline.text_encoder is None
    assert lean.pipeline.vae.use_tiling
    x, t = noise(full, 2), full.times(4)[1]
    with torch.no_grad():
        m = full.network(full.conditions(PROMPTS), guidance=3.0)(x, t)
        assert torch.equal(lean.network(lean.conditions(PROMPTS), guidance=3.0)(x, t), m)
        near = half.network(half.conditions(PROMPTS), guidance=3.0)(x, t).float()
    assert 0 < (near - m).abs().max() < 0.1 * m.std()


@pytest.mark.parametrize("odd", [{"use_flow_sigmas": False}, {"final_sigmas_type": "sigma_min"}])
def test_a_unipc_whose_grid_is_no_flows_is_refused(odd: dict[str, Any]) -> None:
    """Its sigmas go beyond 1, or end above 0: samples would be wrong, and nothing would say so."""
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert float(schedule_of(UniPCMultistepScheduler(**flow), 1).times(4)[-1]) == 0
    scheduler = UniPCMultistepScheduler(**flow | odd)
    scheduler.set_timesteps(4)
    assert float(scheduler.sigmas.max()) > 1 or float(scheduler.sigmas[-1]) > 0
    with pytest.raises(UserError, match=r"needs use_flow_sigmas, .* and final_sigmas_type zero"):
        schedule_of(scheduler, 1)


def test_nobody_votes_on_single_frames() -> None:
    with pytest.raises(UserError, match="human is for images, and this model makes videos"):
        ask(Human(), torch.rand(2, 5, 3, 8, 8), ["a", "b"])


def test_what_does_not_fit_is_refused_in_a_line(wans: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"A size of 40 pixels does not fit .* a multiple of 16"):
        loaded(wans["wan"], size=40)
    with pytest.raises(UserError, match=r"A size of 4096 pixels is more than .*: --size \d+ is the most"):
        loaded(wans["wan"], size=4096)
    with pytest.raises(UserError, match=r"--frames 4 does not fit .*: its videos have 1 \+ 4 n frames"):
        loaded(wans["wan"], frames=4)
    broken = newer.save_wan(tmp_path / "two", second=True) / "model_index.json"
    broken.write_text(json.dumps(json.loads(broken.read_text()) | {"boundary_ratio": None}))
    with pytest.raises(UserError, match=r"lacks a boundary_ratio: expected one"):
        loaded(broken.parent)
    broken.write_text(json.dumps(json.loads(broken.read_text()) | {"transformer": [None, None]}))
    with pytest.raises(UserError, match=r"lacks a transformer: expected one"):
        loaded(broken.parent)
    with pytest.raises(UserError, match="--shard is for models of one network"):
        World().shard(loaded(wans["a14b"]).tuned)
    with pytest.raises(UserError, match="makes images: it has no use for --frames 5"):
        loaded(newer.save_zimage(tmp_path / "zimage"), frames=5)
    with pytest.raises(UserError, match="makes images: it has no use for --frames 5"):
        load_pipeline(str(tiny.save_sd(tmp_path / "sd")), lora=Lora(), frames=5)
    with pytest.raises(UserError, match="--frames is for pipelines of videos: tiny-emoji makes images"):
        FinetuneConfig(frames=5)
    model = loaded(wans["wan"])
    shapes = []
    for places in (32, 1024):  # of the tiny network, and of Wan's
        model.tuned.network.register_to_config(rope_max_seq_len=places)
        shapes.append(type(model).state_shape("wan", plain_pipeline(wans["wan"]), model.tuned.network, None))
    assert shapes == [(4, 1, 64, 64), (4, 1, 120, 120)]


# --- Rewards of videos ----------------------------------------------------------------------------------------------


class Brightness:
    """The mean of an image; of whole videos, where it says so, the mean of the last frame."""

    name, differentiable = "brightness", True

    def __init__(self, videos: bool = False) -> None:
        self.videos, self.seen = videos, []  # type: ignore[var-annotated]

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        self.seen.append(tuple(images.shape))
        return (images[:, -1] if self.videos else images).flatten(1).mean(1)


def test_a_reward_of_images_sees_four_even_frames_and_is_their_mean() -> None:
    assert [shown(n) for n in (1, 2, 3, 4, 5, 9, 81)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 3, 5, 8],
        [0, 27, 53, 80],
    ]
    videos = torch.rand(3, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = Brightness()
    values = ask(reward, videos, ["a"] * 3)
    assert reward.seen == [(3, 3, 8, 8)] * 4
    assert_equal_to_rounding(values, videos[:, [0, 3, 5, 8]].flatten(1).mean(1), ROUNDINGS)
    (gradient,) = torch.autograd.grad(values.sum(), videos)
    assert sorted(set(gradient.flatten(2).abs().sum((0, 2)).nonzero().flatten().tolist())) == [0, 3, 5, 8]


def test_a_reward_of_videos_sees_them_whole_also_in_a_sum() -> None:
    videos = torch.rand(3, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, frames = Brightness(videos=True), Brightness()
    frames.name = "frames"
    values = ask(Sum([(1.0, whole), (2.0, frames)]), videos, ["a"] * 3)
    assert whole.seen == [(3, 9, 3, 8, 8)]
    expected = videos[:, -1].flatten(1).mean(1) + 2 * videos[:, [0, 3, 5, 8]].flatten(1).mean(1)
    assert_equal_to_rounding(values, expected, ROUNDINGS)


# --- Runs -----------------------------------------------------------------------------------------------------------


def settings(folder: Path, tmp_path: Path, **given: Any) -> FinetuneConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nthe dog\n")
    common = {"prompts": prompts, "lora": 2, "size": 32, "steps": 2, "batch": 4, "updates": 1, "eval_samples": 2}
    return FinetuneConfig(**{"model": str(folder), **common, "warm_up": 0, "out": tmp_path / "run", **given})


@pytest.mark.long
@pytest.mark.parametrize(
    ("algo", "frames", "kind"),
    [
        ("nft", 5, "wan"),
        pytest.param("ddpo-is", 5, "wan", marks=pytest.mark.slow),
        pytest.param("draft", 5, "wan", marks=pytest.mark.slow),
        ("nft", None, "a14b"),
        pytest.param("nft", None, "wan", marks=pytest.mark.slow),  # what the first and the one before are together
    ],
)
def test_a_run_goes_on_and_its_adapters_load(
    algo: str, frames: int | None, kind: str, wans: dict[str, Path], tmp_path: Path
) -> None:
    reward = "colour:blue" if algo == "draft" else "jpeg"
    batch = {"group": 2} if algo == "nft" else {}
    config = settings(wans[kind], tmp_path, algo=algo, frames=frames, reward=reward, queries=4, lean=True, **batch)
    run = finetune(config, quiet=True)
    resume(run, steps=8, quiet=True)
    history = json.loads((run / "evaluations.json").read_text())
    assert [entry["queries"] for entry in history][-1] == 8
    pipeline = diffusers_pipeline(wans[kind])
    x = noise(loaded(wans[kind]), 2)
    before = theirs(pipeline, x)
    load_adapters(pipeline, run / "model")
    assert not torch.equal(theirs(pipeline, x), before)


def test_it_learns_from_videos_with_prompts(wans: dict[str, Path], tmp_path: Path) -> None:
    """Supervised: frames in files, a prompt beside them; none is a lone reference."""
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(data / f"{number}.png")
    row = {"frames": [f"{number}.png" for number in range(5)], "text": "a cat"}
    (data / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    given = {"algo": "supervised", "data": str(data), "rounds": 1, "prompts": None, "frames": 5}
    run = finetune(settings(wans["wan"], tmp_path, **given), quiet=True)
    assert (run / "model").is_dir()


def test_the_loss_of_a_videos_latents_falls(wans: dict[str, Path]) -> None:
    model = loaded(wans["wan"], frames=5, lora=Lora(4))
    x0, generator = noise(model, 2), torch.Generator().manual_seed(0)
    t, drawn = model.training_times(2, generator), torch.randn(x0.shape, generator=generator)
    network = model.network(model.conditions(PROMPTS))
    optimiser = torch.optim.AdamW(model.tuned.parameters().values(), 1e-2)
    values = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = denoising_loss(model.prediction, network, x0, t, drawn, event_dims=len(model.shape)).mean()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < values[0]
