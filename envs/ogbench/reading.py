"""A file of OGBench's layout, ours or an official `.npz`, as transitions with the rewards of a task.

A file holds every state of an episode, the last one too; a transition is a row that another row of its episode follows.
The rewards are `ogbench.relabel_utils.relabel_dataset`'s, of s' or of s (`Timing`). Where a task is solved nothing is
bootstrapped, although the recorded episode goes on: such a row is terminal, so that ours ends there and another begins.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.columns import Column, Table, open_table
from diffrl.data.d4rl import verify
from diffrl.data.offline import NO_REWARDS, Bools, Floats, OfflineDataset
from diffrl.support.errors import DataError
from envs.ogbench import generation, worlds
from envs.ogbench.names import FIRST_EPISODES, TASKS, Name, of_dataset, parse

COLUMNS = ("observations", "actions", "terminals", "qpos")
_IN_WALLS = 0.01
"""The share of rows whose cell may be a wall's before a file is taken for another maze's."""


def find(name: Name, rows: int | None = None) -> Path:
    """Where a data set is, or would be: ours, else OGBench's own file, in our folder or `$OGBENCH_DATASET_DIR`, theirs.

    rows: how many are wanted; where the whole is not here, a file of the `episodes_for` them or more will do. So will,
    for a small data set, one of the whole that it begins.
    """
    ours = generation.cached_path(name, validation=name.validation)
    wholes = [replace(name, small=False)] if name.small else []
    for one in (name, *wholes):
        kept = generation.cached_path(one, validation=name.validation)
        official = f"{one.dataset}{'-val' if name.validation else ''}.npz"
        for path in (kept, kept.with_name(official), generation.official_folder() / official):
            if path.is_file():
                return path
    episodes = name.episodes if rows is None or name.validation else episodes_for(name, rows)
    if name.small or episodes < name.episodes:
        for _, path in generation.parts_here(name, episodes):
            return path
    return ours if episodes == name.episodes else generation.cached_path(name, episodes)


def episodes_of(name: Name) -> int:
    """The episodes that a data set has, of training or for validation; a file may hold more of the same."""
    return generation.validation_episodes(name.episodes) if name.validation else name.episodes


def episodes_for(name: Name, rows: int) -> int:
    """The episodes that so many transitions need."""
    return min(name.episodes, -(-rows // (name.rows - 1)))


def refuse_bare(path: Path) -> None:
    """Raise DataError for a file of OGBench's layout that is named by its path, which tells no task.

    It is known by its own `metadata/dataset`, else by its name; by its columns alone where it has been renamed.
    """
    stem, version, _ = path.name.partition("-v0")
    name = parse(stem + version)
    if not path.is_file():
        return
    with open_table(path) as table:
        if table.get("rewards") is not None or any(table.get(key) is None for key in COLUMNS):
            return
        about = {key.partition("/")[2]: _plain(table.read(column)) for key, column in table.below("metadata").items()}
    name = parse(str(about.get("dataset", ""))) or name
    if name is None:
        raise DataError(
            f"{path} has OGBench's layout ({', '.join(COLUMNS)}), which holds no rewards: those are of a task. Name it "
            f"as OGBench does, such as cube-single-play-v0.npz, in {generation.folders()}, and train on a task of it: "
            "--dataset cube-single-play-singletask-v0."
        )
    validation = name.validation or "-val" in path.name or about.get("split") == "validation"
    episodes = about.get("episodes") if is_rebuilt(path) and not validation else None
    raise DataError(
        f"{path} holds OGBench's {name.dataset}{' for validation' if validation else ''}, without rewards: those are "
        f"of a task. {way_to_train(replace(name, validation=validation), path, episodes)}"
    )


def way_to_train(name: Name, path: Path, episodes: Any = None) -> str:
    """A sentence: how to train on a file, by an id. episodes: of training that one of ours holds; None: OGBench's.

    Where the id reads another file that is here, the advice puts this one beside it, not over it.
    """
    task = f"--dataset {of_dataset(name)[0]}{'-val' if name.validation else ''}"
    fewer = isinstance(episodes, int) and 0 < episodes < name.episodes
    rows = episodes * (name.rows - 1) if fewer else None
    task += "" if rows is None else f" --rows {rows}"
    place = generation.cached_path(name, episodes if fewer else None, validation=name.validation)
    where = f"at {place}"
    if not is_rebuilt(path):
        official = f"{name.dataset}{'-val' if name.validation else ''}.npz"
        where = f"into {generation.folders()} as {official}"
        if path.name == official and path.absolute().parent in (generation.official_folder().absolute(), place.parent):
            place = path.absolute()
    if path.absolute() == place.absolute():
        return f"It is read by the name of a task: {task}."
    kept, val = find(name, rows), generation.validation_path
    more = is_rebuilt(path) and not name.validation and val(path).is_file()
    if is_rebuilt(path) and kept.is_file() and not kept.samefile(path):
        beside = f", and {val(path).name} as OTHER/ogbench/{val(place).name}" if more else ""
        return (
            f"{task} reads another file, {kept}: leave that as it is. To train on this one, put it into another data "
            f"directory, as OTHER/ogbench/{place.name}{beside}; with DIFFRL_DATA=OTHER, {task} reads it."
        )
    return f"Put it {where}{f', and {val(path).name} at {val(place)}' if more else ''}; then {task} reads it."


def is_rebuilt(path: Path) -> bool:
    """Whether a file is one of ours, not OGBench's own."""
    return path.suffix != ".npz"


