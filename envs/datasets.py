"""Data sets by name: an id of D4RL's, OGBench's or another package's, a Minari id, or a path.

Finds, makes, downloads, loads them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffrl.data import d4rl
from diffrl.data import minari as minari_format
from diffrl.data.columns import FETCH_AGAIN, open_table
from diffrl.data.env_spec import EnvSpec
from diffrl.data.offline import ACTION_LIMIT, OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import address_of, alone, data_directory, path_of
from diffrl.support.folder import say_once
from diffrl.support.remote import local_file
from envs import registry
from envs.fetching import DownloadError, fetch
from envs.ogbench import names as ogbench

FILE_SUFFIXES = (".hdf5", ".h5", ".npz")
_OF_PACKAGE = "{0} is a data set of another package, which makes or fetches it itself: use it as --dataset {0}."


@dataclass(frozen=True)
class Origin:
    """Where a named data set is, or would be."""

    name: str
    """A D4RL id, one of OGBench's or another package's, a Minari id without `minari:`, or a path."""
    kind: Literal["d4rl", "ogbench", "package", "minari", "file"]
    """d4rl, ogbench: a benchmark of theirs; package: one of another package; minari: in Minari's store, or a folder in
    its format; file: HDF5 or npz."""
    path: Path | None
    """The file, or Minari's folder; None for kind package, which knows itself where its data are."""
    benchmark: registry.Benchmark | None = None
    """The registry's entry, for kinds d4rl, ogbench and package."""

    @property
    def exists(self) -> bool:
        """Whether the data set is on this machine; one of another package is taken to be."""
        return self.path is None or self.path.exists()


def cached_path(benchmark_id: str, rows: int | None = None, seed: int = 0) -> Path:
    """Where a D4RL data set is kept: `<data directory>/d4rl/ID.hdf5`.

    A data set generated with fewer rows or another seed is not D4RL's: its file's name says so, and the id alone never
    means that file.
    """
    name = benchmark_id + ("" if rows is None else f".{rows}-rows") + ("" if seed == 0 else f".seed-{seed}")
    return data_directory() / "d4rl" / f"{name}.hdf5"


def part_path(benchmark_id: str, rows: int) -> Path:
    """Where the first rows of a benchmark's data are, or would be, where the whole is not here."""
    if registry.is_ogbench(benchmark_id):
        from envs.ogbench import reading

        return reading.find(ogbench.get(benchmark_id), rows)
    return cached_path(benchmark_id, rows)


@dataclass(frozen=True)
class Generated:
    """A generated file that is not the whole of a benchmark's data set: it has fewer rows, or another seed."""

    path: Path
    rows: int | None
    """The number of rows that --rows asks for it by; None: all that the data set has."""
    seed: int


def generated(benchmark_id: str) -> list[Generated]:
    """The files of a benchmark's data in the data directory that its id alone does not mean, see `cached_path`."""
    name = ogbench.get(benchmark_id) if registry.is_ogbench(benchmark_id) else None
    if name is not None and name.validation:  # made with the training set
        return []
    folder, unit, each = cached_path("").parent, "rows", 1
    if name is not None:
        from envs.ogbench import generation

        folder, unit, each = generation.cached_path(name).parent, "episodes", name.rows - 1
    stem = benchmark_id if name is None else name.dataset
    pattern = re.compile(rf"{re.escape(stem)}(?:\.(\d+)-{unit})?(?:\.seed-(\d+))?\.hdf5")
    matches = [(path, pattern.fullmatch(path.name)) for path in folder.glob("*.hdf5")]
    found = [
        Generated(path, int(match[1]) * each if match[1] else None, int(match[2] or 0))
        for path, match in matches
        if match and match.lastindex and (name is None or int(match[1] or 0) < name.episodes)
    ]
    return sorted(found, key=lambda one: (one.seed, one.rows or 0))


