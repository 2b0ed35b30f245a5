"""`.npz` files that are odd: their zip archive, the headers of their arrays, and what is in them."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Odd = Callable[[dict[str, bytes], np.random.Generator], str]
"""A change of an archive's members by name; those that it leaves are written anew."""

COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
OTHERS = ("images", "infos/camera", "metadata/env_id", "next_observations")
BOMB = 1_500_000_000
"""Bytes of zeros that a member of about 1.5 MB holds."""


def _name(rng: np.random.Generator, others: bool = True) -> str:
    names = (*COLUMNS, *OTHERS) if others else COLUMNS
    return names[int(rng.integers(len(names)))]


def _member(values: Any, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


def _header(text: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A member of the format's version 1 with any header."""
    head = text.encode("latin1")
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(head) % 2**16) + head + body


class _Touches:
    """What a pickle does when it is read: it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (open, ("hit", "w"))


def _pickled(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name = _name(rng)
    members[name] = _member(np.array([_Touches(), None], object), pickled=True)
    return f"{name} is pickled"


def _odd_header(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name = _name(rng)
    headers = (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 9), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 200, }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (200, 3), }",
        "{'descr': 'f99', 'fortran_order': False, 'shape': (200, 3), }",
        "{'descr': [('a', '<f4'), ('a', '<f4')], 'fortran_order': False, 'shape': (200,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (200,), }",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (200,), }",
        "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (200,), }",
        "{'descr': '|V0', 'fortran_order': False, 'shape': (200,), }",
        "{'descr': '<f4', 'shape': (200,), }",
        "{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (200,), }",
        "(" * 500 + ")" * 500,
        "[" * 30000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (200, 3), 'more': 1}",
        "\x00" * 100,
        "{'descr': '<c8', 'fortran_order': False, 'shape': (75,), }",
    )
    text = headers[int(rng.integers(len(headers)))]
    version = (b"\x01\x00", b"\x01\x00", b"\x09\x00", b"\x02\x00")[int(rng.integers(4))]
    members[name] = _header(text, bytes(600), version)
    return f"{name} has the header {text[:60]!r}, version {version[0]}"


def _dtype(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name, kinds = _name(rng), ("f2", "f8", ">f4", "i8", "u1", "c8", "S3", "U3", "?", "M8[s]", "V4")
    kind = kinds[int(rng.integers(len(kinds)))]
    members[name] = _member(np.zeros((200, 3) if "obs" in name else 200).astype("i8").astype(kind))
    return f"{name} as {kind}"


def _shape(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name = _name(rng)
    shapes: tuple[tuple[int, ...], ...] = (
        (),
        (0,),
        (199,),
        (201, 3),
        (1, 200),
        (200, 0),
        (200, 1, 1),
        (200, 3, 2),
        (200,),
    )
    shape = shapes[int(rng.integers(len(shapes)))]
    members[name] = _member(np.zeros(shape, np.float32))
    return f"{name} has shape {shape}"


def _value(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name, value = _name(rng, others=False), float(rng.choice([np.nan, np.inf, 1e30, 2, -0.5]))
    values = np.load(io.BytesIO(members[name])).astype(np.float64)
    values.reshape(-1)[int(rng.integers(values.size))] = value
    members[name] = _member(values)
    return f"{value} in {name}"


def _missing(members: dict[str, bytes], rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        members.clear()
        return "no members"
    name = _name(rng, others=False)
    del members[name]
    return f"{name} missing"


def _bytes(members: dict[str, bytes], rng: np.random.Generator) -> str:
    """A member that is no array: NumPy gives its bytes."""
    name = _name(rng)
    members[name + ".txt" if rng.random() < 0.3 else name] = rng.bytes(int(rng.integers(0, 300)))
    return f"{name} is noise"


def _short(members: dict[str, bytes], rng: np.random.Generator) -> str:
    name = _name(rng, others=False)
    members[name] = members[name][: int(rng.integers(0, len(members[name])))]
    return f"{name} is cut"


def _names(members: dict[str, bytes], rng: np.random.Generator) -> str:
    for name in ("../../x", "/etc/x", "a\nb", "é", "x" * 3000, "[red]")[: int(rng.integers(1, 7))]:
        members[name] = _member(np.zeros(3))
    return "odd names"


def _many(members: dict[str, bytes], rng: np.random.Generator) -> str:
    small = _member(np.zeros(3))
    members |= {f"key number {i}": small for i in range(1_000)}
    if rng.random() < 0.5:
        del members["rewards"]
    return "1,000 members"


MEMBERS: tuple[Odd, ...] = (
    _pickled,
    _odd_header,
    _odd_header,
    _odd_header,
    _dtype,
    _shape,
    _value,
    _missing,
    _bytes,
    _short,
    _names,
    _many,
)
"""What an archive may hold that it should not."""


def change(path: Path, rng: np.random.Generator) -> str:
    """One of `MEMBERS`, done to a file; or a bomb in it, or its archive written oddly."""
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    odd = rng.random()
    if odd < 0.04:
        return _bomb(path, members, rng)
    said = MEMBERS[int(rng.integers(len(MEMBERS)))](members, rng) if odd < 0.85 else "an odd archive"
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(path, "w", methods[int(rng.integers(len(methods)))]) as archive:
        for name, data in members.items():
            archive.writestr(name if name.endswith(".txt") else f"{name}.npy", data)
        if odd >= 0.95:
            said = "a member twice"
            archive.writestr("rewards.npy", members["rewards"])
        archive.comment = b"x" * 100 if odd >= 0.9 else b""
    if 0.85 <= odd < 0.95:
        data = bytearray(path.read_bytes())
        at = data.rfind(b"PK\x01\x02") + int(rng.choice([6, 8, 10, 16, 20, 24, 28, 30, 42]))
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        said = f"byte {at} of the last entry in the archive's directory changed"
    return said


_bombs: dict[str, bytes] = {}


def _bomb(path: Path, members: dict[str, bytes], rng: np.random.Generator) -> str:
    """A member of `BOMB` bytes of zeros; each is packed once for all cases."""
    name = ("rewards", "images", "infos/camera")[int(rng.integers(3))]
    if name not in _bombs:
        buffer = io.BytesIO()
        packing = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        with packing as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as to:
            to.write(_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (200, {BOMB // 200}), }}"))
            block = bytes(2**22)
            for _ in range(BOMB // 2**22 + 1):
                to.write(block)
        _bombs[name] = buffer.getvalue()
    path.write_bytes(_bombs[name])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for other, data in members.items():
            if other != name:
                archive.writestr(f"{other}.npy", data)
    return f"{name} is a bomb"
