"""Images for tests of rewards."""

import torch
from PIL import Image

from diffrl.images.rewards.codecs import to_uint8


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random images of whole bytes, smooth enough that resampling is not all there is."""
    coarse = torch.rand(*shape[:2], 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def pictures(batch: torch.Tensor) -> list[Image.Image]:
    """The same for an outside implementation."""
    return [Image.fromarray(pixels) for pixels in to_uint8(batch)]
