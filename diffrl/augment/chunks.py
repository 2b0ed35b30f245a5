"""Generated rows to disk, chunk by chunk: bounded memory, and the same rows however often it is cut."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffrl.augment import streams
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, plain_file, read_bytes, read_json
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import Stopped, at_once

ROWS, ABOUT, SUMS = "generated.f32", "generated.json", "generated.sha256"
"""The rows; all that they depend on; the digest of each chunk of them, a line a chunk."""


def generate(
    folder: Path,
    n: int,
    sample: Callable[[torch.Generator], NDArray[np.float32]],
    about: dict[str, Any],
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> NDArray[np.float32]:
    """n rows (n, columns) as a map of the file that holds them: `folder`/generated.f32.

    sample: one chunk of rows (chunk, columns) from a generator, which depends on the seed and the chunk's number alone.
    about: all that the rows depend on, as JSON holds it; `seed`, `chunk`, `columns` and `rows_version` are among it,
    and `source` where rows are to have other noise than those of another source: a number that tells it.
    Rows that are there already of the same are kept, as far as they are what was written; of other settings they are
    replaced. `stopped` is asked before each chunk, and a signal ends the chunk that is being sampled: fewer rows come
    back then.

    Raises UserError where the rows that are there are of another version, and what `sample` raises.
    """
    chunk, columns = int(about["chunk"]), int(about["columns"])
    seeds = (about["seed"], about["source"]) if "source" in about else (about["seed"],)
    path, written, sums = folder / ROWS, folder / ABOUT, folder / SUMS
    there = _about(written) if path.exists() else {}
    version = there.get("rows_version", 1)
    if there and version != about["rows_version"]:
        raise UserError(
            f"{path} holds rows that another version of diffrl began to generate (version {version} of rows, here "
            f"{about['rows_version']}): no more can be added to them. Remove it to generate all rows anew."
        )
    if there != json.loads(json.dumps(about)):
        path.unlink(missing_ok=True)
        sums.write_text("")
        with atomic_path(written) as temporary:
            temporary.write_text(json.dumps(about, indent=1))
    chunk_bytes = 4 * columns * chunk
    total = -(-n // chunk)
    digests = _whole(path, sums, chunk_bytes)
    done = len(digests)
    with atomic_path(sums) as temporary:  # where the disk is full, those that are there stay
        temporary.write_text("".join(f"{digest}\n" for digest in digests))
    with path.open("ab") as file, sums.open("a") as lines:
        file.truncate(done * chunk_bytes)
        for i in range(done, total):
            on_progress(min(i * chunk, n), n)
            if stopped():
                break
            try:
                with at_once():
                    data = sample(generator_at(*seeds, i, streams.CHUNK, device=device)).tobytes()
            except Stopped:
                break
            file.write(data)
            file.flush()
            lines.write(f"{hashlib.sha256(data).hexdigest()}\n")
            lines.flush()
            done = i + 1
    rows_there = min(done * chunk, n)
    on_progress(rows_there, n)
    if not rows_there:
        return np.zeros((0, columns), np.float32)
    return np.memmap(path, np.float32, mode="r", shape=(rows_there, columns))


def _about(path: Path) -> dict[str, Any]:
    """What the rows that are there depend on; nothing where that is unknown."""
    try:
        values = read_json(path)
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def _whole(path: Path, sums: Path, chunk_bytes: int) -> list[str]:
    """The digests of the first chunks that are there, up to one that a kill has torn or that is damaged."""
    known = None  # older versions wrote none
    if sums.exists():
        known = read_bytes(sums, None).decode(errors="replace").split()
    digests: list[str] = []
    if path.exists():
        with plain_file(path).open("rb") as file:
            while len(data := file.read(chunk_bytes)) == chunk_bytes:
                digests.append(hashlib.sha256(data).hexdigest())
                if known is not None and known[len(digests) - 1 : len(digests)] != digests[-1:]:
                    return digests[:-1]
    return digests


def clear(folder: Path) -> None:
    """Remove the rows: they are in the data set that was written from them."""
    for name in (ROWS, ABOUT, SUMS):
        (folder / name).unlink(missing_ok=True)
