"""Where an enlarged data set goes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.augment.config import beside_file, finished
from diffrl.data import d4rl, minari
from diffrl.data.config import HDF5_SUFFIXES
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import UserError
from diffrl.support.files import spare_source
from envs.datasets import locate


def for_id(minari_id: str, what: str) -> Path:
    """The folder of what belongs to a data set with an id, in the current one: runs/ID-what, with - for each /."""
    return Path("runs") / f"{minari_id.replace('/', '-')}-{what}"


class Target:
    """Where a data set is written: an HDF5 file, or Minari's store.

    out: a path ending in .hdf5 or .h5, or minari:ID. verb: names the model's folder, by default beside the data set.
    Raises UserError for another `out`, and where something is there, unless it is to be replaced (force).
    """

    def __init__(self, out: str, force: bool, verb: str) -> None:
        self.out, self.force = out, force
        self.path = Path(out).expanduser()
        self.to_file = self.path.suffix in HDF5_SUFFIXES
        if self.to_file:
            self.exists = self.path.exists()
            self.folder = beside_file(self.path, verb)
        elif out.startswith("minari:"):
            self.id = out.removeprefix("minari:")
            if not minari.is_id(self.id):
                raise UserError(f"{out!r} is no Minari id; expected e.g. minari:hopper/synthetic-v0.")
            self.exists = (minari.store() / self.id).exists()
            self.folder = for_id(self.id, verb)
        else:
            raise UserError(f"Cannot write {out!r}: expected a path ending in .hdf5 or .h5, or minari:ID.")
        if self.to_file and self.path.is_dir():
            raise UserError(f"{out} is a folder; expected the path of a file: choose another --out.")
        if self.exists and not force:
            raise finished(out)

    def spare(self, source: str) -> None:
        """Raise UserError where writing would destroy the data set `source`."""
        place = self.path if self.to_file else minari.store() / self.id
        spare_source(locate(source).path, place, f"--out {self.out}", "choose another --out.")

    def write(
        self, blocks: Iterator[dict[str, NDArray[Any]]], metadata: dict[str, Any], source: OfflineDataset
    ) -> Path:
        """Write blocks of columns that were made from `source`; give the path of the data set.

        A file is written block by block. Minari's writer takes whole data sets: there all rows are in memory.
        """
        if self.to_file:
            return d4rl.write_blocks(self.path, blocks, metadata)
        parts = list(blocks)
        arrays: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        benchmark = locate(str(source.metadata["dataset"])).benchmark
        return minari.write(
            self.id,
            OfflineDataset(**arrays, metadata=metadata),
            reference_scores=None if benchmark is None else benchmark.reference_scores,
            force=self.force,
        )

    def name(self, written: Path) -> str:
        """What commands call the data set that was written to a path."""
        return str(written) if self.to_file else self.id
