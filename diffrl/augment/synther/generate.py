"""Rows from a trained model to disk, chunk by chunk: bounded memory, and the same rows however often it is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.augment import streams
from diffrl.augment.synther.config import ROWS_VERSION, Sampling
from diffrl.augment.synther.model import TransitionDiffusion
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.seeds import generator_at

CHUNK = {"cpu": 1024, "cuda": 2**16}
"""Rows sampled at once, from a generator of their own: what fits a core's cache is fastest on a CPU."""
ROWS, ABOUT = "generated.f32", "generated.json"


def chunk_size(device: torch.device) -> int:
    """Rows to sample at once on a device."""
    return CHUNK.get(device.type, CHUNK["cuda"])


def sample_rows(model: TransitionDiffusion, n: int, generator: torch.Generator, sampling: Sampling) -> Tensor:
    """`model.sample`: (S, n, D). Raises UserError where the model gives numbers that are not finite."""
    rows = model.sample(n, generator, sampling)
    if not bool(torch.isfinite(rows).all()):
        raise UserError(
            "SynthER's model gives numbers that are not finite: its training has diverged, or the sampler's settings "
            "are too coarse. Train longer or at a lower learning rate."
        )
    return rows


def generate(
    folder: Path,
    model: TransitionDiffusion,
    n: int,
    sampling: Sampling,
    seed: int,
    about: dict[str, Any],
    *,
    on_progress: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> NDArray[np.float32]:
    """n rows (n, D) of the model (of one seed), as a map of the file that holds them: `folder`/generated.f32.

    Rows that are there already, from the same model and settings, are kept: a chunk's rows depend on `seed` and its
    number alone. about: what besides the sampling they depend on. `stopped` is asked after each chunk; where it says
    so, fewer rows come back.

    Raises UserError where the rows that are there are of another `ROWS_VERSION`, and where the model gives numbers that
    are not finite.
    """
    chunk = chunk_size(model.device)
    columns = model.codec.size
    settings = {**about, "sampling": vars(sampling), "seed": seed, "chunk": chunk, "columns": columns}
    settings |= {"rows_version": ROWS_VERSION}
    settings = json.loads(json.dumps(settings))
    path, written = folder / ROWS, folder / ABOUT
    there = json.loads(written.read_text()) if path.exists() and written.exists() else {}
    version = there.get("rows_version", 1)
    if there and version != ROWS_VERSION:
        raise UserError(
            f"{path} holds rows that another version of diffrl began to generate (version {version} of rows, here "
            f"{ROWS_VERSION}): no more can be added to them. Remove it to generate all rows anew."
        )
    if there != settings:
        path.unlink(missing_ok=True)
        with atomic_path(written) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    row_bytes = 4 * columns
    with path.open("ab") as file:
        # A kill may have torn the last chunk.
        done = file.tell() // (row_bytes * chunk)
        file.truncate(done * row_bytes * chunk)
    total = -(-n // chunk)
    with path.open("ab") as file:
        for i in range(done, total):
            on_progress(min(i * chunk, n), n)
            if stopped():
                break
            rows = sample_rows(model, chunk, generator_at(seed, i, streams.CHUNK, device=model.device), sampling)
            file.write(rows[0].cpu().numpy().tobytes())
            file.flush()
            done = i + 1
    on_progress(min(done * chunk, n), n)
    rows_there = min(done * chunk, n)
    if not rows_there:
        return np.zeros((0, columns), np.float32)
    return np.memmap(path, np.float32, mode="r", shape=(rows_there, columns))


def clear(folder: Path) -> None:
    """Remove the rows: they are in the data set that was written from them."""
    for name in (ROWS, ABOUT):
        (folder / name).unlink(missing_ok=True)
