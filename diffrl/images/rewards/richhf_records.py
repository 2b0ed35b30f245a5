"""The records of RichHF-18K (Liang et al. 2024, arXiv 2312.10240; google-research-datasets/richhf-18k), read without
TensorFlow: TFRecord framing, tf.train.Example in protobuf's wire format, and the fields.

A record has eight fields: `filename` (of the image in Pick-a-Pic v1, which is not part of the data set),
`aesthetics_score`, `artifact_score`, `misalignment_score`, `overall_score` (in [0, 1], each the higher the better),
`artifact_map` and `misalignment_map` (gray image files, 512x512, the brighter the worse) and
`prompt_misalignment_label` (for each word of the prompt, 0 where it is misaligned, 1 where it is not).
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrl.images.models.loading import images_extra
from diffrl.support.errors import DataError

SCORES = ("aesthetics_score", "artifact_score", "misalignment_score", "overall_score")
"""The names of the scores, in the order of `Feedback.scores`."""
MAPS = ("artifact_map", "misalignment_map")

Values = list[bytes] | list[float] | list[int]


@dataclass(frozen=True)
class Feedback:
    """What people said of one image. scores (4,), in the order of `SCORES`; maps (H, W) in [0, 1], 1 the worst."""

    filename: str
    scores: Tensor
    artifact_map: Tensor
    misalignment_map: Tensor
    aligned: tuple[bool, ...]
    """For each word of the prompt, whether the image shows it."""


def read(path: Path, *, verify: bool = True) -> Iterator[Feedback]:
    """The records of a .tfrecord file, in order. Raises DataError, naming the file and the record, for a broken one."""
    for index, record in enumerate(frames(path, verify=verify)):
        try:
            yield _feedback(example(record))
        except (ValueError, struct.error, IndexError, OSError) as error:
            raise DataError(f"{path}, record {index}: {error}") from error


def frames(path: Path, *, verify: bool = True) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes, little endian), its masked CRC-32C, data, their masked CRC-32C.

    verify: check the data's sum too (the length's always is): it is computed in Python, at some megabytes a second.
    Raises DataError for a file that is cut or damaged.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected a .tfrecord file of RichHF-18K")
    with path.open("rb") as file:
        index = 0
        while head := file.read(12):
            if len(head) < 12 or masked_crc32c(head[:8]) != int.from_bytes(head[8:], "little"):
                pointer = head.startswith(b"version http")
                hint = "it is Git LFS's pointer: git lfs pull" if pointer else "it is cut, damaged or no TFRecord file"
                raise DataError(f"{path}, record {index}: no length; {hint}")
            length = int.from_bytes(head[:8], "little")
            body = file.read(length + 4)
            if len(body) < length + 4:
                raise DataError(f"{path}, record {index}: the file ends within it")
            data = body[:length]
            if verify and masked_crc32c(data) != int.from_bytes(body[length:], "little"):
                raise DataError(f"{path}, record {index}: its checksum does not fit; the file is damaged")
            yield data
            index += 1


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, its bits reversed
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The cyclic redundancy check with Castagnoli's polynomial (RFC 3720, appendix B.4)."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord files hold it: CRC-32C turned right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def example(data: bytes) -> dict[str, Values]:
    """The features of a serialised tf.train.Example by name. Raises ValueError for bytes that are none.

    Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, Feature { oneof: BytesList = 1,
    FloatList = 2, Int64List = 3 }, each list { repeated value = 1 }, numbers packed or not.
    """
    features: dict[str, Values] = {}
    for number, message in _fields(data):
        for _, entry in _fields(_bytes(message)) if number == 1 else ():
            parts = dict(_fields(_bytes(entry)))
            lists = _fields(_bytes(parts.get(2, b"")))
            features[_bytes(parts.get(1, b"")).decode()] = next((_values(kind, _bytes(v)) for kind, v in lists), [])
    return features


def _values(kind: int, data: bytes) -> Values:
    values = [value for number, value in _fields(data) if number == 1]
    if kind == 1:
        return [_bytes(value) for value in values]
    if kind == 2:
        return [x for value in values for (x,) in struct.iter_unpack("<f", _bytes(value))]
    return [_signed(x) for v in values for x in ([v] if isinstance(v, int) else _varints(v))]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A message's fields: (number, value), a varint as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no protobuf message: wire type {wire}")
        if position + length > len(data):
            raise ValueError("no protobuf message: a field ends beyond it")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        value, position = value | (byte & 0x7F) << shift, position + 1
        if byte < 0x80:
            return value, position
    raise ValueError("no protobuf message: a number of more than ten bytes")


def _varints(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("no tf.train.Example: a number where a message is expected")
    return value


def _feedback(features: dict[str, Values]) -> Feedback:
    missing = [name for name in ("filename", *SCORES, *MAPS, "prompt_misalignment_label") if not features.get(name)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}; it has {', '.join(sorted(features)) or 'nothing'}")
    first = {name: values[0] for name, values in features.items() if values}
    scores = torch.tensor([_number(first[name], name) for name in SCORES])
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"scores {scores.tolist()}")
    artifact, misalignment = (_map(first[name], name) for name in MAPS)
    words = _text(first["prompt_misalignment_label"], "prompt_misalignment_label").split()
    if set(words) - {"0", "1"}:
        raise ValueError(f"prompt_misalignment_label {' '.join(words)!r}: expected 0 and 1")
    aligned = tuple(word == "1" for word in words)
    return Feedback(_text(first["filename"], "filename"), scores, artifact, misalignment, aligned)


def _number(value: bytes | float, name: str) -> float:
    if isinstance(value, bytes):
        raise ValueError(f"{name} is text, expected a number")
    return float(value)


def _text(value: bytes | float, name: str) -> str:
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is a number, expected text")
    return value.decode()


def _map(value: bytes | float, name: str) -> Tensor:
    """A heatmap, from an image file, gray."""
    with images_extra("Reading RichHF-18K"):
        from PIL import Image
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is a number, expected an image file")
    try:
        with Image.open(io.BytesIO(value), formats=["PNG", "JPEG"]) as image:
            return torch.from_numpy(np.array(image.convert("L"))).float() / 255
    except OSError as error:
        raise ValueError(f"{name} is no image file: {error}") from error
