"""From what networks and autoencoders speak, [-1, 1], to images in [0, 1]."""

from typing import Any

import torch
from torch import Tensor


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
