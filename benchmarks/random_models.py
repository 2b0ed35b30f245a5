"""Image models of the published models' sizes and of random weights, made on the device: nothing is read or fetched.

The configurations are those of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0 and
stabilityai/stable-diffusion-3-medium-diffusers, where they are not the defaults of diffusers' and transformers'
classes. Everything but prompts goes the way of the real pipelines; encodings of prompts are random numbers of the same
shapes, so text encoders take memory, where they are made at all, and no time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from diffrl.images.model import Condition, Lora
from diffrl.images.models.loading import quiet
from diffrl.images.models.pipelines import (
    PRECISIONS,
    PipelineModel,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
)
from diffrl.support.seeds import generator_at

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768}
CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
T5_XXL: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
TINY_CLIP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
TINY_CLIP |= {"num_attention_heads": 4, "projection_dim": 32, "vocab_size": 100}
TINY_T5: dict[str, Any] = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
FOUR: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
"""The blocks of all three autoencoders."""
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_VAE: dict[str, Any] = {"norm_num_groups": 8, "block_out_channels": (16,), "sample_size": 8}


@dataclass(frozen=True)
class Size:
    """What a model is made of: settings of diffusers' and transformers' classes."""

    network: dict[str, Any]
    vae: dict[str, Any]
    """Of `AutoencoderKL`."""
    text: tuple[tuple[str, dict[str, Any]], ...]
    """transformers' classes of the text encoders, and the settings of each."""
    tokens: int = 77
    """Of a prompt's encoding."""
    pooled: int = 0
    """Width of its pooled encoding, where there is one."""


