"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP reads the image and the prompt, a head gives one value.

r = (head(h) - mean) / std, h the state at [CLS] of BLIP's text encoder, which attends to the image's patches; the mean
and deviation are the published ones. The folder:

config.json               a BlipConfig. Of ImageReward-v1.0: vision_config hidden_size 1024, intermediate_size 4096,
                          num_hidden_layers 24, num_attention_heads 16, image_size 224, patch_size 16, layer_norm_eps
                          1e-6; text_config vocab_size 30524, hidden_size 768, encoder_hidden_size 1024,
                          intermediate_size 3072, 12 layers, 12 heads, layer_norm_eps 1e-12
model.safetensors         `vision_model.*` and `text_encoder.*`, named as in transformers' BlipForImageTextRetrieval,
                          and `mlp.layers.N.*`, the head: linear layers without activations. The keys of the published
                          ImageReward.pt (a pickle; `blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.*`) are
                          translated, so that the file may be that one converted as it is.
tokenizer files           of bert-base-uncased with [DEC] and [ENC] added, as BLIP has it
preprocessor_config.json  CLIP's: bicubic to 224, the centre, CLIP's mean and deviation

The published weights were not at hand: the translation follows their names, and tests run on tiny random models.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.images.models.loading import images_extra
from diffrl.images.models.text import tell_cut
from diffrl.images.rewards import preprocess, pretrained
from diffrl.images.rewards.base import Metadata
from diffrl.images.rewards.clip import chain, read_head
from diffrl.support.errors import UserError

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the head's values on the validation prompts, as published."""
LENGTH = 35
"""How many tokens of a prompt are read at most, as published."""

PUBLISHED = (
    (r"^blip\.text_encoder\.", "text_encoder."),
    (r"^blip\.visual_encoder\.", "vision_model."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^vision_model\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^vision_model\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^vision_model\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
)
"""Names in the published file, one rule after the other, and in transformers."""


class ImageReward:
    """The published reward of prompt and image, about standard normal over its validation set; differentiable.

    argument: the folder. Raises UserError where anything of it is missing or does not fit.
    """

    differentiable = True

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        self.name = f"imagereward:{argument}"
        self.device = torch.device(device)
        with images_extra(self.name):
            from transformers import BlipConfig
            from transformers.models.blip.modeling_blip import BlipVisionModel
            from transformers.models.blip.modeling_blip_text import BlipTextModel
        folder = pretrained.folder(argument, self.name)
        content = pretrained.read_json(folder / "config.json", self.name)
        if content.get("model_type") != "blip":
            raise UserError(f"{self.name}: {folder} holds a {content.get('model_type')!r} model; expected 'blip'")
        config: Any = BlipConfig.from_dict(content)
        self.preprocess = preprocess.read(folder, self.name)
        self.tokenizer = pretrained.tokenizer(folder, self.name)
        path = folder / "model.safetensors"
        state = translate(pretrained.tensors(path, self.name))
        self.vision, self.text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, False)
        for prefix, module in (("vision_model.", self.vision), ("text_encoder.", self.text)):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            own.pop("embeddings.position_ids", None)  # a constant that older versions saved
            pretrained.fill(module, own, path, f"{self.name} ({prefix}*)")
            pretrained.freeze(module, device)
        head = {k: v for k, v in state.items() if k.startswith("mlp.")}
        self.head = pretrained.freeze(chain(read_head(head, path, self.name)), device)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        seen = self.vision(pixel_values=self.preprocess(images.to(self.device))).last_hidden_state
        tell_cut(self.tokenizer, prompts, LENGTH, self.name)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        states = self.text(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
        ).last_hidden_state
        values: Tensor = (self.head(states[:, 0])[:, 0] - MEAN) / STD
        return values.to(images.device)


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under transformers' names; those that have such names keep them."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in PUBLISHED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
