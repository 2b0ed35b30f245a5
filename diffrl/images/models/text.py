"""Prompts through text encoders: all three of Stable Diffusion 3, and what is said of a prompt that is too long."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.support.console import console

T5_TOKENS = 256
"""Tokens of a prompt that T5 reads, by the pipeline's default."""
_told: set[tuple[str, int]] = set()


def encode_sd3(pipeline: Any, prompt: str, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
    """Stable Diffusion 3's states (1, tokens, joint_attention_dim) and pooled encoding (1, pooled_projection_dim).

    As `StableDiffusion3Pipeline.encode_prompt`, which only T5 may be absent from; here each may be, and is 0, as it was
    now and then in the model's training (Esser et al. 2024, arXiv 2403.03206, section 5.3.3).
    """
    settings = pipeline.transformer.config
    dtype = next(pipeline.transformer.parameters()).dtype
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    known = sum(0 if encoder is None else encoder.config.projection_dim for encoder in encoders)
    left = settings.pooled_projection_dim - known
    if all(encoder is None for encoder in encoders):
        left //= 2  # how the two share it matters to nothing: both are 0
    clip, pooled = [], []
    if pipeline.text_encoder_3 is not None:  # it reads most: what the others miss of a prompt it sees
        tell_cut(pipeline.tokenizer_3, [prompt], T5_TOKENS, name)
    elif present := [t for e, t in zip(encoders, tokenizers, strict=True) if e is not None]:
        tell_cut(present[0], [prompt], present[0].model_max_length, name)
    tokens = next((t.model_max_length for t in tokenizers if t is not None), 77)
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        if encoder is None:
            clip.append(torch.zeros(1, tokens, left, dtype=dtype, device=device))
            pooled.append(torch.zeros(1, left, dtype=dtype, device=device))
            continue
        ids = tokenizer([prompt], padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        output = encoder(ids.input_ids.to(device), output_hidden_states=True)
        clip.append(output.hidden_states[-2])
        pooled.append(output[0])
    states = torch.cat(clip, -1)
    states = torch.nn.functional.pad(states, (0, settings.joint_attention_dim - states.shape[-1]))
    if pipeline.text_encoder_3 is None:
        t5 = states.new_zeros(1, T5_TOKENS, settings.joint_attention_dim)
    else:
        ids = pipeline.tokenizer_3(
            [prompt], padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt"
        )
        t5 = pipeline.text_encoder_3(ids.input_ids.to(device))[0]
    return torch.cat([states, t5.to(states.dtype)], 1).to(dtype), torch.cat(pooled, -1).to(dtype)


def tell_cut(tokenizer: Any, prompts: Sequence[str], length: int, what: str) -> None:
    """Say, once for each `what`, that a prompt has more tokens than the `length` that are read."""
    if (what, length) in _told:
        return
    for prompt in prompts:
        count = len(tokenizer(prompt, verbose=False)["input_ids"])
        if count > length:
            _told.add((what, length))
            if os.environ.get("RANK", "0") != "0":  # of several processes, which read the same prompts, one says it
                return
            console.print(
                f"{what} reads {length} tokens of a prompt, and {prompt[:60]!r}... has {count}: the rest says nothing "
                "to it. Prompts after this one are cut without a word.",
                style="yellow",
                markup=False,
            )
            return
