"""Generated rows to disk, chunk by chunk: bounded memory, and the same rows however often it is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffrl.augment import streams
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, read_json
from diffrl.support.seeds import generator_at

ROWS, ABOUT = "generated.f32", "generated.json"


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
    about: all that the rows depend on, as JSON holds it; `seed`, `chunk`, `columns` and `rows_version` are among it.
    Rows that are there already of the same are kept, of other settings replaced. `stopped` is asked after each chunk;
    where it says so, fewer rows come back.

    Raises UserError where the rows that are there are of another version, and what `sample` raises.
    """
    chunk, columns = int(about["chunk"]), int(about["columns"])
    path, written = folder / ROWS, folder / ABOUT
    there = (
        read_json(written, advice="Remove it to generate all rows anew.") if path.exists() and written.exists() else {}
    )
    there = there if isinstance(there, dict) else {}
    version = there.get("rows_version", 1)
    if there and version != about["rows_version"]:
        raise UserError(
            f"{path} holds rows that another version of diffrl began to generate (version {version} of rows, here "
            f"{about['rows_version']}): no more can be added to them. Remove it to generate all rows anew."
        )
    if there != json.loads(json.dumps(about)):
        path.unlink(missing_ok=True)
        with atomic_path(written) as temporary:
            temporary.write_text(json.dumps(about, indent=1))
    chunk_bytes = 4 * columns * chunk
    total = -(-n // chunk)
    with path.open("ab") as file:
        # A kill may have torn the last chunk.
        done = file.tell() // chunk_bytes
        file.truncate(done * chunk_bytes)
    with path.open("ab") as file:
        for i in range(done, total):
            on_progress(min(i * chunk, n), n)
            if stopped():
                break
            file.write(sample(generator_at(about["seed"], i, streams.CHUNK, device=device)).tobytes())
            file.flush()
            done = i + 1
    rows_there = min(done * chunk, n)
    on_progress(rows_there, n)
    if not rows_there:
        return np.zeros((0, columns), np.float32)
    return np.memmap(path, np.float32, mode="r", shape=(rows_there, columns))


def clear(folder: Path) -> None:
    """Remove the rows: they are in the data set that was written from them."""
    for name in (ROWS, ABOUT):
        (folder / name).unlink(missing_ok=True)
