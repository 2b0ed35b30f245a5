"""Minari data sets in and out, in both of its formats (HDF5 and Arrow).

Minari keeps whole episodes, T steps and T + 1 observations, so next observations are always known. Its `terminations`
are our `terminals`; `truncations`, and the last step of an episode that ends in neither, are our `timeouts`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffrl.data import observations as flattening
from diffrl.data.env_spec import ENV_KEYS, SPECS, EnvSpec, of_minari
from diffrl.data.minari_episodes import INSTALL, door, episodes, read_metadata
from diffrl.data.observations import Array
from diffrl.data.offline import ACTION_LIMIT, PIXELS, OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import atomic_path

_OURS = "diffrl"
"""Key, in Minari's metadata, of ours that Minari has no field for: where the data come from, the range of returns."""


def store() -> Path:
    """Minari's folder of data sets: `$MINARI_DATASETS_PATH`, else ~/.minari/datasets."""
    chosen = os.environ.get("MINARI_DATASETS_PATH")
    return Path(chosen).expanduser() if chosen else Path("~/.minari/datasets").expanduser()


def is_id(name: str) -> bool:
    """Whether `name` has the form of a Minari id: (namespace/)name-v0. Its namespaces have two characters or more."""
    return re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name) is not None and len(name.rpartition("/")[0]) != 1


def is_folder(path: Path) -> bool:
    """Whether `path` is a data set in Minari's format."""
    return (path / "data" / "metadata.json").is_file()


def local_ids() -> dict[str, int]:
    """The data sets in `store()` by id, and their steps, without importing Minari."""
    found = {}
    for path in sorted(store().glob("**/data/metadata.json")):
        name = path.parent.parent.relative_to(store()).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            try:
                found[name] = int(read_metadata(path.parent.parent)["total_steps"])
            except DataError:  # `read` says why
                found[name] = 0
    return found


def env_metadata(dataset_id: str) -> dict[str, Any]:
    """What the metadata of a data set in `store()` say of its environment, as `read` gives it; Minari is not imported.

    Raises DataError where they are damaged, or not on this machine.
    """
    folder = store() / dataset_id
    return _env_metadata(read_metadata(folder), folder)