def load(name: Name, path: Path, rows: int | None = None, infos: bool = False) -> OfflineDataset:
    """The transitions of a file, with the task's rewards; of a data set without a task, with rewards of 0.

    rows: keep the first so many transitions. infos: keep `qpos`, `qvel` and `button_states`. Raises DataError where
    the file is missing, damaged, not of OGBench's layout, or of another environment.
    """
    if name.validation and not path.is_file():
        raise DataError(
            f"{path} does not exist: the validation set was not made. `diffrl data generate {name.dataset}`."
        )
    states, about = _read(name, path, rows, infos)
    ends = states.pop("terminals").astype(np.bool_)
    ends[-1] = True
    kept = ~ends
    if not kept.any():
        raise DataError(f"{path}: all rows are marked as the last of their episode; expected episodes of many rows.")
    env = worlds.make_task(name.world.name, name.task or 0)
    with closing(env):
        env.reset(seed=0)
        _check_world(name, path, states, env)
        relabelled = _labels(name, states, env)
    following = np.flatnonzero(kept) + 1
    of = following if name.after else np.flatnonzero(kept)
    solved, rewards = relabelled[0][of], relabelled[1][of]
    dataset = OfflineDataset(
        observations=states["observations"][kept],
        actions=states["actions"][kept],
        rewards=rewards,
        terminals=solved,
        timeouts=ends[following] & ~solved,
        next_observations=states["observations"][following],
        infos={
            key: values[kept] for key, values in states.items() if infos and key in ("qpos", "qvel", "button_states")
        },
        metadata={"path": str(path), **about, **_described(name, path), "recorded_limit": name.rows - 1},
    )
    return dataset if rows is None else dataset.head(rows)


def _described(name: Name, path: Path) -> dict[str, Any]:
    """What the metadata of a loaded data set say of the task and the file."""
    kind = "rebuilt here, not OGBench's own file" if is_rebuilt(path) else "OGBench's layout, as found"
    if name.task is None:
        return {"data": kind, NO_REWARDS: f"those are of a task, {of_dataset(name)[0]} and its task1 to task5"}
    when = "after the action, as no reader of OGBench's" if name.after else "before the action, as OGBench's reader"
    sparse = ", sparse" if name.sparse else ""
    return {"data": kind, "rewards": f"task {name.task}{sparse}, of the state {when} has them"}


