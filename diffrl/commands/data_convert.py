"""`diffrl data convert`: a data set in another format. Heavy imports wait until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diffrl.commands.data_tables import shown_on
from diffrl.data.config import HDF5_SUFFIXES, ActionUnits, TimeLimitTerminals
from diffrl.support.errors import UserError, counted, joined, listed, singular
from diffrl.support.failure import no_room
from diffrl.support.files import spare_source, to_write
from diffrl.support.folder import spare
from diffrl.support.schema import Count, check

if TYPE_CHECKING:
    import gymnasium

    from diffrl.data.offline import OfflineDataset
    from diffrl.data.preprocessing import ActionBounds
    from envs.datasets import Origin


@dataclass(frozen=True)
class Convert:
    """Copy a data set into another format: D4RL's HDF5 or Minari."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    target: Annotated[Positional[str], tyro.conf.arg(metavar="TARGET")]
    """A path ending in .hdf5 or .h5, or a Minari id such as minari:maze2d/umaze-v1."""
    format: Literal["hdf5", "arrow"] = "hdf5"
    """Minari's storage format, where the target is Minari."""
    rows: int | None = None
    """Copy only so many rows from the beginning; by default all."""
    clip_actions: bool = False
    """Clip actions to the bounds of the environment, else in the file, else [-1, 1], for environments that do so. How
    many rows that changes, and whose bounds these are, is said, and kept in metadata/clipped_actions."""
    env: str | None = None
    """Record this Gymnasium id as the environment of the data: `diffrl train` then evaluates there by itself. The
    bounds of its actions are recorded too. By default what the file itself names."""
    env_kwargs: tuple[str, ...] = ()
    """Record these arguments of the environment, KEY=VALUE each, such as g=2.0 (values as JSON, else text); by default
    what the file itself names."""
    max_episode_steps: Count | None = None
    """Record this time limit of the environment's episodes; by default what the file itself names."""
    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the environment's limit of steps, or marked as timeouts too, are timeouts;
    terminals: they are true ends. By default they are taken as true ends, and what looks odd is said."""
    actions: ActionUnits | None = None
    """normalised: the data's actions are scaled to [-1, 1], where its environment has other bounds; environment: they
    are in its units. By default they are taken to be in its units, and what looks odd is said."""
    cut_contradictions: bool = False
    """Cut an episode where a stored next observation contradicts the next row."""
    force: bool = False
    """Replace the target if it exists."""

    def __post_init__(self) -> None:
        check(self)

    def _clipped(self, dataset: OfflineDataset, bounds: ActionBounds) -> OfflineDataset:
        """The data set with its actions clipped; says of how many rows, to which bounds, and whose they are.

        What is clipped to assumed bounds `understand` says.
        """
        from diffrl.data.preprocessing import CLIPPED

        clipped = bounds.clip(dataset)
        said = f"in {str(clipped.metadata[CLIPPED]).partition(';')[0]}" if clipped is not dataset else ""
        if said and not bounds.known:
            return clipped
        said = f"clipped {said}" if said else f"none is clipped, all lie in {bounds}"
        shown_on().print(f"actions: {said}.", markup=False, highlight=False)
        return clipped

    def _place(self) -> tuple[Path, bool]:
        """The copy's path, and whether it is a file, else in Minari's store. Raises UserError for other targets."""
        from diffrl.data import minari as minari_format

        to_write(self.target)
        path = Path(self.target).expanduser()
        if path.suffix in HDF5_SUFFIXES:
            return path, True
        name = self.target.removeprefix("minari:")
        if minari_format.is_id(name) and (name != self.target or "/" in name):
            return minari_format.store() / name, False
        raise UserError(
            f"Cannot write {self.target!r}: expected a path ending in .hdf5 or .h5, or minari:ID, such as "
            "minari:maze2d/umaze-v1 (an id ends in -v and a number)."
        )

    def run(self) -> None:
        """Read and check the data set, write the copy, and print what was written."""
        from diffrl.data import d4rl
        from diffrl.data import minari as minari_format
        from diffrl.data.checks import understand
        from diffrl.data.env_spec import ENV_KEYS, EnvSpec
        from diffrl.data.preprocessing import action_bounds
        from envs.datasets import load_dataset, locate
        from envs.rows import first_rows
        from envs.task import asked_spec

        path, to_file = self._place()
        origin = locate(self.source)
        spare_source(origin.path, path, self.target, "write the copy elsewhere, and move it afterwards.")
        if to_file:
            spare(path, self.force)
        else:
            minari_format.spare(self.target.removeprefix("minari:"), self.force)
        if why := "it is a folder" if to_file and path.is_dir() else no_room(path):
            raise UserError(f"{path} cannot be written: {why}. Choose another place, or make room there.")
        dataset = load_dataset(self.source, self.rows, action_limit=None, infos=True)
        rows = first_rows(self.source, dataset, self.rows)
        if origin.kind == "ogbench":  # whose environment alone does not say which data set it is
            dataset.metadata["source"] = origin.name
        if self.env is not None or self.env_kwargs or self.max_episode_steps is not None:
            spec = EnvSpec.of(dataset.metadata) if self.env is None else None
            spec = asked_spec(self.env, self.env_kwargs, self.max_episode_steps, spec)
            for key in ENV_KEYS:
                dataset.metadata.pop(key, None)
            dataset.metadata.update({} if spec is None else spec.metadata())
        env, unchecked = environment_of(
            self.source,
            dataset,
            self.env,
            rows,
            env_kwargs=self.env_kwargs,
            max_episode_steps=self.max_episode_steps,
        )
        if unchecked:
            shown_on().print(unchecked, markup=False, highlight=False)
        bounds = action_bounds(env, dataset)
        dataset.metadata.update(bounds.metadata)
        if lost := _left_out(origin, dataset, to_file):
            shown_on().print(lost, markup=False, highlight=False)
        if self.clip_actions:
            dataset = self._clipped(dataset, bounds)
        dataset, _, _ = understand(dataset, env, self)
        if to_file:
            d4rl.write(path, dataset, force=True)  # `spare` has looked
            written = len(dataset)
        else:
            benchmark = origin.benchmark
            path = minari_format.write(
                self.target.removeprefix("minari:"),
                dataset,
                self.format,
                reference_scores=None if benchmark is None else benchmark.reference_scores,
                force=self.force,
            )
            written = int(dataset.successors()[1].sum())
        dropped = _dropped(dataset) if written < len(dataset) else ""
        shown_on().print(f"Written: {path}, {written:,} steps{dropped}", highlight=False)


def _dropped(dataset: OfflineDataset) -> str:
    """What a Minari data set has not, in brackets: steps of which nobody knows what followed, and their episodes."""
    import numpy as np

    known = dataset.successors()[1]
    lost = int((np.add.reduceat(known, dataset.episodes()[:, 0], dtype=int) == 0).sum())
    steps = counted(int((~known).sum()), "cut steps without a successor")
    whole = f", {counted(lost, 'episodes')} of nothing else with them" if lost else ""
    return f" ({steps} left out{whole})"


def _left_out(origin: Origin, dataset: OfflineDataset, to_file: bool) -> str:
    """The line that says what of a source's file the copy does not have; "" where it has all."""
    from diffrl.data.others import left_out

    if origin.path is None or not origin.path.is_file() or origin.kind == "ogbench":
        return ""
    copied = [f"infos/{key}" for key in dataset.infos] if to_file else []
    columns, attributes = left_out(origin.path, [*copied, *(f"metadata/{key}" for key in dataset.metadata)])
    parts = [
        f"the {singular(what) if len(names) == 1 else what} {listed(names)}"
        for what, names in (("columns", columns), ("attributes", attributes))
        if names
    ]
    return f"Not copied: {joined(parts)}." if parts else ""


def environment_of(
    name: str, dataset: OfflineDataset, env_id: str | None, rows: int | None, **changes: Any
) -> tuple[gymnasium.Env[Any, Any] | None, str]:
    """The environment of a data set, closed, for what it says of itself; None where it cannot be made; and then why.

    changes: `env_kwargs` and `max_episode_steps` of `open_task`. Raises DiscreteActions where it has such.
    """
    from envs.task import DiscreteActions, open_task

    try:
        env = open_task(name, dataset, env=env_id, rows=rows, **changes)[1]
    except DiscreteActions:
        raise
    except UserError as error:
        return None, f"Not checked against its environment. {error}"
    if env is not None:
        env.close()
    return env, ""