def read(
    source: str | Path, *, action_limit: float | None = ACTION_LIMIT, check: bool = True, rows: int | None = None
) -> OfflineDataset:
    """Read a Minari data set by its id (from `store()`) or from its folder (a Path).

    Observations are (T + 1, O). A dictionary of goal-conditioned tasks becomes one vector as in D4RL: `observation`,
    preceded by `achieved_goal` unless the observation begins with it already; then `desired_goal`, without which a
    policy would not know where to go: Minari's AntMaze has D4RL's 29 numbers and 2 of the goal, PointMaze 4 and 2. It
    is in `infos["goal"]` too, where it is a vector.
    Any other dictionary or tuple is flattened whole, in Gymnasium's order. `observation_parts` in the metadata says
    which keys were taken, so that an environment's observations are flattened alike: see `diffrl.data.observations`.

    The environment is Minari's `eval_env_spec`, else its `env_spec`: `env_id` and `env_spec` in the metadata.

    `rows` reads no more episodes than hold so many. Columns beside these, `infos`, are not read.

    Raises DataError: not on this machine, discrete actions, damaged, or as in `OfflineDataset.validate`; UserError
    where Minari is not installed.
    """
    minari = _import()
    folder = source if isinstance(source, Path) else store() / source
    if not is_folder(folder):
        raise DataError(
            f"The Minari data set {str(source)!r} is not on this machine ({folder}). Fetch it with `diffrl data "
            f"download {source}`, or set MINARI_DATASETS_PATH to the folder that holds it."
        )
    parts: dict[str, list[Array]] = {}
    n = 0
    theirs = read_metadata(folder)
    with door(folder):
        data = minari.MinariDataset(folder / "data")
        _check_actions(data.action_space, folder)
        space = data.observation_space
        for episode in episodes(folder, data):
            pieces = _pieces(space, episode.observations)
            steps = len(episode.rewards)
            seen = next((len(values) for values in pieces.values() if len(values) != steps + 1), steps + 1)
            if seen != steps + 1 or len(episode.actions) != steps:
                raise DataError(
                    f"{folder}: episode {episode.id} has {steps} rewards, {len(episode.actions)} actions and "
                    f"{seen} observations; expected T, T and T + 1. Download or write it again."
                )
            timeouts = np.asarray(episode.truncations, np.bool_).copy()
            timeouts[-1:] |= ~np.asarray(episode.terminations[-1:], np.bool_)
            columns = {
                **{f"from/{key}": values[:-1] for key, values in pieces.items()},
                **{f"to/{key}": values[1:] for key, values in pieces.items()},
                "actions": np.asarray(episode.actions, np.float32),
                "rewards": np.asarray(episode.rewards, np.float32),
                "terminals": np.asarray(episode.terminations, np.bool_),
                "timeouts": timeouts,
            }
            for key, values in columns.items():
                parts.setdefault(key, []).append(values)
            n += steps
            if rows is not None and n > rows:
                break
        ours = dict(theirs.get(_OURS, {}))
    whole = rows is None or n <= rows
    if (whole and n != theirs["total_steps"]) or n == 0:
        raise DataError(
            f"{folder}: {n} steps were read; its metadata.json says {theirs['total_steps']}. Write or fetch it again."
        )
    arrays = {key: np.concatenate(values) for key, values in parts.items()}
    taken = _taken(space, arrays)
    metadata = {
        **_bounds(data.action_space),
        **ours,
        "path": str(folder),
        "minari_id": data.id,
        **({"observation_parts": ",".join(taken)} if taken else {}),
        **_pixels(space),
        **_env_metadata(theirs, folder),
    }
    dataset = OfflineDataset(
        observations=_joined(arrays, "from", taken),
        next_observations=_joined(arrays, "to", taken),
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminals=arrays["terminals"],
        timeouts=arrays["timeouts"],
        infos=_goal(space, arrays),
        metadata=metadata,
    )
    dataset = dataset if rows is None else dataset.head(rows)
    return dataset.validate(str(folder), action_limit) if check else dataset


