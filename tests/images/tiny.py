"""Tiny diffusers pipelines with random weights, built and saved in about a second each: the real thing, offline."""

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TOKENS = 16
"""Of a prompt: the tokenizers' length."""
ROUNDINGS = 256
"""Of what a network or an autoencoder gives: some 16 sums in a row, each of about 300 products (`tests.rounding`)."""
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
"""Stable Diffusion's."""


def save_sd(folder: Path, *, size: int = 32, seed: int = 0, scheduler: Any = None, **options: Any) -> Path:
    """Stable Diffusion 1.x: images (3, size, size), latents (4, size/2, size/2), .25 M parameters; returns `folder`.

    scheduler: PNDM with Stable Diffusion's schedule, as the published model has it; or another one of diffusers.
    options: of the U-Net.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with seeded(seed):
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(size),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(folder),
            unet=unet(size // 2, cross_attention_dim=32, **options),
            scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True) if scheduler is None else scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _saved(pipeline, folder)


def save_sdxl(folder: Path, *, size: int = 32, seed: int = 0) -> Path:
    """Stable Diffusion XL: two text encoders, pooled embeddings, time ids; images (3, size, size)."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    time_ids, pooled = 6, 32
    with seeded(seed):
        network = unet(
            size // 2,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=time_ids * 8 + pooled,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(size),
            text_encoder=clip_text(),
            text_encoder_2=clip_text(projection=True),
            tokenizer=clip_tokenizer(folder),
            tokenizer_2=clip_tokenizer(folder),
            unet=network,
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
            add_watermarker=False,
        )
    return _saved(pipeline, folder)


def save_sd3(
    folder: Path, *, size: int = 32, seed: int = 0, shift: float = 3.0, t5: bool = True, **options: Any
) -> Path:
    """Stable Diffusion 3: a flow, two CLIP text encoders and T5 (which may be absent); images (3, size, size).

    options: of the transformer.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(seed):
        settings = {
            "sample_size": size // 2,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
        }
        transformer = SD3Transformer2DModel(**{**settings, **options})
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=autoencoder(
                size, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=clip_text(projection=True),
            text_encoder_2=clip_text(projection=True),
            text_encoder_3=t5_text() if t5 else None,
            tokenizer=clip_tokenizer(folder),
            tokenizer_2=clip_tokenizer(folder),
            tokenizer_3=t5_tokenizer() if t5 else None,
        )
    return _saved(pipeline, folder)


def save_ddpm(folder: Path, *, size: int = 16, seed: int = 0, classes: int | None = None, **schedule: Any) -> Path:
    """A U-Net in pixels (3, size, size), without a prompt, or of `classes`; `schedule`: of its DDPM scheduler."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with seeded(seed):
        network = UNet2DModel(
            sample_size=size,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=classes,
        )
    return _saved(DDPMPipeline(network, DDPMScheduler(**schedule)), folder)


def save_svd(folder: Path, *, size: int = 16, frames: int = 3, seed: int = 0) -> Path:
    """Stable Video Diffusion: videos (frames, 3, size, size), latents (frames, 4, size/2, size/2)."""
    from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    with seeded(seed):
        network = UNetSpatioTemporalConditionModel(
            sample_size=size // 2,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 32),
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48,
            layers_per_block=1,
            cross_attention_dim=16,
            num_attention_heads=2,
            num_frames=frames,
        )
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), sample_size=size
        )
        clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=224,
                patch_size=56,
            )
        )
    extractor = CLIPImageProcessor(size=224, crop_size=224)
    return _saved(StableVideoDiffusionPipeline(vae, clip, network, svd_scheduler(), extractor), folder)


def svd_scheduler() -> Any:
    """Stable Video Diffusion's."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
    )


def unet(size: int, **options: Any) -> Any:
    """A U-Net with cross-attention for latents (4, size, size)."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": size,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **options})


def autoencoder(size: int, **options: Any) -> Any:
    """Images (3, size, size) to latents (4, size/2, size/2)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=size,
        **options,
    )


def clip_text(*, projection: bool = False) -> Any:
    """A CLIP text encoder of width 32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = 2 * len(CHARACTERS)
    settings = CLIPTextConfig(
        vocab_size=words + 2,
        bos_token_id=words,
        eos_token_id=words + 1,
        pad_token_id=words + 1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        max_position_embeddings=TOKENS,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings).eval()


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with single characters for a vocabulary, which it writes beside `folder`."""
    from transformers import CLIPTokenizer

    files = folder.parent / f"{folder.name}-vocabulary"
    files.mkdir(parents=True, exist_ok=True)
    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(files, model_max_length=TOKENS)


def t5_text() -> Any:
    """A T5 encoder of width 64."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(CHARACTERS) + 4, d_model=64, d_ff=37, d_kv=8, num_heads=2, num_layers=2)
    ).eval()


def t5_tokenizer() -> Any:
    """T5's tokenizer with single characters for a vocabulary."""
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in CHARACTERS)]
    return T5TokenizerFast(vocab=words, extra_ids=0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generator, from which layers draw their weights, starts at `seed`; outside it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
