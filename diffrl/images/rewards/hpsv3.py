"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL with a head that predicts how well a person would like an image.

The image and an instruction with the prompt in it are one message; at the token <|Reward|> in it a head of three linear
layers gives the mean of the score, which is the reward, and its uncertainty. As published (MizzenAI/HPSv3) an image has
256 x 28 x 28 pixels, and tokens have plain positions, one after the other, not Qwen2-VL's of three dimensions.

The folder: Qwen2-VL-7B-Instruct's config.json and tokenizer (with its chat template), HPSv3.safetensors, and
instruction.txt: INSTRUCTION of the published code and the sentence with <|Reward|> that it appends, {text_prompt} where
the prompt goes. The text is a part of the model that the weights do not bring. No published weights were at hand when
this was written: it is tested on tiny random models, against the forward pass written anew on transformers' layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from diffrl.images.models.loading import images_extra
from diffrl.images.rewards import pretrained
from diffrl.images.rewards.base import Metadata
from diffrl.images.rewards.preprocess import Preprocess
from diffrl.support.errors import UserError
from diffrl.support.files import read_text

FILE, INSTRUCTION = "HPSv3.safetensors", "instruction.txt"
REWARD, PROMPT = "<|Reward|>", "{text_prompt}"
PIXELS = 256 * 28 * 28
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, as Qwen2-VL's processor has them."""
RENAMED = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
)
"""Names of the weights in older versions of transformers, and now."""


