import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffrl.images.rewards import parse
from diffrl.images.rewards.codecs import encode, jpeg_bytes, jpeg_file_bytes, png_bytes, scan_bytes, to_uint8
from diffrl.support.errors import UserError


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def value(spec: str, batch: torch.Tensor) -> torch.Tensor:
    return parse(spec)(batch, [""] * len(batch), [{}] * len(batch))


def test_jpeg_file_is_ddpos_size() -> None:
    """Written out with Pillow: kilobytes of 1000, quality 95, rounded to bytes, gray as RGB; per sample."""
    batch = images(3, 1, 16, 24)
    expected = []
    for image in batch:
        file = io.BytesIO()
        gray = np.round(image[0].numpy() * 255).astype(np.uint8)
        Image.fromarray(gray).convert("RGB").save(file, "JPEG", quality=95)
        expected.append(-len(file.getvalue()) / 1000)
    torch.testing.assert_close(value("jpeg-file", batch), torch.tensor(expected))
    torch.testing.assert_close(value("jpeg-file", batch[1:2]), torch.tensor(expected[1:2]))
    torch.testing.assert_close(value("jpeg-file", batch.expand(-1, 3, -1, -1)), torch.tensor(expected))


def test_a_small_image_is_measured_in_jpegs_unit() -> None:
    """8x8 as 16x16 of doubled pixels, 4x4 of fourfold ones; from 16 up as it is."""
    small = images(2, 1, 8, 8)
    doubled = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(value("jpeg", small), value("jpeg", doubled), rtol=0, atol=0)
    assert jpeg_file_bytes(to_uint8(images(1, 1, 16, 20))[0]) == len(
        encode(to_uint8(images(1, 1, 16, 20))[0], "JPEG", quality=95)
    )
    assert not torch.equal(
        value("jpeg", doubled), value("jpeg", doubled.repeat_interleave(2, 2).repeat_interleave(2, 3))
    )


def test_the_header_is_all_that_jpeg_leaves_out() -> None:
    """What is left of the file without its scan is the same for every image of a size, so only the scan can improve."""
    batch = images(4, 3, 32, 32) * torch.tensor([0.0, 0.2, 0.6, 1.0])[:, None, None, None]
    files = [encode(pixels, "JPEG", quality=95) for pixels in to_uint8(batch)]
    assert len({len(file) - scan_bytes(file) for file in files}) == 1
    header = value("jpeg-file", batch) - value("jpeg", batch)
    torch.testing.assert_close(header, torch.full((4,), header[0].item()))
    assert -0.65 < header[0] < -0.6
    sizes = value("jpeg", batch)
    assert (sizes.diff() < 0).all(), "more noise takes more bytes"
    torch.testing.assert_close(value("incompressible", batch), -sizes)


def test_the_scan_is_what_the_markers_say() -> None:
    """A file of one scan: from the end of SOS's 14 bytes (three components) to EOI; restarts and comments included."""
    pixels = to_uint8(images(1, 3, 64, 64))[0]
    file = encode(pixels, "JPEG", quality=95)
    at = file.index(b"\xff\xda\x00\x0c\x03")
    assert scan_bytes(file) == len(file) - 2 - (at + 14)
    commented = file[:2] + b"\xff\xfe\x00\x06\xff\xda\xff\xd9" + file[2:]
    assert scan_bytes(commented) == scan_bytes(file)
    restarts = encode(pixels, "JPEG", quality=95, restart_marker_blocks=1)
    assert b"\xff\xd3" in restarts
    assert scan_bytes(restarts) == len(restarts) - 2 - (restarts.index(b"\xff\xda\x00\x0c\x03") + 14)
    progressive = encode(pixels, "JPEG", quality=95, progressive=1)
    assert progressive.count(b"\xff\xda\x00") > 2
    assert 0.5 < scan_bytes(progressive) / scan_bytes(file) < 1.1


@pytest.mark.parametrize(
    "file", [b"", b"\x89PNG", b"\xff\xd8", b"\xff\xd8\xff\xda\x00\x02\x11\xff\x00\xff", b"\xff\xd8ab"]
)
def test_what_is_no_jpeg_is_refused(file: bytes) -> None:
    with pytest.raises(ValueError, match="not a JPEG file"):
        scan_bytes(file)


def test_quality_is_an_argument() -> None:
    batch = images(2, 3, 16, 16)
    pixels = to_uint8(batch)
    torch.testing.assert_close(value("jpeg:50", batch), torch.tensor([-jpeg_bytes(p, 50) / 1000 for p in pixels]))
    torch.testing.assert_close(
        value("jpeg-file:50", batch), torch.tensor([-jpeg_file_bytes(p, 50) / 1000 for p in pixels])
    )
    assert (value("jpeg:50", batch) > value("jpeg", batch)).all()
    for wrong in ("jpeg:0", "jpeg:101", "jpeg:high"):
        with pytest.raises(UserError, match=wrong):
            parse(wrong)


def test_png_is_its_zlib_stream() -> None:
    pixels = to_uint8(images(1, 3, 40, 30))[0]
    file = encode(pixels, "PNG")
    first = file.index(b"IDAT") + 4
    length = int.from_bytes(file[first - 8 : first - 4], "big")
    assert png_bytes(pixels) == length
    assert len(zlib.decompress(file[first : first + length])) == 40 * (1 + 3 * 30)
    smooth = torch.full((1, 3, 40, 30), 0.5)
    assert value("png", smooth) > value("png", images(1, 3, 40, 30)) + 1


def test_rounding_is_to_the_nearest_and_within_a_byte() -> None:
    batch = torch.tensor([-0.5, 0.0, 1.4 / 255, 1.6 / 255, 1.0, 2.0]).reshape(1, 1, 1, 6)
    assert to_uint8(batch)[0, 0, :, 0].tolist() == [0, 0, 1, 2, 255, 255]
    with pytest.raises(UserError, match=r"\(2, 4, 8, 8\)"):
        to_uint8(torch.zeros(2, 4, 8, 8))
