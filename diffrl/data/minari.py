"""Minari data sets in and out, in both of its formats (HDF5 and Arrow).

Minari keeps whole episodes, T steps and T + 1 observations, so next observations are always known. Its `terminations`
are our `terminals`; `truncations`, and the last step of an episode that ends in neither, are our `timeouts`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from diffrl.data.offline import ACTION_LIMIT, STAND_IN, OfflineDataset
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import atomic_path

Array: TypeAlias = npt.NDArray[Any]
Flatten: TypeAlias = Callable[[Any], tuple[Array, dict[str, Array]]]

_OURS = "diffrl"
"""Key, in Minari's metadata, of ours that Minari has no field for: where the data come from, the range of returns."""
_INSTALL = "Reading and writing Minari data needs an extra: pip install 'diffrl[minari]'"


def store() -> Path:
    """Minari's folder of data sets: `$MINARI_DATASETS_PATH`, else ~/.minari/datasets."""
    chosen = os.environ.get("MINARI_DATASETS_PATH")
    return Path(chosen).expanduser() if chosen else Path("~/.minari/datasets").expanduser()


def is_id(name: str) -> bool:
    """Whether `name` has the form of a Minari id: (namespace/)name-v0."""
    return re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name) is not None


def is_folder(path: Path) -> bool:
    """Whether `path` is a data set in Minari's format."""
    return (path / "data" / "metadata.json").is_file()


def local_ids() -> dict[str, int]:
    """The data sets in `store()` by id, and their steps, without importing Minari."""
    found = {}
    for path in sorted(store().glob("**/data/metadata.json")):
        name = path.parent.parent.relative_to(store()).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            found[name] = int(json.loads(path.read_text()).get("total_steps", 0))
    return found


def read(source: str | Path, *, action_limit: float | None = ACTION_LIMIT, check: bool = True) -> OfflineDataset:
    """Read a Minari data set by its id (from `store()`) or from its folder (a Path).

    Observations are (T + 1, O). A dictionary of goal-conditioned tasks becomes one vector as in D4RL: `observation`,
    preceded by `achieved_goal` unless the observation begins with it already (so AntMaze has D4RL's 29, PointMaze 4);
    `desired_goal` goes to `infos["goal"]`. Parts that are dictionaries themselves (FrankaKitchen's goals) are left
    out. Any other dictionary or tuple is flattened whole, in Gymnasium's order.

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
    try:
        data = minari.MinariDataset(folder / "data")
        _check_actions(data.action_space, folder)
        flatten = _flattener(data.observation_space)
        for episode in data.iterate_episodes():
            observations, infos = flatten(episode.observations)
            steps = len(episode.rewards)
            if len(observations) != steps + 1 or len(episode.actions) != steps:
                raise DataError(
                    f"{folder}: episode {episode.id} has {steps} rewards, {len(episode.actions)} actions and "
                    f"{len(observations)} observations; expected T, T and T + 1. Download or write it again."
                )
            timeouts = np.asarray(episode.truncations, np.bool_).copy()
            timeouts[-1:] |= ~np.asarray(episode.terminations[-1:], np.bool_)
            columns = {
                "observations": observations[:-1],
                "next_observations": observations[1:],
                "actions": np.asarray(episode.actions, np.float32),
                "rewards": np.asarray(episode.rewards, np.float32),
                "terminals": np.asarray(episode.terminations, np.bool_),
                "timeouts": timeouts,
                **{f"infos/{key}": values[:-1] for key, values in infos.items()},
            }
            for key, values in columns.items():
                parts.setdefault(key, []).append(values)
        rows, expected = sum(map(len, parts.get("rewards", []))), int(data.total_steps)
        env_id = None if data.env_spec is None else data.env_spec.id
        ours = dict(json.loads((folder / "data" / "metadata.json").read_text()).get(_OURS, {}))
    except DataError:
        raise
    except ImportError as error:
        raise UserError(f"{_INSTALL} ({error})") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{folder} cannot be read as Minari data ({error}). Download or write it again.") from error
    if rows != expected or rows == 0:
        raise DataError(
            f"{folder}: {rows} steps were read; its metadata.json says {expected}. Write or fetch it again."
        )
    arrays = {key: np.concatenate(values) for key, values in parts.items()}
    metadata = {
        **_bounds(data.action_space),
        **ours,
        "path": str(folder),
        "minari_id": data.id,
        **({"env_id": env_id} if env_id else {}),
    }
    dataset = OfflineDataset(
        **{key: values for key, values in arrays.items() if not key.startswith("infos/")},
        infos={key.removeprefix("infos/"): values for key, values in arrays.items() if key.startswith("infos/")},
        metadata=metadata,
    )
    return dataset.validate(str(folder), action_limit) if check else dataset


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

    if not is_id(dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari id; expected e.g. maze2d/umaze-v1 (it ends in -v and a number).")
    target = store() / dataset_id
    if target.exists() and not force:
        raise UserError(f"The Minari data set {dataset_id!r} exists ({target}). Use --force to replace it.")
    buffers = [EpisodeBuffer(id=number, **episode) for number, episode in enumerate(_episodes(dataset))]
    if not buffers:
        raise DataError("No step has a known successor: there is nothing to write. Check `timeouts`.")
    largest = np.full(dataset.action_size, max(1.0, float(np.abs(dataset.actions).max())), np.float32)
    low, high = dataset.stored_bounds() or (-largest, largest)
    minimum, maximum = reference_scores or (None, None)
    try:
        with atomic_path(target) as temporary, _store_at(temporary.parent / "store"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it asks for author, permalink, ...
                written = minari.create_dataset_from_buffers(
                    dataset_id,
                    buffers,
                    env=_environment(dataset.metadata.get("env_id")),
                    observation_space=Box(-np.inf, np.inf, (dataset.observation_size,), np.float32),
                    action_space=Box(low, high, dtype=np.float32),
                    ref_min_score=minimum,
                    ref_max_score=maximum,
                    algorithm_name=_text(dataset.metadata.get("algorithm")),
                    description=_text(dataset.metadata.get("description")),
                    data_format=data_format,
                )
                written.storage.update_metadata({_OURS: _our_metadata(dataset)})
            (store() / dataset_id).replace(temporary)
            if target.exists():
                target.replace(temporary.parent / "old")  # removed with the temporary folder
        namespace = dataset_id.rpartition("/")[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
    except ImportError as error:
        raise UserError(f"{_INSTALL} ({error})") from error
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error}. Choose another place, or make room there.") from error
    return target


def download(dataset_id: str, force: bool = False) -> None:
    """Fetch a data set from Minari's host into `store()`. Raises UserError where that fails, saying what to do."""
    minari = _import()
    try:
        minari.download_dataset(dataset_id, force_download=force)
    except ValueError as error:
        raise UserError(f"{error} See https://minari.farama.org for the ids there are.") from error
    except Exception as error:  # whatever its client for the host raises: requests, huggingface_hub, google.cloud
        raise UserError(
            f"Minari's host could not be reached, or did not send {dataset_id!r} ({type(error).__name__}: {error}). "
            f"Try again later, or copy the data set from another machine to {store() / dataset_id}."
        ) from error