def locate(name: str) -> Origin:
    """Find out what `name` means, reading nothing: a path, else D4RL's id, OGBench's, another package's or Minari's.

    A file at an address such as s3://bucket/rollouts.hdf5 is fetched, unless a copy of it is kept here.

    A D4RL file is looked for in our data directory, by its id and by D4RL's own name for it, then in D4RL's own folder
    (`$D4RL_DATASET_DIR` or ~/.d4rl/datasets).
    `minari:ID` always means Minari. Raises UserError, naming the nearest known id, where `name` is none of these, and
    where the package whose id it would be is broken.
    """
    if name.startswith("minari:"):
        return _minari_origin(name.removeprefix("minari:"))
    if address_of(name) is not None:
        return Origin(name, "file", local_file(name, DataError))
    path = path_of(name).expanduser()
    if path.is_dir() and minari_format.is_folder(path):
        return Origin(name, "minari", path)
    if path.suffix in FILE_SUFFIXES:
        return Origin(name, "file", path)
    if (benchmark := registry.find(name)) is not None:
        if registry.is_ogbench(name):
            from envs.ogbench import reading

            return Origin(name, "ogbench", reading.find(ogbench.get(name)), benchmark)
        if not registry.is_d4rl(name):
            return Origin(name, "package", None, benchmark)
        ours, theirs = cached_path(name), Path(benchmark.url).name
        places = (ours, ours.with_name(theirs), _d4rl_folder() / theirs)
        return Origin(name, "d4rl", next((place for place in places if place.is_file()), ours), benchmark)
    if path.is_file():
        return Origin(name, "file", path)
    if path.is_dir():
        raise DataError(f"{name} is a folder, but not a Minari data set (data/metadata.json is missing).")
    if "/" in name and minari_format.is_id(name):
        return _minari_origin(name)
    here = difflib.get_close_matches(name[:60], minari_format.local_ids(), n=1, cutoff=0.85)
    hint = f"did you mean {f'minari:{here[0]}'!r}, which is here?" if here else registry.hint(name)
    raise UserError(
        f"Unknown data set {name!r}: {hint} Expected an id of D4RL's, OGBench's or another package's (`diffrl data "
        "list`), a Minari id such as mujoco/hopper/medium-v0 or minari:ID, or the path or address (https://, hf://) "
        f"of a file ending in {', '.join(FILE_SUFFIXES)}."
    )


def _d4rl_folder() -> Path:
    """The folder that d4rl keeps its files in."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def named_like_d4rl(name: str) -> str:
    """Where a path ends in D4RL's name of one of its files, or in an id: a sentence on how it is scored; else ""."""
    path = path_of(name).expanduser()
    benchmark = registry.of_file(path.name)
    if benchmark is None or address_of(name) is not None or not path.is_file():
        return ""
    found, env = locate(benchmark.id).path, benchmark.env_id
    there = found is not None and found.is_file() and found.samefile(path)
    put = "" if there else f"Put it in {cached_path('').parent}, and "
    scored = f" and scores it; or name its environment: --env {env}" if env else " it; it has no environment here"
    return f"{path.name} is the name of D4RL's {benchmark.id}. {put}--dataset {benchmark.id} reads{scored}."


def _minari_origin(dataset_id: str) -> Origin:
    if not minari_format.is_id(dataset_id):
        raise UserError(
            f"{dataset_id!r} is no Minari id; expected e.g. mujoco/hopper/medium-v0 (it ends in -v and a number)."
        )
    return Origin(dataset_id, "minari", minari_format.store() / dataset_id)


def whereabouts(dataset: str) -> str:
    """A data set's name as a run stores it: a path is absolute, so that the run goes on from any folder.

    An address stays one.
    """
    if (address := address_of(dataset)) is not None:
        return address
    origin = locate(dataset)
    is_path = origin.path is not None and (origin.kind == "file" or Path(origin.name) == origin.path)
    return str(path_of(dataset).expanduser().absolute()) if is_path else dataset


def called(dataset: str) -> str:
    """A data set's name as results show it: of an address, or a path that begins at a root, what it ends in."""
    path = path_of(dataset).expanduser()
    return path.name if path.is_absolute() or address_of(dataset) is not None else dataset


def made_from(dataset: OfflineDataset, name: str) -> dict[str, str]:
    """What data that are made from a data set say of it: its name, as "source"; and its own "origin" or source.

    So data of data of a benchmark know that benchmark, whose references make scores of returns.
    """
    origin = dataset.metadata.get("origin", dataset.metadata.get("source"))
    return {"source": called(name)} | ({} if origin is None else {"origin": str(origin)})


def load_known(name: str, digest: str, rows: int | None = None, progress: bool = True) -> OfflineDataset:
    """`load_dataset` without a limit of actions, for a run on data whose `fingerprint` was `digest`.

    Where an id is read otherwise than when the run began, and the data of then are theirs, these. Else the data as they
    are now, whatever their fingerprint.
    """
    dataset = load_dataset(name, rows, progress, action_limit=None)
    if (before := ogbench.as_before(name)) is not None and d4rl.fingerprint(dataset) != digest:
        of_then = load_dataset(before, rows, progress, action_limit=None)
        if d4rl.fingerprint(of_then) == digest:
            say_once(f"{name} is read as {before}, as this run has known it: see `diffrl data info {before}`.")
            return of_then
    return dataset


