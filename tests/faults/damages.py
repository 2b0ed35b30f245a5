"""Damages to bytes and to values, which all kinds of files share. Each gives what it did, in words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[Path, np.random.Generator], str]


def flip_bit(path: Path, rng: np.random.Generator) -> str:
    """One bit, anywhere."""
    return _flip(path, rng, 1, None)


def flip_header(path: Path, rng: np.random.Generator) -> str:
    """One bit among the first 2,048 bytes."""
    return _flip(path, rng, 1, 2048)


def flip_many(path: Path, rng: np.random.Generator) -> str:
    """Some bits, anywhere."""
    return _flip(path, rng, int(rng.integers(2, 40)), None)


def _flip(path: Path, rng: np.random.Generator, n: int, end: int | None) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing: it is empty"
    places = rng.integers(0, min(len(data), end or len(data)), n)
    for place in places:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return f"{n} bits flipped, the first at byte {places[0]}"


def cut(path: Path, rng: np.random.Generator) -> str:
    """The end is missing."""
    size = path.stat().st_size
    keep = int(rng.integers(0, max(size, 1)))
    with path.open("r+b") as file:
        file.truncate(keep)
    return f"cut to {keep} of {size} bytes"


def cut_little(path: Path, rng: np.random.Generator) -> str:
    """Some last bytes are missing."""
    size = path.stat().st_size
    keep = max(size - int(rng.integers(1, 64)), 0)
    with path.open("r+b") as file:
        file.truncate(keep)
    return f"cut to {keep} of {size} bytes"


def zero(path: Path, rng: np.random.Generator) -> str:
    """A block of zeros, as a file system leaves after a crash."""
    data = bytearray(path.read_bytes())
    start, length = int(rng.integers(0, max(len(data), 1))), int(rng.integers(1, 4096))
    data[start : start + length] = bytes(len(data[start : start + length]))
    path.write_bytes(data)
    return f"zeros from byte {start}, {length} of them"


def scramble(path: Path, rng: np.random.Generator) -> str:
    """A block of noise."""
    data = bytearray(path.read_bytes())
    start, length = int(rng.integers(0, max(len(data), 1))), int(rng.integers(1, 512))
    noise = rng.bytes(len(data[start : start + length]))
    data[start : start + length] = noise
    path.write_bytes(data)
    return f"noise from byte {start}, {len(noise)} bytes"


def insert(path: Path, rng: np.random.Generator) -> str:
    """Bytes that were not there: all behind them move."""
    data = path.read_bytes()
    at, extra = int(rng.integers(0, len(data) + 1)), rng.bytes(int(rng.integers(1, 64)))
    path.write_bytes(data[:at] + extra + data[at:])
    return f"{len(extra)} bytes inserted at {at}"


def remove_bytes(path: Path, rng: np.random.Generator) -> str:
    """Bytes are lost in the middle: all behind them move."""
    data = path.read_bytes()
    at, length = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 64))
    path.write_bytes(data[:at] + data[at + length :])
    return f"{length} bytes lost at {at}"


def append(path: Path, rng: np.random.Generator) -> str:
    """Noise behind the end."""
    with path.open("ab") as file:
        file.write(rng.bytes(100))
    return "100 bytes of noise appended"


def empty(path: Path, rng: np.random.Generator) -> str:
    """Nothing is left in it."""
    path.write_bytes(b"")
    return "emptied"


def noise(path: Path, rng: np.random.Generator) -> str:
    """Noise instead of it."""
    path.write_bytes(rng.bytes(int(rng.integers(1, 2000))))
    return "replaced by noise"


def delete(path: Path, rng: np.random.Generator) -> str:
    """It is gone."""
    path.unlink()
    return "deleted"


def make_folder(path: Path, rng: np.random.Generator) -> str:
    """A folder of its name."""
    path.unlink()
    path.mkdir()
    return "a folder of its name"


def dangle(path: Path, rng: np.random.Generator) -> str:
    """A symbolic link to nowhere, or to itself."""
    path.unlink()
    path.symlink_to(path.name if rng.random() < 0.5 else "nowhere")
    return "a link to nowhere or itself"


BYTES: tuple[Damage, ...] = (
    flip_bit,
    flip_bit,
    flip_header,
    flip_many,
    cut,
    cut_little,
    zero,
    scramble,
    insert,
    remove_bytes,
    append,
    empty,
    noise,
)
"""Of any file."""
GONE: tuple[Damage, ...] = (delete, make_folder, dangle)
"""Of a file in a folder."""


def swap(path: Path, other: Path) -> str:
    """The same file of another run."""
    shutil.copyfile(other, path)
    return "that of another run"


# --- Values: of JSON and YAML ----------------------------------------------------------------------------------------

_VALUES: tuple[tuple[str, Any], ...] = (
    ("null", None),
    ("true", True),
    ("-1", -1),
    ("0", 0),
    ("0.5", 0.5),
    ("10^18", 10**18),
    ("10^400", 10**400),
    ("NaN", float("nan")),
    ("infinity", float("inf")),
    ("an empty text", ""),
    ("text", "abc"),
    ("text with NUL", "a\0b"),
    ("a long text", "x" * 100_000),
    ("an empty list", []),
    ("a list", [1, "two", None]),
    ("a long list", list(range(20_000))),
    ("no entries", {}),
    ("entries", {"a": {"b": 1}}),
    ("many entries", {f"key {i}": i for i in range(3_000)}),
)
DEEP = 100_000
"""Levels of a value that is too deep."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values within a value of JSON, itself among them."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path]
    for key, part in inner:
        if isinstance(key, int) and key > 3:
            break
        found += places(part, (*path, key))
    return found


