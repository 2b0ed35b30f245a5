"""SHA-256 digests of what a run wrote, part by part, with what is a time or a place left out."""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Digests = dict[str, dict[str, str]]
"""By file, by part of the file (a tensor, a column, a key): SHA-256 in hexadecimal."""

TIMES = ("seconds", "steps_per_second", "images_per_second", "time")
"""Columns and keys that hold wall time."""
RUN_JSON = ("task", "observation_size", "action_size", "value_limit", "fingerprint")
"""What is compared of run.json; the rest is versions and what kind of run it is."""
LEFT_OUT = {
    "*.yaml": "a configuration is written in the words of the version that wrote it; tests/test_old_runs.py reads it",
    "versions.json": "packages and commit, as run.json's versions are",
    "tensorboard": "events carry wall times; metrics.csv holds the same numbers",
    "*.html, *.png but images/": "pages and plots: drawn from the numbers that are compared",
}
"""What is not compared, and why."""


def of_folder(folder: Path) -> Digests:
    """The digests of all files below a run's folder that are compared, by their path in it."""
    found: Digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        parts = of_file(path) if path.is_file() and "tensorboard" not in path.parts else None
        if parts is not None:
            found[name] = parts
    return found


def of_file(path: Path) -> dict[str, str] | None:
    """The digests of a file's parts, or None where it is not compared."""
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix in (".hdf5", ".h5"):
        return _arrays(path)
    if path.suffix == ".csv":
        return _columns(path)
    if path.suffix == ".json" and path.name != "versions.json":
        values = json.loads(path.read_text())
        if path.name == "run.json":
            if values.get("kind") == "images":  # holds its kind and versions alone
                return None
            values = {key: values.get(key) for key in RUN_JSON}
        return _keys(values)
    if path.suffix == ".png" and path.parent.name == "images":
        return _pixels(path)
    return None


def of_array(values: Any) -> str:
    """The digest of an array: type, shape, bytes."""
    values = np.ascontiguousarray(values)
    head = f"{values.dtype.str} {values.shape} ".encode()
    return hashlib.sha256(head + values.tobytes()).hexdigest()


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        found = {name: of_array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        about = {key: _timeless(_as_json(value)) for key, value in (file.metadata() or {}).items()}
        found |= {f"@{key}": _of_text(json.dumps(value, sort_keys=True)) for key, value in about.items()}
    return found


def _as_json(text: str) -> Any:
    """What a text holds as JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _arrays(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            value = item[()]
            text = value.decode() if isinstance(value, bytes) else None
            found[name] = of_array(value) if text is None else _of_text(text)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        found |= {f"@{name}": _of_text(str(value)) for name, value in file.attrs.items()}
    return found


def _columns(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    return {name: _of_text("\n".join(row[i] for row in rows)) for i, name in enumerate(header) if name not in TIMES} | {
        "__columns__": _of_text(",".join(header))
    }


def _keys(values: Any) -> dict[str, str]:
    values = _timeless(values)
    parts = values.items() if isinstance(values, Mapping) else [("__all__", values)]
    return {str(key): _of_text(json.dumps(value, sort_keys=True)) for key, value in parts}


def _timeless(values: Any) -> Any:
    """A value of JSON without wall times, versions, and the place of a pipeline's parts on disk.

    peft writes an adapter's `target_modules` in the order of a set, another one in each process: it is sorted.
    """
    if isinstance(values, Mapping):
        left_out = (*TIMES, "versions", "_name_or_path")
        kept = {key: _timeless(value) for key, value in values.items() if key not in left_out}
        sets = [key for key, value in kept.items() if key.endswith("target_modules") and isinstance(value, list)]
        return kept | {key: sorted(kept[key]) for key in sets}
    return [_timeless(value) for value in values] if isinstance(values, list) else values


def _pixels(path: Path) -> dict[str, str]:
    from PIL import Image

    with Image.open(path) as image:
        return {"pixels": of_array(np.asarray(image))}


def grouped(parts: Mapping[str, str]) -> dict[str, str]:
    """One digest (16 digits) for all tensors whose names share what stands before their second point.

    A checkpoint has hundreds of tensors; to keep the committed file small, these are what it holds.
    """
    groups: dict[str, list[str]] = {}
    for name, digest in sorted(parts.items()):
        groups.setdefault(".".join(name.split(".")[:2]), []).append(f"{name} {digest}")
    return {group: _of_text("\n".join(lines))[:16] for group, lines in groups.items()}
