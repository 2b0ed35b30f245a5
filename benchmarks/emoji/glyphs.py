"""The pictures behind tiny-emoji and its classifiers: emoji of six typefaces, as drawn and painted in six colours.

tiny-emoji itself sees Noto Color Emoji alone (SIL Open Font Licence 1.1, which allows what is made with the font under
any licence); two of the classifiers see the other five, so that they know the objects from other drawings.

    apt-get download fonts-noto-color-emoji && dpkg-deb -x fonts-noto-color-emoji_*.deb FOLDER/noto
    cd FOLDER && for set in fluent-emoji-flat fluent-emoji twemoji noto-v1 emojione; do
        npm pack @iconify-json/$set && mkdir $set && tar xzf iconify-json-$set-*.tgz -C $set; done
    pip install resvg_py                                        what draws the five, which are SVG

Versions used: fonts-noto-color-emoji 2.042 (OFL 1.1), fluent-emoji-flat 1.2.6 and fluent-emoji 1.2.7 (MIT,
Microsoft), twemoji 1.2.5 (CC BY 4.0, Twitter and others), noto-v1 1.2.5 (Apache 2.0, Google), emojione 1.2.3 (CC BY
4.0, EmojiOne).
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from diffrl.images.emoji_words import COLOURS, OBJECTS

CODES = dict(zip(OBJECTS, "❤⭐🍎🚗🐟🐱🌳🍄🌼🎈🐸👑", strict=True))
NAMES = {
    "heart": ("red-heart", "heart-suit"),
    "star": ("star", "glowing-star"),
    "apple": ("red-apple", "green-apple"),
    "car": ("automobile", "taxi"),
    "fish": ("fish", "tropical-fish"),
    "cat": ("cat-face", "cat-face"),
    "tree": ("deciduous-tree", "deciduous-tree"),
    "mushroom": ("mushroom", "mushroom"),
    "flower": ("blossom", "sunflower"),
    "balloon": ("balloon", "balloon"),
    "frog": ("frog", "frog"),
    "crown": ("crown", "crown"),
}
"""Iconify's names of two drawings of each object."""
SETS = ("fluent-emoji-flat", "fluent-emoji", "twemoji", "noto-v1", "emojione")
PAINT = {
    "red": (222, 38, 44),
    "yellow": (252, 206, 40),
    "green": (62, 174, 78),
    "blue": (48, 118, 230),
    "purple": (138, 68, 200),
    "pink": (252, 132, 182),
}
SIDE = 64
"""Of the pictures before they are turned, shifted and halved."""


def noto(folder: Path) -> list[Image.Image]:
    """Noto Color Emoji's glyphs, RGBA, in the order of OBJECTS."""
    file = folder / "noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font = ImageFont.truetype(file, 109)  # the size of its bitmaps
    glyphs = []
    for code in CODES.values():
        image = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(image).text((20, 20), code, font=font, embedded_color=True)
        glyphs.append(image)
    return glyphs


def iconify(folder: Path, name: str, which: int) -> list[Image.Image]:
    """The glyphs of one of `SETS`, RGBA, in the order of OBJECTS. which: of the two drawings of each."""
    import resvg_py

    icons = json.loads((folder / name / "package/icons.json").read_text())
    glyphs = []
    for thing in OBJECTS:
        key = NAMES[thing][which]
        key = icons.get("aliases", {}).get(key, {}).get("parent", key)
        icon, side = icons["icons"][key], icons["width"]
        box = f"0 0 {icon.get('width', side)} {icon.get('height', icons['height'])}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200" viewBox="{box}">{icon["body"]}</svg>'
        glyphs.append(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA"))
    return glyphs


def square(glyph: Image.Image) -> NDArray[np.float32]:
    """A glyph cut to what is drawn, in the middle of a square, (SIDE, SIDE, 4) in [0, 1], alpha premultiplied."""
    glyph = glyph.crop(glyph.getchannel("A").getbbox())
    side = max(glyph.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], -1)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(x, size=(SIDE, SIDE), mode="area" if side >= SIDE else "bilinear")[0].permute(1, 2, 0).numpy()


def painted(pixels: NDArray[np.float32], colour: str) -> NDArray[np.float32]:
    """A picture (SIDE, SIDE, 4) in one colour: dark parts darker, light ones lighter; black, grey and white stay."""
    alpha = pixels[..., 3:]
    rgb = pixels[..., :3] / np.maximum(alpha, 1e-6)
    light = rgb @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    chroma = rgb.max(-1) - rgb.min(-1)
    inked = (alpha[..., 0] > 0.5) & (chroma > 0.25)
    middle = float(np.median(light[inked]))
    target = np.array(PAINT[colour], dtype=np.float32) / 255
    down = np.clip(light / middle, 0, 1)[..., None] ** 0.8
    up = np.clip((light - middle) / (1 - middle), 0, 1)[..., None] * 0.8
    new = target * down * (1 - up) + up
    mix = np.clip((chroma - 0.08) / 0.2, 0, 1)[..., None]
    return np.concatenate([(rgb * (1 - mix) + new * mix) * alpha, alpha], -1).astype(np.float32)


def all_prompts(glyphs: list[Image.Image]) -> Tensor:
    """The pictures of all prompts of a typeface, (84, 4, SIDE, SIDE), alpha premultiplied, in the order of PROMPTS."""
    plain = [square(glyph) for glyph in glyphs]
    each = [picture for pixels in plain for picture in (pixels, *(painted(pixels, colour) for colour in COLOURS))]
    return torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).contiguous()


def drawn(
    pictures: Tensor,
    generator: torch.Generator,
    *,
    turn: float = 6.0,
    shift: float = 0.04,
    least: float = 0.8,
    mirror: bool = False,
    stretch: float = 0.0,
) -> Tensor:
    """Pictures (B, 4, SIDE, SIDE) on white, (B, 3, 32, 32) in [0, 1]: turned, scaled and shifted at random.

    turn: degrees, at most. shift: of the image's side, at most. least: the smallest scale; the largest is .93.
    mirror: every other one. stretch: each side by so much, at most, and sheared by as much.
    """
    u = torch.rand(4, len(pictures), generator=generator)
    angle = (2 * u[0] - 1) * turn * torch.pi / 180
    scale = 1 / (least + (0.93 - least) * u[1])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    across, along, shear = (
        1 + stretch * (2 * torch.rand(3, len(pictures), generator=generator) - 1) if stretch else (1, 1, 1)
    )
    dx, dy = (2 * u[2] - 1) * 2 * shift, (2 * u[3] - 1) * 2 * shift
    rows = [across * cos, -sin + shear - 1, dx, sin, along * cos, dy]
    matrix = torch.stack(rows, -1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(pictures), 4, SIDE, SIDE], align_corners=False)
    turned = F.avg_pool2d(F.grid_sample(pictures, grid, align_corners=False), SIDE // 32)
    images = turned[:, :3] + 1 - turned[:, 3:]
    if mirror:
        images = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images, images.flip(-1))
    return images