def change_value(value: Any, rng: np.random.Generator) -> tuple[Any, str]:
    """The value with one part of it replaced, dropped, renamed or wrapped, and what was done."""
    options = places(value)
    path = options[int(rng.integers(len(options)))]
    name = ".".join(map(str, path)) or "all of it"
    if not path:
        said, new = _VALUES[int(rng.integers(len(_VALUES)))]
        return new, f"{name}: {said}"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    action = rng.random()
    if action < 0.15 and isinstance(holder, dict):
        del holder[path[-1]]
        return value, f"{name} dropped"
    if action < 0.25 and isinstance(holder, dict):
        holder[str(path[-1]) + "x"] = holder.pop(path[-1])
        return value, f"{name} renamed"
    if action < 0.35:
        holder[path[-1]] = [holder[path[-1]]]
        return value, f"{name} in a list"
    if action < 0.45 and isinstance(holder[path[-1]], int | float) and not isinstance(holder[path[-1]], bool):
        holder[path[-1]] = holder[path[-1]] + 1
        return value, f"{name} one more"
    said, new = _VALUES[int(rng.integers(len(_VALUES)))]
    holder[path[-1]] = new
    return value, f"{name}: {said}"


def change_json(path: Path, rng: np.random.Generator) -> str:
    """Another value somewhere in it; or too deep, or in an encoding that JSON does not have."""
    text = path.read_text()
    odd = rng.random()
    if odd < 0.06:
        path.write_text("[" * DEEP + "]" * DEEP)
        return f"{DEEP} levels of lists"
    if odd < 0.09:
        path.write_text('{"a":' * DEEP + "1" + "}" * DEEP)
        return f"{DEEP} levels of entries"
    if odd < 0.12:
        path.write_bytes(text.encode("utf-16"))
        return "in UTF-16"
    if odd < 0.14:
        path.write_text(text.replace("1", "1" * 6000, 1))
        return "a number of 6,000 digits"
    value, said = change_value(json.loads(text), rng)
    path.write_text(json.dumps(value))
    return said


def change_yaml(path: Path, rng: np.random.Generator) -> str:
    """Another value somewhere in it; or what YAML alone has: anchors, tags, depth, duplicates."""
    import yaml

    text = path.read_text()
    if rng.random() < 0.5:
        said, odd = _ODD_YAML[int(rng.integers(len(_ODD_YAML)))]
        path.write_text(odd(text))
        return said
    value, said = change_value(yaml.safe_load(text), rng)
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return said


def _anchors(width: int, levels: int) -> str:
    lines = ["&a0 [" + ", ".join(["x"] * width) + "]"]
    lines += [f"&a{k} [{', '.join([f'*a{k - 1}'] * width)}]" for k in range(1, levels)]
    return f"agent: {{name: bc}}\ndataset: [{', '.join(lines)}]\n"


_ODD_YAML: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("anchors, 9^9 leaves", lambda text: _anchors(9, 10)),
    ("anchors as keys", lambda text: "x: &a [1]\n*a : 2\n" + text),
    ("anchors in steps", lambda text: "seeds: &a [0, 1]\nsteps: *a\n" + text),
    ("an anchor of itself", lambda text: "agent: &a [*a]\n" + text),
    ("a merge key", lambda text: "base: &b {steps: 4}\n<<: *b\n" + text),
    ("a tag of Python", lambda text: "out: !!python/object/apply:os.system ['touch hit']\n" + text),
    ("a tag of its own", lambda text: "out: !mine x\n" + text),
    ("binary", lambda text: "out: !!binary aGVsbG8=\n" + text),
    ("a set", lambda text: "seeds: !!set {0, 1}\n" + text),
    ("a date", lambda text: "steps: 2026-06-31\n" + text),
    ("a base-60 number", lambda text: "steps: 1:30:00\n" + text),
    ("deep lists", lambda text: "agent: " + "[" * 3000 + "]" * 3000 + "\n"),
    ("deep entries", lambda text: "agent: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n"),
    ("two documents", lambda text: text + "\n---\n" + text),
    ("a key twice", lambda text: text + "\nsteps: 3\nsteps: 5\n"),
    ("tabs", lambda text: text.replace("  ", "\t")),
    ("a control character", lambda text: text + "\x07"),
    ("a number as key", lambda text: text + "\n3: 4\n"),
    ("a list as key", lambda text: text + "\n? [1, 2]\n: 4\n"),
    ("null as key", lambda text: text + "\n~: 4\n"),
    ("much text", lambda text: "out: " + "x" * 3_000_000 + "\n" + text),
    ("many keys", lambda text: "\n".join(f"k{i}: {i}" for i in range(5_000))),
    ("a number of 5,000 digits", lambda text: "steps: 1" + "0" * 5000 + "\n"),
    ("an octal number", lambda text: text + "\nsteps: 0o17\n"),
    ("nothing but a comment", lambda text: "# " + text.replace("\n", "\n# ")),
    ("a list", lambda text: "- a\n- b\n"),
)