def spare(dataset_id: str, force: bool) -> Path:
    """The folder of an id in Minari's store. Raises UserError for a bad id, and one that is there, unless `force`."""
    if not is_id(dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari id; expected e.g. maze2d/umaze-v1 (it ends in -v and a number).")
    target = store() / dataset_id
    if target.exists() and not force:
        raise UserError(f"The Minari data set {dataset_id!r} exists ({target}). Use --force to replace it.")
    return target


def write(
    dataset_id: str,
    dataset: OfflineDataset,
    data_format: Literal["hdf5", "arrow"] = "hdf5",
    *,
    reference_scores: tuple[float, float] | None = None,
    force: bool = False,
) -> Path:
    """Write `dataset` into Minari's store under `dataset_id` (such as maze2d/umaze-v1); return its folder.

    Where next observations are not stored, the last step of an episode that was cut has no known successor and is
    left out, its predecessor being marked as the truncation; a terminal step's last observation is repeated.
    The action space has the bounds in the metadata, `action_low` and `action_high`, where they are there.
    The metadata are kept: `env_id`, `algorithm` and `description` as Minari's own, all others under the key `diffrl`.
    `infos` are not. `reference_scores` are the returns (random, expert) of Minari's normalised score.

    Raises UserError for a bad id, or one that exists (unless `force`); DataError where rows with next observations do
    not follow one another, as synthetic transitions do not: Minari has no place for those.
    """
    minari = _import()
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer
    from minari.namespace import create_namespace, list_local_namespaces

    target = spare(dataset_id, force)
    buffers = [EpisodeBuffer(id=number, **episode) for number, episode in enumerate(_episodes(dataset))]
    if not buffers:
        raise DataError("No step has a known successor: there is nothing to write. Check `timeouts`.")
    largest = np.full(dataset.action_size, max(1.0, float(np.abs(dataset.actions).max())), np.float32)
    low, high = dataset.stored_bounds() or (-largest, largest)
    try:
        with atomic_path(target) as temporary, _store_at(temporary.parent / "store"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it asks for author, permalink, ...
                written = minari.create_dataset_from_buffers(
                    dataset_id,
                    buffers,
                    observation_space=Box(-np.inf, np.inf, (dataset.observation_size,), np.float32),
                    action_space=Box(low, high, dtype=np.float32),
                    algorithm_name=_text(dataset.metadata.get("algorithm")),
                    description=_text(dataset.metadata.get("description")),
                    data_format=data_format,
                )
                written.storage.update_metadata(_their_metadata(dataset, reference_scores))
            (store() / dataset_id).replace(temporary)
            if target.exists():
                target.replace(temporary.parent / "old")  # removed with the temporary folder
        namespace = dataset_id.rpartition("/")[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from error
    except ValueError as error:  # such as a namespace of one letter
        raise UserError(f"Minari does not take {dataset_id!r}: {error} Choose another id.") from error
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error}. Choose another place, or make room there.") from error
    return target


def download(dataset_id: str, force: bool = False) -> None:
    """Fetch a data set from Minari's host into `store()`. Raises UserError where that fails, saying what to do."""
    minari = _import()
    console.print(f"Asking Minari's host for {dataset_id}.", markup=False, highlight=False)
    with suppress(ImportError):
        import huggingface_hub.utils.logging  # noqa: F401 (which sets a level as it is imported)
    logger = logging.getLogger("huggingface_hub")  # which tells of each try in lines of its own
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        minari.download_dataset(dataset_id, force_download=force)
    except ValueError as error:
        raise UserError(f"{error} See https://minari.farama.org for the ids there are.") from error
    except Exception as error:  # whatever its client for the host raises: requests, huggingface_hub, google.cloud
        raise UserError(
            f"Minari's host could not be reached, or did not send {dataset_id!r} ({type(error).__name__}: {error}). "
            f"Try again later, or copy the data set from another machine to {store() / dataset_id}."
        ) from error
    finally:
        logger.setLevel(level)


def _import() -> Any:
    try:
        import minari
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from error
    return minari


def _check_actions(space: Any, folder: Path) -> None:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or len(space.shape) != 1:
        raise DataError(f"{folder}: the action space is {space}; expected Box with one axis (real-valued actions).")


def _bounds(space: Any) -> dict[str, Array]:
    """The bounds of an action space as our metadata have them; nothing where one is infinite."""
    finite = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    return {"action_low": space.low.astype(np.float32), "action_high": space.high.astype(np.float32)} if finite else {}


def _pieces(space: Any, values: Any) -> dict[str, Array]:
    """An episode's observations as arrays (T + 1, ...) by part; of no goal-conditioned task one part, "" ."""
    if not flattening.is_goal_conditioned(space):
        return {"": flattening.flatten(space, values)}
    parts = flattening.goal_parts(space, begins_with_achieved=False)
    return {key: flattening.flatten(space.spaces[key], values[key]) for key in parts}


def _taken(space: Any, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """The parts of goal-conditioned observations that make the vector; () where there are none.

    Whether the observation begins with the achieved goal is seen in all rows, so that it is the same for each.
    """
    if not flattening.is_goal_conditioned(space):
        return ()
    begins = False
    if "from/achieved_goal" in arrays:
        size = arrays["from/achieved_goal"].shape[1]
        begins = all(
            np.array_equal(arrays[f"{end}/observation"][:, :size], arrays[f"{end}/achieved_goal"])
            for end in ("from", "to")
        )
    return flattening.goal_parts(space, begins)


def _joined(arrays: Mapping[str, Array], end: str, taken: tuple[str, ...]) -> Array:
    """The observations (N, O) at one end of the steps, of the parts that are taken."""
    columns = [arrays[f"{end}/{key}"] for key in taken or ("",)]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _goal(space: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The goal that each row strives for, where it is a vector."""
    from gymnasium.spaces import Box

    is_vector = flattening.is_goal_conditioned(space) and isinstance(space.spaces.get(flattening.GOAL), Box)
    return {"goal": arrays[f"from/{flattening.GOAL}"]} if is_vector else {}


def _pixels(space: Any) -> dict[str, str]:
    """The shape of pictures that observations hold, for the metadata; nothing where there are none."""
    parts = space.values() if hasattr(space, "values") else (space,)
    shapes = [part.shape for part in parts if part.dtype == np.uint8 and len(part.shape or ()) == 3]
    return {PIXELS: str(shapes[0])} if shapes else {}


def _env_metadata(theirs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the data set's metadata say of its environment: the one to evaluate in, else the one of the recording."""
    for key in SPECS:
        text = theirs.get(key)
        if text is not None:
            where = f"{folder / 'data' / 'metadata.json'}: {key}"
            spec = EnvSpec.from_json(text if isinstance(text, str) else "", where, of_minari(key))
            return {"env_id": spec.id, "env_spec": text, "env_origin": spec.origin}
    return {}


def _episodes(dataset: OfflineDataset) -> Iterator[dict[str, Any]]:
    """Every episode as Minari's columns: T + 1 observations, T of the rest."""
    following, known = dataset.successors()
    for start, stop in dataset.episodes():
        if not known[stop - 1]:
            stop -= 1
        if stop == start:
            continue
        rows = slice(start, stop)
        broken = np.flatnonzero((following[start : stop - 1] != dataset.observations[start + 1 : stop]).any(axis=1))
        if len(broken):
            row = start + broken[0]
            raise DataError(
                f"next_observations: row {row} is not the observation of row {row + 1}, though neither terminals nor "
                "timeouts end an episode there. Minari stores whole episodes only: write HDF5 instead."
            )
        truncations = np.zeros(stop - start, np.bool_)
        truncations[-1] = not dataset.terminals[stop - 1]
        yield {
            "observations": np.concatenate([dataset.observations[rows], following[stop - 1 : stop]]),
            "actions": dataset.actions[rows],
            "rewards": dataset.rewards[rows],
            "terminations": dataset.terminals[rows],
            "truncations": truncations,
            "infos": {},  # without it Minari cannot print an episode
        }


def _their_metadata(dataset: OfflineDataset, reference_scores: tuple[float, float] | None) -> dict[str, Any]:
    """Entries of Minari's metadata that are written without making the environment, which may not be installed."""
    found: dict[str, Any] = {_OURS: _our_metadata(dataset)}
    spec = EnvSpec.of(dataset.metadata)
    if spec is not None:
        found["env_spec"] = spec.to_json()
        if "eval" in spec.origin:
            found["eval_env_spec"] = found["env_spec"]
    if reference_scores is not None:
        found |= dict(zip(("ref_min_score", "ref_max_score"), reference_scores, strict=True))
        found["num_episodes_average_score"] = 100  # D4RL's
    return found


def _our_metadata(dataset: OfflineDataset) -> dict[str, Any]:
    """The metadata as JSON holds them: arrays as lists, and what JSON cannot hold as text."""
    stand_in = dataset.stand_ins()
    of_file = ("path", "sha256", "dataset", "minari_id", "timeouts", "terminal_successors")
    told = (*of_file, *ENV_KEYS)  # elsewhere, or of the file that was read
    kept = {key: value for key, value in dataset.metadata.items() if key not in told}

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    found: dict[str, Any] = json.loads(json.dumps(kept | stand_in, default=plain))
    return found


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@contextmanager
def _store_at(folder: Path) -> Iterator[None]:
    """Let Minari write to another store, so that a data set appears in its place only when it is whole."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
