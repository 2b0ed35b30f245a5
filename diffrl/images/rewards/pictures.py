"""Rewards in closed form that a person can check at a glance: a colour, and symmetry."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffrl.images.rewards.arguments import degrees_of
from diffrl.images.rewards.base import Metadata
from diffrl.support.errors import UserError

EPSILON = 1e-6
"""Variance a pixel below which an image counts as plain, and so as symmetric."""


class Colour:
    """How much of a hue an image has, in [-1, 1]: the mean over pixels of chroma times cos(hue - wanted); linear.

    With A = R - (G + B)/2 and B' = sqrt(3)/2 (G - B), the chroma of a pixel is the length of (A, B') and its hue the
    angle: red (1, 0, 0) is 1 long at 0 degrees, and so are yellow at 60, green at 120 and so on. Greys have none. An
    image that is all of one of these scores 1 for its own hue, and -1 for the opposite one. Differentiable.

    hue: a name of HUES or degrees, such as "210". Raises UserError for another.
    """

    differentiable = True

    def __init__(self, hue: str) -> None:
        self.name = f"colour:{hue}"
        angle = math.radians(degrees_of(hue))
        a, b = math.cos(angle), math.sin(angle) * math.sqrt(3) / 2
        self.weights = (a, -a / 2 + b, -a / 2 - b)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        rgb = _pictures(images).expand(-1, 3, -1, -1).double().mean((2, 3))
        return rgb @ rgb.new_tensor(self.weights)


class Symmetry:
    """How alike an image is to its mirror image (left and right), in [-1, 1]: their correlation. Differentiable.

    <x - m, x' - m> / |x - m|^2 over all channels and pixels, with x' the mirrored image and m each channel's mean.
    1: symmetric, and so is a plain one; fading an image changes nothing.
    """

    name = "symmetry"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        x = _pictures(images).double()
        x = x - x.mean((2, 3), keepdim=True)
        both = (x * x.flip(-1)).mean((1, 2, 3)) + EPSILON
        return both / (x.square().mean((1, 2, 3)) + EPSILON)


def _pictures(images: Tensor) -> Tensor:
    """The images. Raises UserError where they are not (B, 3 or 1, H, W)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images of shape {tuple(images.shape)}; expected (B, 3 or 1, H, W)")
    return images.to(torch.float32)