SIZES: dict[str, Size] = {
    "sd": Size(
        {"sample_size": 64, "cross_attention_dim": 768},
        {**FOUR, "sample_size": 512, "latent_channels": 4, "scaling_factor": 0.18215},
        (("CLIPTextModel", CLIP_L),),
    ),
    "sdxl": Size(
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        {**FOUR, "sample_size": 1024, "latent_channels": 4, "scaling_factor": 0.13025},
        (("CLIPTextModel", CLIP_L), ("CLIPTextModelWithProjection", CLIP_G)),
        pooled=1280,
    ),
    "sd3": Size(
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {
            **FOUR,
            "sample_size": 1024,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        (
            ("CLIPTextModelWithProjection", CLIP_L),
            ("CLIPTextModelWithProjection", CLIP_G),
            ("T5EncoderModel", T5_XXL),
        ),
        tokens=77 + 256,
        pooled=768 + 1280,
    ),
}
"""The published sizes: Stable Diffusion 1.5 at 512 x 512 pixels, SDXL and SD 3 medium at 1024 x 1024."""
TINY: dict[str, Size] = {
    "sd": Size(TINY_UNET, TINY_VAE, (("CLIPTextModel", TINY_CLIP),)),
    "sdxl": Size(
        {
            **TINY_UNET,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        TINY_VAE,
        (("CLIPTextModel", TINY_CLIP), ("CLIPTextModelWithProjection", TINY_CLIP)),
        pooled=32,
    ),
    "sd3": Size(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
        },
        {**TINY_VAE, "use_quant_conv": False, "use_post_quant_conv": False},
        (
            ("CLIPTextModelWithProjection", TINY_CLIP),
            ("CLIPTextModelWithProjection", TINY_CLIP),
            ("T5EncoderModel", TINY_T5),
        ),
        pooled=64,
    ),
}
"""The same at a size for a CPU's seconds."""


# --- Prompts of random numbers --------------------------------------------------------------------------------------


class _Random(PipelineModel):
    """A pipeline's model whose encodings of prompts are random numbers, each prompt's its own."""

    def _states(self, prompt: str, width: int) -> torch.Tensor:
        return self._numbers(prompt, 1, self.pipeline.size.tokens, width)

    def _pooled(self, prompt: str) -> torch.Tensor:
        return self._numbers(f"{prompt} pooled", 1, self.pipeline.size.pooled)

    def _numbers(self, seed: str, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator_at(0, *seed.encode())).to(self.device, self._dtype)


class RandomSD(_Random, StableDiffusion):
    """Stable Diffusion 1.5's."""

    def _encode(self, prompt: str) -> Condition:
        return {"encoder_hidden_states": self._states(prompt, self.pipeline.unet.config.cross_attention_dim)}


class RandomSDXL(_Random, StableDiffusionXL):
    """SDXL's: with the pooled encoding and the image's size."""

    def _encode(self, prompt: str) -> Condition:
        height, width = (n * self.pipeline.vae_scale_factor for n in self.shape[1:])
        return {
            "encoder_hidden_states": self._states(prompt, self.pipeline.unet.config.cross_attention_dim),
            "text_embeds": self._pooled(prompt),
            "time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device),
        }


class RandomSD3(_Random, StableDiffusion3):
    """SD 3's transformer, a flow."""

    def _encode(self, prompt: str) -> Condition:
        states = self._states(prompt, self.pipeline.transformer.config.joint_attention_dim)
        return {"encoder_hidden_states": states, "pooled_projections": self._pooled(prompt)}


MODELS: dict[str, type[PipelineModel]] = {"sd": RandomSD, "sdxl": RandomSDXL, "sd3": RandomSD3}


# --- Making them ----------------------------------------------------------------------------------------------------


def random_model(
    name: str,
    lora: Lora,
    *,
    tiny: bool = False,
    precision: str = "fp32",
    checkpointing: bool = False,
    lean: bool = True,
    device: str = "cpu",
) -> PipelineModel:
    """A model of `SIZES`, or of `TINY`, as `load_pipeline` gives the published one with these options.

    lean: no text encoders, as after `settle`; the autoencoder image by image and tile by tile. Otherwise text encoders
    of random weights lie on the device, unused, in `precision`.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    size, kind = (TINY if tiny else SIZES)[name], MODELS[name]
    with _made_on(device, precision):
        network, vae = network_of(name, size), autoencoder_of(size)
        text = [] if lean else text_encoders_of(size)
        for part in (network, vae, *text):
            part.to(PRECISIONS[precision]).eval().requires_grad_(False)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if lean:
        vae.enable_slicing()
        vae.enable_tiling()
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedulers = {
        "sd": lambda: DDIMScheduler(**betas, clip_sample=False),
        "sdxl": lambda: EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
        "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    pipeline = SimpleNamespace(
        vae=vae,
        text_encoders=text,
        scheduler=schedulers[name](),
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
        size=size,
        **{kind.network_name: network},
    )
    shape = kind.state_shape(name, pipeline, network, None)
    return kind(name, pipeline, kind.schedule(pipeline, network, shape), shape, lora, precision, 0)


def network_of(name: str, size: Size) -> Any:
    """The network that is trained: a U-Net, or SD 3's transformer."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    return (SD3Transformer2DModel if name == "sd3" else UNet2DConditionModel)(**size.network)


def autoencoder_of(size: Size) -> Any:
    """The autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**size.vae)


def text_encoders_of(size: Size) -> list[Any]:
    """The text encoders."""
    import transformers

    made = []
    for kind, settings in size.text:
        config = transformers.T5Config(**settings) if kind.startswith("T5") else transformers.CLIPTextConfig(**settings)
        made.append(getattr(transformers, kind)(config))
    return made


def text_bytes(name: str, *, tiny: bool, precision: str) -> int:
    """Bytes of the text encoders' weights; nothing is made."""
    with quiet(), torch.device("meta"):
        made = text_encoders_of((TINY if tiny else SIZES)[name])
    return sum(p.numel() for part in made for p in part.parameters()) * PRECISIONS[precision].itemsize


@contextlib.contextmanager
def _made_on(device: str, precision: str) -> Iterator[None]:
    """Within it modules are made there, in that precision, from a seed: no float32 copy is made on the way."""
    before = torch.get_default_dtype()
    with quiet(), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(PRECISIONS[precision])
        try:
            yield
        finally:
            torch.set_default_dtype(before)