def load_dataset(
    name: str | Path,
    rows: int | None = None,
    progress: bool = True,
    *,
    action_limit: float | None = ACTION_LIMIT,
    check: bool = True,
    infos: bool = False,
) -> OfflineDataset:
    """Load a data set by D4RL id, another package's id, Minari id or path; `rows` keeps its first rows.

    infos: of an HDF5 file or npz, load `infos/*` too, which no training needs and which may be larger than all else.

    A maze2d data set that is not on this machine is generated first (with `rows`, only as many). Nothing is
    downloaded: where the file is missing the DataError says how to get it. `check` and `action_limit` are those of
    `diffrl.data.d4rl.read`. The metadata get `dataset`, the name, and a benchmark's environment, where it has one.
    """
    origin = locate(str(name))
    benchmark = origin.benchmark
    if origin.path is None:
        dataset = registry.load_of_package(origin.name)
        dataset = dataset.validate(origin.name, action_limit) if check else dataset
        dataset = dataset if rows is None else dataset.head(rows)
    elif origin.kind == "minari":
        is_path = origin.name == str(origin.path)
        source = origin.path if is_path else origin.name
        dataset = minari_format.read(source, action_limit=action_limit, check=check, rows=rows)
    elif origin.kind == "ogbench":
        dataset = _load_ogbench(origin, rows, progress, infos)
        dataset = dataset.validate(origin.name, action_limit) if check else dataset
    else:
        path = origin.path
        if benchmark is not None and not origin.exists:
            path = _generate_missing(benchmark, rows, progress)
        steps = None if benchmark is None else benchmark.max_episode_steps
        with _by_address(name, path):
            try:
                dataset = d4rl.read(
                    path, max_episode_steps=steps, action_limit=action_limit, rows=rows, check=check, infos=infos
                )
            except DataError:
                if origin.kind == "file":
                    from envs.ogbench import reading

                    reading.refuse_bare(path)  # of which there is more to say
                raise
    dataset.metadata["dataset"] = origin.name
    if benchmark is not None and benchmark.env_id is not None:
        dataset.metadata.pop("env_spec", None)
        dataset.metadata.update(EnvSpec(benchmark.env_id, benchmark.env_kwargs).metadata())
    return dataset


@contextmanager
def _by_address(name: str | Path, path: Path) -> Iterator[None]:
    """Let errors in the block name the address of a file, where it has one, and not `path`, its copy here."""
    try:
        yield
    except DataError as error:
        if (address := address_of(name)) is None:
            raise
        said = str(error).replace(str(path), address).replace(FETCH_AGAIN, "Put it there again, whole.")
        raise DataError(said) from error


def require(name: str) -> None:
    """Raise UserError for a name of nothing, and for data that are not here and not made here; nothing is read.

    Minari says itself what it has not, where its data are read.
    """
    origin = locate(name)
    if origin.exists or origin.path is None:
        return
    if origin.kind == "file":
        with open_table(origin.path):  # which says what is missing
            pass
    elif origin.kind == "d4rl" and origin.benchmark is not None and not origin.benchmark.generated:
        _generate_missing(origin.benchmark, None, False)


def missing(name: str) -> str | None:
    """Why a data set cannot be loaded here, in a sentence; None: nothing is known to be in the way.

    Of what is here the first row is read, and the checksum verified where there is one. What would be generated at
    first use is not missing where that can be done: OGBench's needs its wheel. Of an address nothing is known before it
    is fetched; nor is it of another package's.
    """
    if address_of(name) is not None:
        return None
    try:
        origin = locate(name)
        makes_it = origin.benchmark is not None and origin.benchmark.generated and not origin.name.endswith("-val")
        if origin.path is not None and (origin.exists or not makes_it):
            load_dataset(name, rows=1, progress=False, check=False)
        elif origin.kind == "ogbench":
            from envs.ogbench.worlds import require_wheel

            require_wheel()  # which makes it
    except UserError as error:
        return str(error)
    return None


def _load_ogbench(origin: Origin, rows: int | None, progress: bool, infos: bool) -> OfflineDataset:
    """A data set of OGBench's, rebuilt first where it is not here; with `rows`, only as many episodes as they need."""
    from envs.ogbench import generation, reading

    name = ogbench.get(origin.name)
    path = reading.find(name, rows)
    if not path.is_file() and not name.validation:
        episodes = None if rows is None else reading.episodes_for(name, rows)
        here = [n for n, _ in generation.parts_here(name, 1)]
        most = max(here, default=0)
        instead = f"--rows {most * (name.rows - 1)} reads the {most:,} episodes that are here." if here else ""
        path = generation.generate(name, episodes=episodes, quiet=not progress, instead=instead)
    return reading.load(name, path, rows, infos)


