"""Rich feedback as a reward (Liang et al. 2024, arXiv 2312.10240): four scores and two heatmaps, predicted and used.

A small model in the paper's outline: features of the image, a head for the scores and one for the heatmaps, trained on
`richhf_records` by squared errors. What the paper has beside it is left out: the text decoder that marks the prompt's
misaligned words. Without a backbone the features are of a small convolutional network on the pixels, for small images
and tests, and blind to the prompt; with CLIP they are its patches, with the prompt's embedding added.

A folder holds config.json (`RichConfig`) and model.safetensors (all but the backbone, which is loaded from its own).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from diffrl.images.rewards import pretrained
from diffrl.images.rewards.arguments import artifacts_weight
from diffrl.images.rewards.base import Metadata
from diffrl.images.rewards.clip import ClipScore
from diffrl.images.rewards.richhf_records import SCORES, Feedback
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path

MODEL_TYPE = "diffrl-richhf"
RARE = -2.0
"""Heatmaps begin at sigmoid(RARE) = .12 everywhere: faults are rare, and from .5 the squared error's first steps would
push the sigmoid so far towards 0 that no gradient is left to find them."""
OVERALL = SCORES.index("overall_score")


@dataclass(frozen=True)
class RichConfig:
    """What `RichModel` is built of. backbone: a CLIP's folder or hub id, or None. width: channels of the heads."""

    backbone: str | None = None
    width: int = 32


class Rich(NamedTuple):
    """Scores (B, 4) in the order of `SCORES`, and heatmaps (B, 2, H, W), artifacts and misalignment; all in [0, 1]."""

    scores: Tensor
    maps: Tensor


class RichModel(nn.Module):
    """Maps images (B, 3 or 1, H, W) in [0, 1] and prompts to `Rich`, the maps of the images' size."""

    def __init__(self, config: RichConfig, *, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.config, width = config, config.width
        self._clip = None if config.backbone is None else ClipScore(config.backbone, device=device)
        if self._clip is None:
            self.features: nn.Module = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.SiLU(),
            )
        else:
            clip = self._clip.model.config
            self.features = nn.Conv2d(clip.vision_config.hidden_size, width, 1)
            self.text = nn.Linear(clip.projection_dim, width)
        self.trunk = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        self.scores = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(SCORES)))
        self.maps = nn.Conv2d(width, 2, 1)
        with torch.no_grad():
            for parameter, value in zip(self.maps.parameters(), (0.0, RARE), strict=True):  # weight, bias
                parameter.fill_(value)
        self.to(device)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Rich:
        """Predict what people would say of images (B, 3 or 1, H, W) with these prompts."""
        h = self.trunk(self._encode(images, prompts))
        maps = interpolate(self.maps(h).sigmoid(), size=images.shape[2:], mode="bilinear", align_corners=False)
        return Rich(self.scores(h.mean((2, 3))).sigmoid(), maps)

    def _encode(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Features (B, width, h, w) of images and prompts."""
        if self._clip is None:
            features: Tensor = self.features(images.float().expand(-1, 3, -1, -1))
            return features
        clip = self._clip
        patches = clip.model.vision_model(pixel_values=clip.preprocess(images)).last_hidden_state[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        text: Tensor = self.text(clip.embed_prompts(prompts))
        joint: Tensor = self.features(grid) + text[:, :, None, None]
        return joint

    def loss(
        self, images: Tensor, prompts: Sequence[str], feedback: Sequence[Feedback], map_weight: float = 1.0
    ) -> Tensor:
        """The mean squared error of the scores plus `map_weight` times that of the heatmaps, each in its own size.

        0-d. Raises ValueError where the numbers of images, prompts and records differ.
        """
        if not len(images) == len(prompts) == len(feedback):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(feedback)} records; need one each")
        rich = self(images, prompts)
        scores = mse_loss(rich.scores, torch.stack([f.scores for f in feedback]).to(rich.scores))
        errors = []
        for maps, record in zip(rich.maps, feedback, strict=True):
            target = torch.stack([record.artifact_map, record.misalignment_map]).to(maps)
            resized = interpolate(maps[None], size=target.shape[1:], mode="bilinear", align_corners=False)[0]
            errors.append(mse_loss(resized, target))
        return scores + map_weight * torch.stack(errors).mean()

    def save(self, folder: Path) -> None:
        """Write the model into `folder`, whole files only."""
        with atomic_path(folder / "model.safetensors") as temporary:
            safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, temporary)
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps({"model_type": MODEL_TYPE, **asdict(self.config)}, indent=2))

    @classmethod
    def load(cls, name: str, *, device: str | torch.device = "cpu") -> "RichModel":
        """The model that `save` wrote, frozen, by folder or hub id.

        Raises UserError where it is none, or lacks its backbone.
        """
        what = f"richhf:{name}"
        folder = pretrained.folder(name, what)
        content = pretrained.read_json(folder / "config.json", what)
        backbone, width = content.get("backbone"), content.get("width")
        if (
            content.get("model_type") != MODEL_TYPE
            or not isinstance(width, int)
            or not isinstance(backbone, str | None)
        ):
            raise UserError(f"{what}: {folder} holds a {content.get('model_type')!r} model; expected {MODEL_TYPE!r}")
        model = cls(RichConfig(backbone, width), device=device)
        path = folder / "model.safetensors"
        pretrained.fill(model, pretrained.tensors(path, what), path, what)
        frozen: RichModel = pretrained.freeze(model, device)
        return frozen


class RichReward:
    """overall score - weight * mean of the artifact map; differentiable.

    The first says how good the image is as a whole; the second takes away for every artifact by its area and how
    certain it is, and its gradient points to the pixels concerned.

    argument: PATH or PATH#WEIGHT (1), the folder of a `RichModel`.
    """

    differentiable = True

    def __init__(self, argument: str, *, device: str | torch.device = "cpu") -> None:
        path, _, weight = argument.partition("#")
        self.name = f"richhf:{argument}"
        try:
            self.weight = artifacts_weight(weight)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        self.device = torch.device(device)
        self.model = RichModel.load(path, device=device)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        rich: Rich = self.model(images.to(self.device), prompts)
        return (rich.scores[:, OVERALL] - self.weight * rich.maps[:, 0].mean((1, 2))).to(images.device)
