"""What every augmenter can be asked for. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffrl.data.config import HDF5_SUFFIXES, ActionUnits, TimeLimitTerminals
from diffrl.support.errors import UserError, shown
from diffrl.support.files import typed
from diffrl.support.folder import read_json
from diffrl.support.schema import check, refusal

Mix = Literal["replace", "append"]


@dataclass(frozen=True)
class Request:
    """A data set to enlarge, and where the larger one goes: the options that all verbs of `diffrl augment` share."""

    dataset: str
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    out: str
    """A path ending in .hdf5, or minari:ID, where every transition becomes an episode (15 KB and 2 ms each)."""
    samples: int | None = None
    """Synthetic rows to write; by default SynthER writes a million (the paper: 5 million, of a million real ones), and
    with --rows, 5 for each row that is read, a million at most."""
    ratio: float | None = None
    """Synthetic rows to write for each real row that is read; by default --samples says how many there are."""
    mix: Mix = "replace"
    """replace: the file holds synthetic rows alone, as in the paper; append: the real rows, then the synthetic."""
    seed: int = 0
    """Seed of the model, its training and the samples."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    env: str | None = None
    """Gymnasium id of the environment the data are from: bounds, the simulator in the report; recorded in the file. By
    default the benchmark's, or what the file names; none: without one."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of that environment, by default its own: KEY=VALUE each, such as g=2.0 (values as JSON, else text). In
    Python a dictionary will do."""
    max_episode_steps: int | None = None
    """Another time limit of its episodes than its own, which is the default; recorded in the file."""
    rows: int | None = None
    """Read only so many rows, the first of the data set; by default all."""
    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the environment's limit of steps, or marked as timeouts too, are timeouts;
    terminals: they are true ends. By default they are taken as true ends, and what looks odd is said."""
    actions: ActionUnits | None = None
    """normalised: the data's actions are scaled to [-1, 1], where its environment has other bounds; environment: they
    are in its units. By default they are taken to be in its units, and what looks odd is said."""
    cut_contradictions: bool = False
    """Cut an episode where a stored next observation contradicts the next row."""
    held_out: float = 0.05
    """Share of the real rows that the model does not see: the report compares with them."""
    folder: Path | None = None
    """Folder of the model and the report; by default beside the data set, OUT-VERB, such as more-synther of more.hdf5;
    with --out minari:ID, runs/ID-VERB here."""
    report: bool = True
    """Write the fidelity report."""
    force: bool = False
    """Replace the data set if it exists."""

    def __post_init__(self) -> None:
        if isinstance(self.env_kwargs, Mapping):
            object.__setattr__(self, "env_kwargs", _words(self.env_kwargs))
        check(self)
        if self.samples is not None and self.ratio is not None:
            raise UserError("--samples and --ratio both say how many rows to generate: give one of them.")

    def refuse(self, verb: str, model: Mapping[str, Any]) -> None:
        """Raise UserError where there is a file already that is not to be replaced; Minari's store is not looked at.

        verb, model: the method's verb, and the settings of its model as its folder holds them: where the file's was
        trained with others, the error names them.
        """
        path = Path(self.out).expanduser()
        if path.suffix not in HDF5_SUFFIXES or not path.is_file() or self.force:
            return
        folder = beside_file(path, verb) if self.folder is None else Path(self.folder)
        asked = {"dataset": self.dataset, "rows": self.rows, "held_out": self.held_out, "seed": self.seed, **model}
        if others := _others(folder, asked):
            raise UserError(
                f"{self.out} exists; what wrote it is finished, by a model of other settings ({'; '.join(others)}): "
                f"choose another --out for these, or remove {typed(folder)} and use --force to replace it."
            )
        raise finished(self.out)


def beside_file(path: Path, what: str) -> Path:
    """The folder beside a data set's file that holds what belongs to it: NAME-what."""
    return path.with_name(f"{path.stem}-{what}")


def _others(folder: Path, asked: Mapping[str, Any]) -> list[str]:
    """Which settings a model's folder holds with other values than `asked`, two at most, in words."""
    try:
        found = read_json(folder / "config.json")
        there = {**found, **found["model"]}
    except (UserError, OSError, KeyError, TypeError):
        return []
    wanted = json.loads(json.dumps(dict(asked), default=str))
    return [
        f"{name.replace('_', '-')} {shown(there[name])}, not {shown(value)}"
        for name, value in wanted.items()
        if name in there and there[name] != value and None not in (there[name], value)  # None: whatever it comes to
    ][:2]


def _words(kwargs: Mapping[str, object]) -> tuple[str, ...]:
    """Arguments by name as the words KEY=VALUE that the command line has; scalars of NumPy are taken as numbers.

    Raises UserError for a value without JSON.
    """

    def number(value: Any) -> Any:
        found = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(found, bool | int | float | str):
            raise TypeError(f"{type(value).__name__} is no such value")
        return found

    try:
        return tuple(f"{key}={json.dumps(value, default=number)}" for key, value in kwargs.items())
    except (TypeError, ValueError) as error:
        raise refusal("--env-kwargs", dict(kwargs), f"values that JSON holds ({error})") from error


def finished(out: str) -> UserError:
    """What is said where the data set that is to be written is there."""
    return UserError(f"{out} exists; what wrote it is finished. Use --force to replace it, or choose another --out.")
