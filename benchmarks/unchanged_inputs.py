"""The files that the runs of `unchanged_runs.py` read, the same bytes every time, made without diffrl.

Data sets in D4RL's HDF5 layout; diffusers pipelines and classifiers of random weights; folders of images. The built-in
model and the classifiers are written to `$DIFFRL_CACHE`, where diffrl keeps those it has trained.
"""

import json
import string
from pathlib import Path
from typing import Any

import h5py
import numpy as np

DATA, CACHE = "data", "cache"
"""The working folder's `$DIFFRL_DATA` and `$DIFFRL_CACHE`."""
PENDULUM, UNIT = "pendulum.hdf5", "unit.hdf5"
"""Data sets: random torques on a pendulum; and the same in units of the largest torque."""
PENDULUM_ROWS = 2000
LATENT, FLOW = "latent-model", "flow-model"
"""Pipelines: Stable Diffusion 1 and 3, of tiny networks."""
PROMPTS, EXAMPLES, PAIRS = "prompts.txt", "examples", "pairs"
"""A file of prompts; folders of images with captions, and of preferred and rejected ones."""
UNTRAINED = "rlpd.yaml"
"""A configuration, which on-line training begins with an untrained agent of."""


def write_inputs(folder: Path) -> None:
    """Write all that the runs read into the working folder, the same bytes every time."""
    write_pendulum(folder / PENDULUM)
    write_pendulum(folder / UNIT, largest=1.0)
    write_digits_model(folder / CACHE)
    write_classifiers(folder / CACHE)
    write_latent(folder / LATENT)
    write_flow(folder / FLOW)
    agent = "{name: rlpd, width: 16, layers: 1, batch_size: 32, n_critics: 3}"
    (folder / UNTRAINED).write_text(f"dataset: {PENDULUM}\nenv: Pendulum-v1\nagent: {agent}\n")
    (folder / PROMPTS).write_text("a cat\na dog\n")
    write_images(folder / EXAMPLES, folder / PAIRS)


def write_pendulum(path: Path, rows: int = PENDULUM_ROWS, largest: float = 2.0) -> None:
    """Random torques on a pendulum (Gymnasium's equations, dt = .05), episodes of 50 steps, in D4RL's layout.

    largest: what the actions are written in is such that the largest torque is this.
    """
    rng = np.random.default_rng(0)
    angle, speed = 0.0, 0.0
    columns: dict[str, list[Any]] = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": []}
    for i in range(rows):
        if i % 50 == 0:
            angle, speed = rng.uniform(-np.pi, np.pi), rng.uniform(-1, 1)
        torque = rng.uniform(-2, 2)
        columns["observations"].append([np.cos(angle), np.sin(angle), speed])
        columns["actions"].append([torque * largest / 2])
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        columns["rewards"].append(-(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2))
        columns["terminals"].append(i % 200 == 199)
        columns["timeouts"].append(i % 50 == 49 and i % 200 != 199)
        speed = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * 0.05, -8, 8)
        angle += speed * 0.05
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            kind = np.bool_ if name in ("terminals", "timeouts") else np.float32
            file.create_dataset(name, data=np.asarray(values, kind))


def write_digits_model(cache: Path, channels: tuple[int, int] = (8, 16)) -> None:
    """tiny-digits with a smaller network of random weights, where the built-in one is found once it is trained."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=10,
            norm_num_groups=4,
            attention_head_dim=channels[0],
        )
    scheduler = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    DDIMPipeline(network, scheduler).save_pretrained(cache / "models" / "tiny-digits-1000", safe_serialization=True)


def write_classifiers(cache: Path) -> None:
    """The classifiers of digits with random weights, where they are found once they are trained."""
    import safetensors.torch
    import torch

    shapes = {
        "digit-1": {"0": (16, 1, 3, 3), "2": (32, 16, 3, 3), "5": (64, 32, 3, 3), "8": (10, 1024)},
        "digit-held-out-1": {"0": (64, 1, 4, 4), "3": (128, 1024), "5": (10, 128)},
    }
    for name, layers in shapes.items():
        generator = torch.Generator().manual_seed(len(name))
        tensors = {}
        for layer, shape in layers.items():
            scale = float(np.prod(shape[1:])) ** -0.5
            tensors[f"{layer}.weight"] = 2 * scale * torch.randn(shape, generator=generator)
            tensors[f"{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
        safetensors.torch.save_file(tensors, cache / "models" / f"{name}.safetensors")


def write_latent(folder: Path) -> None:
    """Stable Diffusion 1: images (3, 16, 16), latents (4, 8, 8)."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=_clip(),
            tokenizer=_tokenizer(folder),
            unet=UNet2DConditionModel(
                sample_size=8,
                cross_attention_dim=16,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            scheduler=PNDMScheduler(
                1000,
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                steps_offset=1,
                skip_prk_steps=True,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def write_flow(folder: Path) -> None:
    """Stable Diffusion 3, without T5: images (3, 16, 16), latents (4, 8, 8)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                pos_embed_max_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(
                scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=_clip(projection=True),
            text_encoder_2=_clip(projection=True),
            text_encoder_3=None,
            tokenizer=_tokenizer(folder),
            tokenizer_2=_tokenizer(folder),
            tokenizer_3=None,
        )
    pipeline.save_pretrained(folder)


def _autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **options,
    )


_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def _clip(*, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = 2 * len(_CHARACTERS)
    settings = CLIPTextConfig(
        vocab_size=words + 2,
        bos_token_id=words,
        eos_token_id=words + 1,
        pad_token_id=words + 1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=16,
        max_position_embeddings=16,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings).eval()


def _tokenizer(folder: Path) -> Any:
    """CLIP's, with single characters for a vocabulary, which is written beside `folder`."""
    from transformers import CLIPTokenizer

    files = folder.with_name(f"{folder.name}-vocabulary")
    files.mkdir(exist_ok=True)
    words = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(files, model_max_length=16)


def write_images(examples: Path, pairs: Path) -> None:
    """Random grey images of 8x8, whose captions are digits: 12 examples, and 12 pairs of a preferred and another."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder, names in ((examples, ("file_name",)), (pairs, ("file_name_w", "file_name_l"))):
        folder.mkdir()
        lines = []
        for i in range(12):
            row = {"text": str(i % 10)}
            for name in names:
                row[name] = f"{i}-{name}.png"
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / row[name])
            lines.append(json.dumps(row))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
