"""What `--rows` asks of a data set: its first rows; or all of them, where it has no more."""

from diffrl.data import d4rl
from diffrl.data.minari_episodes import read_metadata
from diffrl.data.offline import OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import counted
from envs.datasets import Origin, called, locate


def first_rows(name: str, dataset: OfflineDataset, rows: int | None, quiet: bool = False) -> int | None:
    """The number of first rows that a data set was loaded with; None where these are all that it has, which is said.

    dataset: as `load_dataset(name, rows)` gave it. Data that are not here, and are generated with so many rows, are a
    part whatever their number.
    """
    if rows is None:
        return None
    origin = locate(name)
    if not origin.exists or len(dataset) > rows or (len(dataset) == rows and size_of(origin) != rows):
        return rows
    if not quiet:
        asked = "which --rows asks for" if len(dataset) == rows else f"fewer than --rows {rows:,}"
        console.print(f"{called(name)} has {counted(len(dataset), 'rows')}, {asked}: all are taken.", markup=False)
    return None


def size_of(origin: Origin) -> int | None:
    """The rows of a whole data set by what its files say of themselves; None where they do not say it."""
    if origin.path is None or origin.kind == "ogbench":  # whose files count the last observation of an episode, too
        return None
    if origin.kind == "minari":
        return int(read_metadata(origin.path)["total_steps"])
    return d4rl.count_rows(origin.path)
