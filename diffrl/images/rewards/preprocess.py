"""What a transformers image processor does to an image, on tensors and differentiably: resize, crop, normalise.

Equal to the processor on Pillow's backend, up to what that rounds: Pillow keeps bytes between its two passes of
resampling, so that the result is within some 1.5/255 (before the division by std) of ours; without a resampling (the
image has the size that is wanted) the two are equal to float32's rounding. Filters and their widening when an image
shrinks are Pillow's (torch's `antialias=True`), and so is the limitation of overshoots to [0, 1].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffrl.images.rewards.pretrained import read_json
from diffrl.support.errors import UserError

FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that torch has too."""
RGB = 3
PLAIN = (
    *("Beit", "Bit", "Blip", "CLIP", "ChineseCLIP", "DeiT", "MobileNetV1", "MobileNetV2", "Pvt", "Segformer", "Siglip"),
    "ViT",
)
"""The processors of transformers that do no more than is done here, by their models' names."""
WHOLE = 384
"""From this size on ConvNeXT's processor makes images square, and cuts nothing."""
FURTHER = ("include_top", "rescale_offset", "do_flip_channel_order", "do_pad", "crop_pct")
"""Settings that ask for a step which is not done here."""


@dataclass(frozen=True)
class Preprocess:
    """Maps images (B, 3 or 1, H, W) in [0, 1] to a model's pixel values (B, 3, h, w), float32.

    size: (h, w) to resize to, or one number for the shorter side, or None; mode: torch's name of the filter.
    crop: (h, w) cut from the middle, or None. mean, std: a number a channel.
    """

    size: tuple[int, int] | int | None
    mode: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """The pixel values. Raises UserError for a wrong shape, or an image smaller than the crop."""
        if images.ndim != 4 or images.shape[1] not in (1, RGB):
            raise UserError(f"images of shape {tuple(images.shape)}; expected (B, 3 or 1, H, W)")
        x = images.float().expand(-1, RGB, -1, -1)
        height, width = self._size(*x.shape[2:])
        for size in ((x.shape[2], width), (height, width)):  # in Pillow's order, overshoots limited after each pass
            if size != tuple(x.shape[2:]):
                smooth = self.mode != "nearest-exact"
                x = interpolate(x, size=size, mode=self.mode, antialias=smooth, align_corners=False if smooth else None)
                x = x.clamp(0, 1)
        if self.crop is not None:
            (h, w), (height, width) = self.crop, x.shape[2:]
            if height < h or width < w:
                raise UserError(f"images of {height}x{width} pixels are smaller than the model's crop of {h}x{w}")
            top, left = (height - h) // 2, (width - w) // 2
            x = x[..., top : top + h, left : left + w]
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (self.size, longer) if height <= width else (longer, self.size)


def read(folder: Path, what: str) -> Preprocess:
    """What a model's preprocessor_config.json (or transformers 5's processor_config.json) says.

    Raises UserError where it is missing, or asks for what is not done here.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists() and (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
    content = read_json(path, what)
    try:
        return _read(content.get("image_processor", content))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {path} is not understood ({type(error).__name__}: {error})") from error


def _read(config: Mapping[str, Any]) -> Preprocess:
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT")
    model = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if model == "ConvNext" and config.get("size", {}).get("shortest_edge", 0) >= WHOLE:
        side = config["size"]["shortest_edge"]
        return _read(
            {**config, "image_processor_type": "ViT", "size": {"height": side, "width": side}, "crop_pct": None}
        )
    further = [name for name in FURTHER if config.get(name)]
    if abs(scale * 255 - 1) > 1e-3 or further:
        asked = f"; {further[0]} is {config[further[0]]!r}" if further else ""
        raise ValueError(f"only resizing, cropping and normalising images in [0, 1] are done here{asked}")
    if model not in PLAIN:
        raise ValueError(f"a {kind} may do more than resizing, cropping and normalising; done here: {', '.join(PLAIN)}")
    clip = "CLIP" in kind
    size = _size(config["size"], square=not clip) if config.get("do_resize", True) else None
    crop = _size(config["crop_size"], square=True) if config.get("do_center_crop", clip) else None
    if isinstance(crop, int):
        raise ValueError(f"crop_size {crop}")
    normalise = config.get("do_normalize", True)
    mean = tuple(map(float, config["image_mean"])) if normalise else (0.0,) * RGB
    std = tuple(map(float, config["image_std"])) if normalise else (1.0,) * RGB
    if len(mean) != RGB or len(std) != RGB or not min(std) > 0:
        raise ValueError(f"image_mean {mean} and image_std {std} are not of three channels")
    number = int(config.get("resample", 3 if clip else 2))
    if number not in FILTERS:
        raise ValueError(f"resample {number}, expected one of {sorted(FILTERS)}")
    return Preprocess(size, FILTERS[number], crop, mean, std)


def _size(value: int | Mapping[str, int], *, square: bool) -> tuple[int, int] | int:
    """A size as a configuration file says it; in old files a number: of both sides, CLIP's of the shorter one."""
    if isinstance(value, int):
        return (value, value) if square else value
    if value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    if value.get("shortest_edge") and not value.get("longest_edge"):
        return int(value["shortest_edge"])
    raise ValueError(f"size {dict(value)}")
