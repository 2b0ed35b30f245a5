"""How few bytes a codec needs for an image: DDPO's (in)compressibility (Black et al. 2023, arXiv 2305.13301, 5.1)."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.images.rewards.base import Metadata
from diffrl.support.errors import UserError

QUALITY = 95
"""JPEG's quality, as DDPO has it."""

UNIT = 16
"""The side of the blocks, in pixels, that JPEG codes with its chroma halved."""

Pixels = NDArray[np.uint8]
"""The bytes of one image, (H, W, 3)."""


class CodecSize:
    """The reward sign * size, in kB of 1000 bytes, of each image under a codec; not differentiable.

    size: bytes of one image, from its `Pixels`.
    sign: -1: small is good (compressibility); 1: large is good.
    """

    differentiable = False

    def __init__(self, name: str, size: Callable[[Pixels], int], sign: int = -1) -> None:
        self.name, self.size, self.sign = name, size, sign

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        sizes = [self.size(pixels) for pixels in to_uint8(images)]
        return self.sign * torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def to_uint8(images: Tensor) -> Pixels:
    """Images (B, 3 or 1, H, W) in [0, 1] as bytes (B, H, W, 3): clamped, rounded to the nearest, gray ones as RGB."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images of shape {tuple(images.shape)}; expected (B, 3 or 1, H, W)")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    rgb: Pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    return rgb


def encode(pixels: Pixels, codec: str, **options: int) -> bytes:
    """The file that Pillow writes: `codec` "JPEG" or "PNG", with Pillow's defaults beside `options`."""
    from PIL import Image  # which matplotlib brings

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, codec, **options)
    return file.getvalue()


def jpeg_file(pixels: Pixels, quality: int = QUALITY) -> bytes:
    """The JPEG file of an image; one with a side below 16 is enlarged, every pixel to k x k alike.

    16 x 16 is the unit that JPEG codes colour images in: of a smaller one it would code its own padding.
    """
    k = -(-UNIT // min(pixels.shape[:2]))
    return encode(pixels.repeat(k, 0).repeat(k, 1), "JPEG", quality=quality)


def jpeg_file_bytes(pixels: Pixels, quality: int = QUALITY) -> int:
    """The size of the whole JPEG file. At 8x8 pixels some 600 bytes of it are tables that no image can save."""
    return len(jpeg_file(pixels, quality))


def jpeg_bytes(pixels: Pixels, quality: int = QUALITY) -> int:
    """The size of what JPEG codes of the image itself: see `scan_bytes`."""
    return scan_bytes(jpeg_file(pixels, quality))


def png_bytes(pixels: Pixels) -> int:
    """The size of PNG's IDAT data, the zlib stream of the filtered rows: neither signature, chunk frames nor IHDR."""
    file, position, total = encode(pixels, "PNG"), 8, 0
    while position < len(file):
        length = int.from_bytes(file[position : position + 4], "big")
        total += length if file[position + 4 : position + 8] == b"IDAT" else 0
        position += 12 + length  # length, type and CRC frame the data
    return total


def scan_bytes(file: bytes) -> int:
    """The bytes of a JPEG file's entropy-coded data (ITU-T T.81, annex B), over all its scans.

    Counted: what stands between a scan's header (SOS and its parameters) and the next marker: Huffman codes, stuffed
    zeros, restart markers. Not counted: SOI, EOI, APPn, comments, quantisation and Huffman tables, the frame's and the
    scans' headers. Raises ValueError for a file that is not of that form.
    """
    if file[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG file: it does not begin with SOI")
    position, total = 2, 0
    while file[position : position + 2] != b"\xff\xd9":
        if position + 4 > len(file) or file[position] != 0xFF:
            raise ValueError(f"not a JPEG file: no marker at byte {position} of {len(file)}")
        scan = file[position + 1] == 0xDA
        position += 2 + int.from_bytes(file[position + 2 : position + 4], "big")
        if scan:
            end = _next_marker(file, position)
            total += end - position
            position = end
    return total


def _next_marker(file: bytes, position: int) -> int:
    """Where the next marker begins that ends entropy-coded data: neither a stuffed zero nor a restart marker."""
    while True:
        position = file.find(b"\xff", position)
        if position < 0 or position + 1 >= len(file):
            raise ValueError("not a JPEG file: a scan without an end")
        if file[position + 1] != 0 and not 0xD0 <= file[position + 1] <= 0xD7:
            return position
        position += 2
