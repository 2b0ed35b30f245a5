"""tiny-emoji: a colour diffusion model of 32 x 32 emoji from prompts such as "heart" and "blue heart".

The default of `diffrl finetune`: pictures that a person can judge. Its weights come with the package (1.5 million
parameters in half precision), so that a run starts at once; `benchmarks/emoji/train.py` makes them, from the glyphs of
Noto Color Emoji, as drawn and painted in six colours, turned, scaled and shifted a little.

It is a latent model whose autoencoder is a formula, as JPEG has it: of each block of 4 x 4 pixels the coefficients of
the discrete cosine transform, all 16 of the brightness and the lowest 4 of either colour difference. So states are
(24, 8, 8), and the network is as small as that of tiny-digits. On disk it is a diffusers pipeline like any other
(UNet2DModel, which predicts x_0, on the cosine schedule of 1,000 steps), whose 24 channels `to_pixels` turns into
pictures. Prompts: `emoji_words`.
"""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d
from typing_extensions import override

from diffrl.images.emoji_words import class_of
from diffrl.images.model import Condition, Lora, Origin
from diffrl.images.models.pipelines import PixelModel, load_pipeline
from diffrl.support.errors import UserError
from diffrl.support.folder import digest, verified

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Weights that come with the package, each folder with its checksums (SHA256SUMS)."""
BLOCK = 4
"""The side of a block, in pixels."""
ROWS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, and two colour differences, of red, green and blue; orthogonal."""
KEPT = (4, 2, 2)
"""Of each of ROWS, the frequencies that are kept, in either direction."""

MEANS = (4.25, *(0.0,) * 15, 0.43, 0.0, 0.0, 0.0, 0.17, 0.0, 0.0, 0.0)
SPREADS = (
    *(2.92, 0.85, 0.39, 0.17, 0.82, 0.45, 0.25, 0.13, 0.37, 0.25, 0.17, 0.1, 0.18, 0.13, 0.1, 0.07),
    *(1.7, 0.4, 0.38, 0.2),
    *(1.08, 0.24, 0.24, 0.12),
)
"""Of the coefficients in the training pictures: means and standard deviations. States are standardised, so that noise
hides what is coarse last and, in what is sampled, errors of fine coefficients stay as small as these are."""


@functools.cache
def basis() -> Tensor:
    """What a block's coefficients are sums of products with: (24, 3, 4, 4), orthonormal; brightness first."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    waves = [torch.cos(math.pi * (2 * n + 1) * k / (2 * BLOCK)) for k in range(BLOCK)]
    waves = [wave / wave.norm() for wave in waves]
    pictures = []
    for row, kept in zip(ROWS, KEPT, strict=True):
        colour = torch.tensor(row, dtype=torch.float64)
        colour = colour / colour.norm()
        pictures += [torch.einsum("c,h,w->chw", colour, waves[u], waves[v]) for u in range(kept) for v in range(kept)]
    return torch.stack(pictures).float()


def to_states(x: Tensor) -> Tensor:
    """Images (B, 3, 4 h, 4 w) in [-1, 1] as states (B, 24, h, w), each coefficient standardised."""
    mean, spread = (_column(values).to(x) for values in (MEANS, SPREADS))
    return (conv2d(x, basis().to(x), stride=BLOCK) - mean) / spread


def to_pixels(x0: Tensor) -> Tensor:
    """States (B, 24, h, w) as images (B, 3, 4 h, 4 w) around [-1, 1]; what `to_states` left out is 0."""
    mean, spread = (_column(values).to(x0) for values in (MEANS, SPREADS))
    return conv_transpose2d(x0 * spread + mean, basis().to(x0), stride=BLOCK)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


class EmojiModel(PixelModel):
    """tiny-emoji, or a fine-tuned one: a class-conditional `UNet2DModel` of 24 channels, a class a prompt."""

    @override
    def _encode(self, prompt: str) -> Condition:
        return {"class_labels": torch.tensor([class_of(prompt)], device=self.device)}

    @override
    def _decoded(self, x0: Tensor) -> Tensor:
        return to_pixels(x0)

    @override
    def _encoded(self, images: Tensor) -> Tensor:
        height, width = (BLOCK * side for side in self.shape[1:])
        if tuple(images.shape[1:]) != (3, height, width):
            raise UserError(f"Images of shape {tuple(images.shape[1:])}; {self.name} has (3, {height}, {width}).")
        return to_states(images)


def shipped_weights() -> str:
    """The SHA-256 digest of tiny-emoji's weights in this version of the package."""
    return digest(verified(WEIGHTS / "tiny-emoji" / "unet" / "diffusion_pytorch_model.safetensors"))


def tiny_emoji(
    *,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> EmojiModel:
    """The model tiny-emoji, from the package; arguments as for `load_pipeline`.

    Raises Damaged where the package's files are not as they were shipped.
    """
    folder = WEIGHTS / "tiny-emoji"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        verified(folder / "unet" / name)
    model = load_pipeline(
        str(folder), kind=EmojiModel, lora=lora, precision=precision, device=device, seed=seed, **options
    )
    assert isinstance(model, EmojiModel)
    model.name = "tiny-emoji"
    model.tuned.origin = Origin(model.name, shipped_weights())
    return model
