"""Tiny pipelines of flow transformers with random weights, as `tests.images.tiny` builds the older ones."""

from pathlib import Path
from typing import Any

from tests.images.tiny import _saved, autoencoder, clip_text, clip_tokenizer, seeded, t5_text, t5_tokenizer

SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 256}
"""A shift that depends on the number of tokens, as FLUX has it, at these sizes."""


def save_flux(folder: Path, *, seed: int = 0, embeds: bool = False, shifted: bool = True) -> Path:
    """FLUX.1: CLIP and T5, latents (4, 16, 16); embeds: guidance is an input, as of -dev. -schnell is not shifted."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with seeded(seed):
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(SHIFTED if shifted else {})),
            vae=autoencoder(
                32, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(folder),
            text_encoder_2=t5_text(),
            tokenizer_2=t5_tokenizer(),
            transformer=stirred(
                FluxTransformer2DModel(
                    in_channels=16,
                    num_layers=1,
                    num_single_layers=1,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=64,
                    pooled_projection_dim=32,
                    guidance_embeds=embeds,
                    axes_dims_rope=(4, 6, 6),
                )
            ),
        )
    return _saved(pipeline, folder)


def save_klein(folder: Path, *, seed: int = 0, distilled: bool = False) -> Path:
    """FLUX.2-klein: a Qwen3 text encoder of 28 layers, latents of 2 x 2 (16, 8, 8)."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    with seeded(seed):
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=qwen3(layers=28),
            tokenizer=qwen_tokenizer(),
            transformer=stirred(
                Flux2Transformer2DModel(
                    in_channels=16,
                    num_layers=1,
                    num_single_layers=1,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=3 * 16,
                    timestep_guidance_channels=16,
                    axes_dims_rope=(4, 4, 4, 4),
                    guidance_embeds=False,
                )
            ),
            is_distilled=distilled,
        )
    return _saved(pipeline, folder)


def save_zimage(folder: Path, *, seed: int = 0) -> Path:
    """Z-Image: a Qwen3 text encoder, latents (4, 16, 16), a fixed shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with seeded(seed):
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(
                32, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=qwen3(layers=2, causal=False),
            tokenizer=qwen_tokenizer(),
            transformer=stirred(
                ZImageTransformer2DModel(
                    in_channels=4,
                    dim=32,
                    n_layers=1,
                    n_refiner_layers=1,
                    n_heads=2,
                    n_kv_heads=2,
                    cap_feat_dim=16,
                    axes_dims=[4, 6, 6],
                    axes_lens=[1024, 64, 64],
                )
            ),
        )
    return _saved(pipeline, folder)


def save_qwenimage(folder: Path, *, seed: int = 0) -> Path:
    """Qwen-Image: a Qwen2.5-VL text encoder, an autoencoder of videos, latents (4, 16, 16)."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    with seeded(seed):
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED, shift_terminal=0.02),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.7, 2.0, 1.0],
            ).eval(),
            text_encoder=qwen_vl(),
            tokenizer=qwen_tokenizer(),
            transformer=stirred(
                QwenImageTransformer2DModel(
                    in_channels=16,
                    out_channels=4,
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=16,
                    axes_dims_rope=(4, 6, 6),
                )
            ),
        )
    return _saved(pipeline, folder)


def qwen_vl() -> Any:
    """A Qwen2.5-VL of width 16."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 10000.0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def stirred(network: Any) -> Any:
    """The network with all its weights random: some begin at 0, and would hide what goes through them."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any() or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def qwen3(*, layers: int, causal: bool = True) -> Any:
    """A Qwen3 of width 16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    settings = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return (Qwen3ForCausalLM if causal else Qwen3Model)(settings).eval()


def qwen_tokenizer() -> Any:
    """Qwen's tokenizer with single bytes for a vocabulary, and a short chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {word: i for i, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def save_wan(folder: Path, *, seed: int = 0, unipc: bool = False, newer: bool = False, second: bool = False) -> Path:
    """Wan: a UMT5 text encoder, an autoencoder of videos that halves sides and, in two steps, quarters time.

    unipc: with the scheduler of the published models. newer: as Wan 2.2's TI2V-5B, a time a token, and an autoencoder
    that folds 2 x 2 pixels into channels. second: as its A14B, with another network for times below .875.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    folded: dict[str, Any] = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    with seeded(seed):
        networks = [
            stirred(
                WanTransformer3DModel(
                    num_attention_heads=2,
                    attention_head_dim=12,
                    in_channels=4,
                    out_channels=4,
                    text_dim=16,
                    freq_dim=16,
                    ffn_dim=32,
                    num_layers=2,
                    rope_max_seq_len=32,
                )
            )
            for _ in range(1 + second)
        ]
        pipeline = WanPipeline(
            scheduler=UniPCMultistepScheduler(**flow) if unipc else FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKLWan(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.7, 2.0, 1.0],
                scale_factor_temporal=4,
                scale_factor_spatial=8 if newer else 4,
                **(folded if newer else {}),
            ).eval(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=300, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2)
            ).eval(),
            tokenizer=t5_tokenizer(),
            transformer=networks[0],
            transformer_2=networks[1] if second else None,
            boundary_ratio=0.875 if second else None,
            expand_timesteps=newer,
        )
    return _saved(pipeline, folder)


def assert_prompts_matter(model: Any, x: Any, prompts: Any) -> None:
    """The network's answers at states x, one of each prompt, are others where the prompts are swapped."""
    import torch

    t = model.times(4)[1]
    with torch.no_grad():
        m, swapped = (model.network(model.conditions(asked))(x, t) for asked in (prompts, prompts[::-1]))
    assert (m - swapped).abs().max() > 1e-5
