"""What every augmenter can be asked for. No torch."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffrl.data.config import HDF5_SUFFIXES, ActionUnits, TimeLimitTerminals
from diffrl.support.errors import UserError, nearest, shown
from diffrl.support.files import path_of, same_place, typed
from diffrl.support.folder import read_json
from diffrl.support.schema import check, kwargs_words

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
        object.__setattr__(self, "env_kwargs", kwargs_words(self.env_kwargs))  # from Python
        check(self)
        if self.samples is not None and self.ratio is not None:
            raise UserError("--samples and --ratio both say how many rows to generate: give one of them.")
        refuse_address(self.out, "--out")
        refuse_address(self.folder, "--folder")

    def refuse(self, verb: str, model: Mapping[str, Any]) -> None:
        """Raise UserError where there is a file already that is not to be replaced; Minari's store is not looked at.

        verb, model: the method's verb, and the settings of its model as its folder holds them: where the file's was
        trained with others, the error names them.
        """
        path = Path(self.out).expanduser()
        if path.suffix not in HDF5_SUFFIXES or not path.is_file() or self.force:
            return
        folder = self.model_folder(verb)
        there = _begun(folder)
        asked = {"rows": self.rows, "held_out": self.held_out, "seed": self.seed, **model}
        if others := _others(there, asked):
            raise UserError(
                f"{self.out} exists; what wrote it is finished, by a model of other settings ({'; '.join(others)}): "
                f"choose another --out for these, or remove {typed(folder)} and use --force to replace it."
            )
        name = there.get("dataset", self.dataset)
        if name != self.dataset and not same_place(path_of(str(name)), path_of(self.dataset)):
            raise UserError(
                f"{self.out} exists; what wrote it is finished, by a model of the data set {shown(name)}, not "
                f"{shown(self.dataset)}. If both hold the same rows, --force replaces it; otherwise choose another "
                f"--out, or remove {typed(folder)} and use --force."
            )
        raise finished(self.out)

    def model_folder(self, verb: str) -> Path:
        """The folder of a method's model and report: the one asked for, or that of the data set that is written."""
        if self.folder is not None:
            return Path(self.folder)
        if str(self.out).startswith(MINARI):
            return for_id(self.out.removeprefix(MINARI), verb)
        return beside_file(Path(self.out).expanduser(), verb)


def requested(function: Callable[..., Path], dataset: str, out: str | Path, options: Mapping[str, Any]) -> Request:
    """What an augmenter's function of Python is asked for, by its `options`; see `Request`.

    Raises UserError for an option that neither has, naming the function and the nearest one, and as `Request` does.
    """
    fields = Request.__dataclass_fields__
    for name in options:
        if name not in fields:
            known = {*inspect.signature(function).parameters, *fields} - {"options"}
            raise UserError(f"{function.__name__} has no argument {shown(name)}; {nearest(name[:60], known)}")
    return Request(dataset, str(out), **options)


MINARI = "minari:"
"""What an --out begins with that is an id of Minari's."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
"""An address, SCHEME://REST; as a path of pathlib's it has lost a slash."""


def refuse_address(place: Path | str | None, option: str) -> None:
    """Raise UserError where an option names an address, such as s3://bucket/NAME, for something that is written.

    Of file:///PATH the error names PATH, which is to be given. None is no place; what exists here is a path.
    """
    found = _ADDRESS.fullmatch(str(place))
    if place is None or found is None or str(place).startswith(MINARI) or _exists(place):
        return
    scheme, slashes, rest = found.groups()
    here = scheme.lower() in ("file", "local") and not (isinstance(place, str) and slashes == "//")
    advice = f"give the path, /{rest}." if here else "give a path of this machine, and copy what is there at the end."
    raise UserError(f"{option} is the address {scheme}://{'/' * here}{rest}; nothing is written to addresses: {advice}")


def _exists(place: Path | str) -> bool:
    try:
        return Path(place).exists()
    except OSError:  # a name that is too long for a path
        return False


def for_id(minari_id: str, what: str) -> Path:
    """The folder of what belongs to a data set with an id, in the current one: runs/ID-what, with - for each /."""
    return Path("runs") / f"{minari_id.replace('/', '-')}-{what}"


def beside_file(path: Path, what: str) -> Path:
    """The folder beside a data set's file that holds what belongs to it: NAME-what."""
    return path.with_name(f"{path.stem}-{what}")


def _begun(folder: Path) -> dict[str, Any]:
    """The settings of the model in a folder, by name; none where there is no such folder."""
    try:
        found = read_json(folder / "config.json")
        return {**found, **found["model"]}
    except (UserError, OSError, KeyError, TypeError):
        return {}


def _others(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Which settings of a model are there with other values than `asked`, two at most, in words."""
    wanted = json.loads(json.dumps(dict(asked), default=str))
    return [
        f"{name.replace('_', '-')} {shown(there[name])}, not {shown(value)}"
        for name, value in wanted.items()
        if name in there and there[name] != value and None not in (there[name], value)  # None: whatever it comes to
    ][:2]


def finished(out: str) -> UserError:
    """What is said where the data set that is to be written is there."""
    return UserError(f"{out} exists; what wrote it is finished. Use --force to replace it, or choose another --out.")