def _read(name: Name, path: Path, rows: int | None, infos: bool) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The columns of a file, as far as they are needed, and what its metadata say.

    Of a small data set the first episodes alone, where the file has more.
    """
    most = None if rows is None else 2 * rows + 2  # enough, however short the episodes are
    episodes = episodes_of(name)
    if name.small:
        most = min(most or episodes * name.rows, episodes * name.rows)
    with open_table(path) as table:
        columns = _columns(name, table, infos)
        metadata = table.below("metadata")
        table.check_memory(columns, most)
        arrays = {key: table.read(column, most) for key, column in (columns | metadata).items()}
        if table.sha256 is not None:
            found = {key: values for key, values in arrays.items() if values.shape == (columns | metadata)[key].shape}
            verify(table, found)
        about = {key.partition("/")[2]: _plain(arrays[key]) for key in metadata}
        stored = about.get("dataset")
        if stored is not None and stored != name.whole.dataset:
            raise DataError(f"{path} is a file of {str(stored)[:60]}; expected one of {name.whole.dataset}.")
        about = {key: value for key, value in about.items() if key not in ("dataset", "rows", "attempts")}
        if "targets" in about and "reached" in about:
            targets, reached = (int(np.sum(np.atleast_1d(about.pop(key))[:episodes])) for key in ("targets", "reached"))
            met = f"met {reached:,} of {targets:,} targets ({reached / max(targets, 1):.1%})"
            about["oracle"] = f"reached {reached:,} goals" if name.world.maze else met
        states = {key: _float32(arrays[key], key, path) if key != "terminals" else arrays[key] for key in columns}
        if name.small and (there := int(table.read(columns["terminals"]).astype(np.bool_).sum())) > episodes:
            about |= {"episodes": episodes, FIRST_EPISODES: f"{episodes:,} of the {there:,} in the file"}
            ends = np.flatnonzero(states["terminals"])[:episodes]
            states = (
                {key: values[: ends[-1] + 1] for key, values in states.items()} if len(ends) == episodes else states
            )
        return states, about | ({"sha256": table.sha256} if table.sha256 else {})


def _plain(value: NDArray[Any]) -> Any:
    if value.dtype.kind == "S" and value.ndim == 0:
        return bytes(value[()]).decode(errors="replace").rstrip()
    return value.item() if value.ndim == 0 else value


def _float32(values: NDArray[Any], key: str, path: Path) -> Floats:
    floats: Floats = values.astype(np.float32, copy=False)
    if not np.isfinite(floats).all():
        row = int(np.flatnonzero(~np.isfinite(floats).all(axis=1))[0])
        raise DataError(f"{path}: {key}: row {row} is not finite. Generate or fetch the file again.")
    return floats


def _columns(name: Name, table: Table, infos: bool) -> dict[str, Column]:
    """The columns of a file, of which only names, types and shapes have been read."""
    wanted = [*COLUMNS, *(["qvel"] if infos else []), *(["button_states"] if _has_buttons(name) else [])]
    columns = {}
    for key in wanted:
        column = table.get(key)
        if column is None:
            raise DataError(
                f"{table.path}: the key {key!r} is missing; expected a file of {name.whole.dataset} with "
                f"{', '.join(wanted)}."
            )
        n_dims = 1 if key == "terminals" else 2
        if column.dtype.kind not in "biuf" or len(column.shape) != n_dims or column.shape[0] == 0:
            raise DataError(f"{table.path}: {key} has type {column.dtype} and shape {column.shape}; expected numbers.")
        columns[key] = column
    n = {key: column.shape[0] for key, column in columns.items()}
    if len(set(n.values())) != 1:
        raise DataError(f"{table.path}: its columns have different numbers of rows: {n}.")
    return columns


def _has_buttons(name: Name) -> bool:
    return name.world.name == "scene" or name.world.name.startswith("puzzle")


def _check_world(name: Name, path: Path, states: dict[str, NDArray[Any]], env: Any) -> None:
    """Raise DataError where the rows cannot be of the environment: by their sizes, and in mazes by the walls."""
    inner = env.unwrapped
    model = inner.model if name.world.maze else inner._model
    sizes = {"observations": env.observation_space.shape[0], "actions": env.action_space.shape[0], "qpos": model.nq}
    for key, size in sizes.items():
        if states[key].shape[1] != size:
            raise DataError(
                f"{path}: {key} have {states[key].shape[1]} dimensions, those of {name.world.name} {size}: it is a "
                "file of another environment."
            )
    largest = np.abs(states["actions"]).max()
    if largest > 1 + 1e-5:
        raise DataError(f"{path}: actions reach {largest:.3g}; expected [-1, 1].")
    if name.world.maze:
        maze, unit = inner.maze_map, inner._maze_unit
        offsets = np.array([inner._offset_x, inner._offset_y])
        cells = ((states["qpos"][:, :2] + offsets + unit / 2) / unit).astype(np.int64)[:, ::-1]
        inside = ((cells >= 0) & (cells < maze.shape)).all(axis=1)
        wall = np.ones(len(cells), np.bool_)
        wall[inside] = maze[tuple(cells[inside].T)] == 1
        if wall.mean() > _IN_WALLS:
            raise DataError(
                f"{path}: {wall.mean():.0%} of the rows lie inside the walls of {name.world.name}: it is a file of "
                "another maze."
            )


def _labels(name: Name, states: dict[str, NDArray[Any]], env: Any) -> tuple[Bools, Floats]:
    """(N,) whether the task is solved in a state, and (N,) the reward of it, by the wheel's own relabelling."""
    n = len(states["qpos"])
    if name.task is None:
        return np.zeros(n, np.bool_), np.zeros(n, np.float32)
    from ogbench.relabel_utils import relabel_dataset

    labels: dict[str, Any] = {key: states[key] for key in ("qpos", "button_states") if key in states}
    try:
        relabel_dataset(name.world.name, env, labels)
    except (IndexError, ValueError) as error:
        raise DataError(f"The rows do not fit the tasks of {name.world.name}: {error}.") from error
    solved = labels["masks"] == 0
    rewards = np.where(solved, 0.0, -1.0) if name.sparse else labels["rewards"]
    return solved, rewards.astype(np.float32)


def solved_by_task(name: Name, path: Path) -> dict[int, Bools]:
    """Of each task, (N,) whether it is solved in a state of a file."""
    states, _ = _read(name, path, None, False)
    result = {}
    for task in TASKS:
        env = worlds.make_task(name.world.name, task)
        with closing(env):
            env.reset(seed=0)
            result[task] = _labels(replace(name, task=task), states, env)[0]
    return result