def _generate_missing(benchmark: registry.Benchmark, rows: int | None, progress: bool) -> Path:
    if not benchmark.generated:
        raise DataError(
            f"The data set {benchmark.id!r} is not on this machine ({cached_path(benchmark.id)}). Fetch it with "
            f"`diffrl data download {benchmark.id}`, or give the path of a local file instead."
        )
    path = cached_path(benchmark.id, rows)
    return path if path.is_file() else generate(benchmark.id, rows=rows, progress=progress, again=False)


def generate(
    benchmark_id: str,
    path: Path | None = None,
    rows: int | None = None,
    seed: int = 0,
    progress: bool = True,
    again: bool = True,
) -> Path:
    """Generate a maze2d data set with D4RL's own recipe and return its file, `cached_path(...)` unless given.

    OGBench's are generated by `envs.ogbench.generation.generate`. Where another process is generating that file, this
    one waits. again: then generate it nevertheless. `rows=None` means as many as D4RL's (1, 2 or 4 million). Raises
    UserError for any other benchmark.
    """
    benchmark = registry.get(benchmark_id)
    if registry.is_ogbench(benchmark_id):
        raise UserError(f"{benchmark_id} is OGBench's: its size is a number of episodes, not of rows.")
    if not registry.is_d4rl(benchmark_id):
        raise UserError(_OF_PACKAGE.format(benchmark_id))
    if not benchmark.generated:
        can = ", ".join(i for i in registry.ids() if registry.get(i).generated)
        raise UserError(
            f"{benchmark_id!r} cannot be generated; try `diffrl data download {benchmark_id}`. Generated are: {can}, "
            "and OGBench's (`diffrl data list ogbench`)."
        )
    if rows is not None and rows < 1:
        raise UserError(f"rows is {rows}; expected at least 1.")
    from envs import maze2d

    target = path or cached_path(benchmark_id, rows, seed)
    with alone(target, lambda: console.print(f"Waiting for another process, which is generating {target}.")):
        if target.is_file() and not again:
            return target
        return maze2d.generate(benchmark_id, target, rows, seed=seed, progress=progress)


def download(name: str, force: bool = False, progress: bool = True) -> Path:
    """Fetch a D4RL or Minari data set and return where it is; at once if it is there already, unless `force`.

    A D4RL file is resumed where an earlier try was cut, verified, given a checksum, and only then put in place.
    Raises UserError where the host cannot be reached, saying what else can be done.
    """
    origin = locate(name)
    if origin.kind == "ogbench":
        assert origin.benchmark is not None
        from envs.ogbench.generation import folders

        way = f"`diffrl data generate {name}` rebuilds it here; or put" if origin.benchmark.generated else "Put"
        raise UserError(
            f"{name} is not downloaded: OGBench's host was out of reach for weeks. {way} OGBench's own "
            f"{ogbench.get(name).dataset}.npz in {folders()}."
        )
    if origin.kind == "file":
        raise UserError(f"{name!r} is a path; expected a D4RL id (`diffrl data list`) or a Minari id.")
    if origin.path is None:
        raise UserError(_OF_PACKAGE.format(name))
    if origin.exists and not force:
        return origin.path
    if origin.benchmark is None:
        minari_format.download(origin.name, force)
        return origin.path
    target, attempts = cached_path(origin.benchmark.id), 5
    if origin.benchmark.generated:  # who has no network is told at once, and not kept waiting
        console.print(f"`diffrl data generate {origin.benchmark.id}` rebuilds this data set here, without a download.")
        attempts = 2
    try:
        fetch(origin.benchmark.url, target, _verify(origin.benchmark), attempts=attempts, progress=progress)
    except DownloadError as error:
        raise UserError(f"{error}\n{_alternatives(origin.benchmark)}") from error
    return target


def _alternatives(benchmark: registry.Benchmark) -> str:
    ways = [
        "D4RL's host is down at times: try again later; what has arrived is kept.",
        f"If you have the file, copy it to {cached_path(benchmark.id)}, or give its path instead of the id.",
    ]
    if benchmark.generated:
        ways.append(f"`diffrl data generate {benchmark.id}` rebuilds this data set here, without a download.")
    if benchmark.minari is not None:
        ways.append(
            f"Minari has a data set of the same kind, not the same data: `diffrl data download {benchmark.minari}`."
        )
    return "\n".join(f"- {way}" for way in ways)


def _verify(benchmark: registry.Benchmark) -> Callable[[Path], None]:
    def verify(path: Path) -> None:
        d4rl.read(path, max_episode_steps=benchmark.max_episode_steps, infos=False)  # `seal` reads them, in parts
        d4rl.seal(path)

    return verify