def _import() -> Any:
    try:
        import minari
    except ImportError as error:
        raise UserError(f"{_INSTALL} ({error})") from error
    return minari


def _check_actions(space: Any, folder: Path) -> None:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or len(space.shape) != 1:
        raise DataError(f"{folder}: the action space is {space}; expected Box with one axis (real-valued actions).")


def _bounds(space: Any) -> dict[str, Array]:
    """The bounds of an action space as our metadata have them; nothing where one is infinite."""
    finite = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    return {"action_low": space.low.astype(np.float32), "action_high": space.high.astype(np.float32)} if finite else {}


def _flattener(space: Any) -> Flatten:
    """A function from an episode's observations to (T + 1, O) float32 and further columns."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return lambda values: (_two_axes(values), {})
    if isinstance(space, spaces.Dict) and isinstance(space.spaces.get("observation"), spaces.Box):
        boxes = {key for key, part in space.spaces.items() if isinstance(part, spaces.Box)}

        def goal_conditioned(values: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
            observations = _two_axes(values["observation"])
            if "achieved_goal" in boxes:
                achieved = _two_axes(values["achieved_goal"])
                if not np.array_equal(observations[:, : achieved.shape[1]], achieved):
                    observations = np.concatenate([achieved, observations], axis=1)
            return observations, {"goal": _two_axes(values["desired_goal"])} if "desired_goal" in boxes else {}

        return goal_conditioned
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return lambda values: (_leaves(space, values), {})
    raise DataError(f"The observation space is {space}; expected Box, or a dictionary of Box.")


def _leaves(space: Any, values: Any) -> Array:
    """All Box parts of a dictionary or tuple as the columns of one array, in the space's order."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return _two_axes(values)
    if isinstance(space, spaces.Dict):
        return np.concatenate([_leaves(part, values[key]) for key, part in space.spaces.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_leaves(part, values[i]) for i, part in enumerate(space.spaces)], axis=1)
    raise DataError(f"A part of the observation space is {space}; expected Box.")


def _two_axes(values: Any) -> Array:
    array = np.asarray(values, np.float32)
    return array.reshape(len(array), -1)


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
        }


def _environment(env_id: str | None) -> Any:
    """The environment the data belong to, so that `recover_environment()` works; None where it is not installed."""
    import gymnasium

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # D4RL's data belong to v4
            return None if env_id is None else gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError):
        return None


def _our_metadata(dataset: OfflineDataset) -> dict[str, Any]:
    """The metadata as JSON holds them: arrays as lists, and what JSON cannot hold as text."""
    stand_in = {} if dataset.has_terminal_next else {"terminal_successors": STAND_IN}
    told = ("path", "sha256", "dataset", "minari_id", "env_id", "timeouts")  # elsewhere, or of the file that was read
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
