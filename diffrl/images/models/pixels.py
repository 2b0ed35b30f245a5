"""From what networks and autoencoders speak, [-1, 1], to images in [0, 1]; and noise that belongs to an image."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.support.seeds import generator_at


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        outward = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


def to_images(x: Tensor) -> Tensor:
    """(x + 1)/2 clamped to [0, 1].

    The gradient of a loss, to be minimised, passes inside [0, 1], and outside where descent leads back to it; what
    would lead further out is 0. A plain clamp is 0 outside altogether: a pixel once too white stays so, whatever the
    reward.
    """
    images: Tensor = _Clamp.apply(x / 2 + 0.5)  # type: ignore[no-untyped-call]
    return images


def noise_by_image(images: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise (B, *shape) drawn from the seed and each image, so that it is an image's own.

    On the images' device and of their dtype.
    """
    each = []
    for image in images:
        checksum = zlib.crc32(image.cpu().contiguous().numpy().tobytes())
        each.append(torch.randn(*shape, generator=generator_at(seed, checksum)))
    return torch.stack(each).to(images)