class HPSv3:
    """The mean that HPSv3 predicts of an image and its prompt; differentiable.

    argument: the folder. device: on a GPU the weights are bfloat16, as published, else float32; the head is float32.
    Raises UserError where anything of it is missing or does not fit.
    """

    differentiable = True

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        self.name = f"hpsv3:{argument}"
        self.device = torch.device(device)
        with images_extra(self.name):
            from transformers import Qwen2VLConfig, Qwen2VLModel, __version__
            from transformers.models.qwen2_vl import modeling_qwen2_vl
        if not hasattr(
            modeling_qwen2_vl, "Qwen2VLVisionRotaryEmbedding"
        ):  # before, its vision tower was built otherwise
            raise UserError(f"{self.name} needs a newer transformers than {__version__}: pip install -U transformers")
        folder = pretrained.folder(argument, self.name, FILE)
        content = pretrained.read_json(folder / "config.json", self.name)
        if content.get("model_type") != "qwen2_vl":
            raise UserError(f"{self.name}: {folder} holds a {content.get('model_type')!r} model; expected 'qwen2_vl'")
        self.instruction = _instruction(folder, self.name)
        self.tokenizer = pretrained.tokenizer(folder, self.name)
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.name}: the tokenizer in {folder} has no chat template; copy Qwen2-VL's beside it.")
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]}, replace_extra_special_tokens=False)
        self.reward_token = self.tokenizer.convert_tokens_to_ids(REWARD)
        state = translate(pretrained.tensors(folder / FILE, self.name))
        config: Any = Qwen2VLConfig.from_dict(content)
        words = state.get("model.language_model.embed_tokens.weight")
        if words is None or self.reward_token >= len(words):
            rows = 0 if words is None else len(words)
            raise UserError(
                f"{self.name}: {folder / FILE} has embeddings of {rows} tokens, and {REWARD} is number "
                f"{self.reward_token}: the tokenizer in {folder} is another model's."
            )
        config.text_config.vocab_size = len(words)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with torch.device("meta"):  # 7 billion random numbers need not be drawn
            model = Qwen2VLModel(config)
            head = _head(config.text_config.hidden_size)
        for prefix, module, kept in (("model.", model, dtype), ("rm_head.", head, torch.float32)):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            _fill(module, own, folder / FILE, self.name, kept)
        _restore_buffers(model, config)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.head: nn.Module = head.eval().requires_grad_(False).to(self.device)
        self.image_token = config.image_token_id
        vision = config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image: asked one by one, so that a value depends on no other."""
        values = [self._value(image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(values).to(images.device)

    def _value(self, image: Tensor, prompt: str) -> Tensor:
        patches, rows, columns = self.patches(image.to(self.device))
        tokens = self.tokens(prompt, rows * columns // self.merge**2).to(self.device)
        language = self.model.language_model
        grid = torch.tensor([[1, rows, columns]], device=self.device)
        embeddings = language.embed_tokens(tokens)
        seen = self.model.visual(patches.to(embeddings.dtype), grid_thw=grid).pooler_output
        embeddings = embeddings.masked_scatter((tokens == self.image_token)[..., None], seen.to(embeddings.dtype))
        places = torch.arange(tokens.shape[1], device=self.device).expand(3, 1, -1)
        states = language(inputs_embeds=embeddings, position_ids=places, use_cache=False).last_hidden_state
        value: Tensor = self.head(states[tokens == self.reward_token].float())[0, 0]
        return value

    def tokens(self, prompt: str, n: int) -> Tensor:
        """The message of a prompt, with n tokens for the image: (1, L)."""
        content = [{"type": "image"}, {"type": "text", "text": self.instruction.replace(PROMPT, prompt)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        tokens: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        image, reward = tokens == self.image_token, tokens == self.reward_token
        if int(image.sum()) != 1 or int(reward.sum()) != 1:
            raise UserError(
                f"{self.name}: the message of the prompt {prompt!r} has {int(image.sum())} images and "
                f"{int(reward.sum())} {REWARD}; expected one each. Is the chat template Qwen2-VL's?"
            )
        return tokens.repeat_interleave(torch.where(image[0], n, 1), dim=1)

    def patches(self, image: Tensor) -> tuple[Tensor, int, int]:
        """An image (1, 3 or 1, H, W) as Qwen2-VL takes it: rows x columns patches (rows * columns, P), and their
        numbers; those that are merged into a token stand together."""
        height, width = smart_size(image.shape[2], image.shape[3], self.patch * self.merge)
        x = Preprocess((height, width), "bicubic", None, MEAN, STD)(image)
        rows, columns = height // self.patch, width // self.patch
        pixels = pixel_unshuffle(x, self.patch).view(3, self.patch**2, rows, columns)
        pixels = pixels[:, None].expand(-1, self.frames, -1, -1, -1).reshape(-1, rows, columns)  # C, time, patch
        blocks = pixels.view(-1, rows // self.merge, self.merge, columns // self.merge, self.merge)
        return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1), rows, columns


def smart_size(height: int, width: int, factor: int, pixels: int = PIXELS) -> tuple[int, int]:
    """(h, w), multiples of `factor` of about that many pixels: not more where the image has more, else not fewer."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    scale = math.sqrt(pixels / (height * width))
    if h * w > pixels:
        return max(factor, math.floor(height * scale / factor) * factor), max(
            factor, math.floor(width * scale / factor) * factor
        )
    if h * w < pixels:
        return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names that transformers has now; without those of the unused language head."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        if not key.startswith("lm_head."):
            renamed[key] = value
    return renamed


def _instruction(folder: Path, what: str) -> str:
    """The text beside the image. Raises UserError where it is missing, or lacks a place that it must have."""
    path = folder / INSTRUCTION
    if not path.is_file():
        raise UserError(
            f"{what}: {path} is missing: the instruction that the model was trained with, {PROMPT} where the "
            f"prompt goes and {REWARD} once (INSTRUCTION and prompt_with_special_token of its data_collator_qwen.py)."
        )
    text = read_text(path, "a text file")
    for word in (PROMPT, REWARD):
        if text.count(word) != 1:
            raise UserError(f"{what}: {path} has {word} {text.count(word)} times; expected it once.")
    return text


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str, dtype: torch.dtype) -> None:
    """Give an empty module the weights of a file. Raises UserError where names or shapes differ."""
    own = dict(module.named_parameters())
    pretrained.check_missing(sorted(set(own) - set(state)), path, what)
    odd = sorted(k for k in state if k not in own or own[k].shape != state[k].shape)
    if odd:
        raise UserError(f"{what}: {path} does not fit its model: {odd[0]} {tuple(state[odd[0]].shape)}")
    module.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True, strict=False)


def _restore_buffers(model: nn.Module, config: Any) -> None:
    """Compute the constants that no file has, the frequencies of positions, which an empty model lacks."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            inner = config.vision_config if name.startswith("visual") else config.text_config
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(inner))
