"""Rewards on CLIP (Radford et al. 2021, arXiv 2103.00020): its score, PickScore, HPSv2, LAION's aesthetic predictor.

All load a folder, or hub id, in transformers' CLIP format: config.json, model.safetensors, preprocessor_config.json,
and (but for the aesthetic predictor) the tokenizer. With u an image's and w a prompt's projected embedding, of length
1:

clip       100 u.w (CLIPScore, Hessel et al. 2021, arXiv 2104.08718, without its limit at 0, where it has no gradient)
pickscore  exp(logit scale) u.w (Kirstain et al. 2023, arXiv 2305.01569): yuvalkirstain/PickScore_v1, a CLIP-H, its
           tokenizer and preprocessor_config.json those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
hps        u.w (Wu et al. 2023, arXiv 2306.09341): HPSv2 is published as OpenCLIP's ViT-H-14 weights, a pickle; convert
           them to transformers' format (its script for OpenCLIP models) beside the tokenizer of the line above
aesthetic  head(u), linear layers one after the other (Schuhmann et al. 2022, arXiv 2210.08402, and its improved
           predictor, which DDPO uses): openai/clip-vit-large-patch14, and the head's weights in aesthetic.safetensors
           in the same folder or in a file of your own after '#'. Keys as published: weight and bias, or
           layers.N.weight and layers.N.bias (dropout between them does nothing here). Published as .pth, a pickle.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from diffrl.images.models.loading import images_extra
from diffrl.images.models.text import tell_cut
from diffrl.images.rewards import preprocess, pretrained
from diffrl.images.rewards.base import Metadata
from diffrl.support.errors import UserError

HEAD = "aesthetic.safetensors"


class ClipReward:
    """What the rewards on CLIP share: the model, and the embeddings of images and prompts.

    argument: the folder or hub id. Raises UserError where it cannot be used.
    """

    kind = "clip"
    differentiable = True
    further: tuple[str, ...] = ()
    """Files of the folder beside a CLIP model's own."""

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        self.name = f"{self.kind}:{argument}"
        self.device = torch.device(device)
        with images_extra(self.name):
            from transformers import CLIPModel
        self.folder = pretrained.folder(argument, self.name, *self.further)
        kind = pretrained.read_json(self.folder / "config.json", self.name).get("model_type")
        if kind != "clip":
            raise UserError(f"{self.name}: the model in {self.folder} is of type {kind!r}; expected 'clip'")
        self.preprocess = preprocess.read(self.folder, self.name)
        self.model = pretrained.load(CLIPModel, self.folder, self.name, device)

    def embed_images(self, images: Tensor) -> Tensor:
        """The images' embeddings u, (B, d), of length 1."""
        pixels = self.preprocess(images.to(self.device))
        return normalize(
            self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output), dim=-1
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        return self.values(self.embed_images(images), prompts).to(images.device)

    def values(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        """The values (B,) of embedded images (B, d)."""
        raise NotImplementedError


class ClipScore(ClipReward):
    """100 u.w: image and prompt, in CLIP's eyes."""

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        super().__init__(argument, device=device)
        self.tokenizer = pretrained.tokenizer(self.folder, self.name)
        self.length = self.model.config.text_config.max_position_embeddings

    @property
    def scale(self) -> float | Tensor:
        """What the cosine is multiplied by."""
        return 100.0

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' embeddings w, (B, d), of length 1.

        Each text is encoded once, and cut where it is longer than the model's limit.
        """
        texts = list(dict.fromkeys(prompts))
        tell_cut(self.tokenizer, texts, self.length, self.name)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        w = normalize(self.model.text_projection(pooled), dim=-1)
        return w[[texts.index(prompt) for prompt in prompts]]

    def values(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        """The reward's values (B,), one an image."""
        return self.scale * (image * self.embed_prompts(prompts)).sum(-1)


class PickScore(ClipScore):
    """exp(logit scale) u.w, fitted to people's choices between two images of a prompt."""

    kind = "pickscore"

    @property
    def scale(self) -> float | Tensor:
        """What the cosine is multiplied by: exp of the model's own logit scale, some 100."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale


class HPS(ClipScore):
    """u.w, fitted to people's rankings of the images of a prompt (HPD v2)."""

    kind = "hps"

    @property
    def scale(self) -> float | Tensor:
        """1: the cosine is not scaled."""
        return 1.0


class Aesthetic(ClipReward):
    """head(u): how much people like an image, some 1 to 10; the prompt does not count.

    argument: PATH or PATH#HEAD, the head's safetensors file.
    """

    kind = "aesthetic"
    further = (HEAD,)

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        path, _, head = argument.partition("#")
        super().__init__(path, device=device)
        file = Path(head).expanduser() if head else self.folder / HEAD
        self.layers = [
            (weight.to(device), bias.to(device))
            for weight, bias in read_head(pretrained.tensors(file, self.name), file, self.name)
        ]
        if self.layers[0][0].shape[1] != (width := self.model.config.projection_dim):
            raise UserError(
                f"{self.name}: the head {file} takes {self.layers[0][0].shape[1]} numbers, this CLIP's embeddings are "
                f"of {width}: the head belongs to another (LAION's to openai/clip-vit-large-patch14)."
            )

    def values(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        """The reward's values (B,), one an image."""
        for weight, bias in self.layers:
            image = linear(image, weight, bias)
        return image[:, 0]


def read_head(state: Mapping[str, Tensor], file: Path, what: str) -> list[tuple[Tensor, Tensor]]:
    """The linear layers of a head by their number: (weight, bias) pairs, ending in one output.

    Keys end in `weight` and `bias`, a layer's number before them where there are several (a chain without activations,
    as LAION's and ImageReward's heads are). Raises UserError for anything else.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:.*?(\d+)\.)?(weight|bias)", key)
        if match is not None:
            found.setdefault(int(match.group(1) or 0), {})[match.group(2)] = value.float()
    layers = [(part.get("weight"), part.get("bias")) for _, part in sorted(found.items())]
    whole = [(w, b) for w, b in layers if w is not None and b is not None and w.ndim == 2 and b.shape == w.shape[:1]]
    fits = all(a[0].shape[0] == b[0].shape[1] for a, b in itertools.pairwise(whole))
    if len(state) != 2 * len(whole) or not whole or not fits or len(whole[-1][0]) != 1:
        raise UserError(
            f"{what}: {file} is no chain of linear layers to one value; its keys: {', '.join(sorted(state))}"
        )
    return whole


def chain(layers: Sequence[tuple[Tensor, Tensor]]) -> nn.Sequential:
    """The layers of a head as a module."""
    modules = []
    for weight, bias in layers:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        modules.append(layer)
    return nn.Sequential(*modules)
