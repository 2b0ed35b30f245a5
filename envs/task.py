"""Tasks: the environment that a policy is evaluated in, and the references that make scores of its returns."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.data.offline import OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import UserError, nearest
from envs import registry


@dataclass(frozen=True)
class Task:
    """The environment that a policy is evaluated in, and the references that make scores of its returns."""

    env_id: str | None
    """Gymnasium's id, or MODULE:ID; None: there is no environment."""
    env_kwargs: dict[str, Any]
    """Further arguments of `gymnasium.make`."""
    reference: str | None
    """The benchmark whose references normalise returns; None: there are none."""
    comparable: bool
    """Whether data and environment are that benchmark's, so that scores compare with published ones."""

    def make(self) -> gymnasium.Env[Any, Any]:
        """Make the environment. Raises UserError where it is unknown or not installed."""
        assert self.env_id is not None
        return make_env(self.env_id, self.env_kwargs)

    def score(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The normalised scores (x100) of returns, elementwise."""
        assert self.reference is not None
        return registry.normalised_score(self.reference, returns)


def make_env(env_id: str, kwargs: dict[str, Any] | None = None) -> gymnasium.Env[Any, Any]:
    """Make an environment as `gymnasium.make` does. Raises UserError, saying what to do, where that fails."""
    if env_id.startswith(("Adroit", "Franka", "AntMaze", "PointMaze")):
        try:
            import gymnasium_robotics
        except ImportError as error:
            raise UserError(
                f"{env_id} needs gymnasium-robotics: `pip install 'diffrl[robotics]'`; or `--env none`."
            ) from error
        gymnasium.register_envs(gymnasium_robotics)
    try:
        with warnings.catch_warnings():
            # Gymnasium recommends v5; D4RL's scores belong to v4, chosen on purpose.
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            return gymnasium.make(env_id, **(kwargs or {}))
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(
            f"There is no environment {env_id!r} in Gymnasium: {nearest(env_id, gymnasium.registry)} "
            "Without an environment: --env none."
        ) from error
    except (ImportError, gymnasium.error.Error) as error:
        raise UserError(f"The environment {env_id!r} cannot be made: {error}. Without it: --env none.") from error


def find_task(name: str, dataset: OfflineDataset, *, env: str | None = None, rows: int | None = None) -> Task:
    """The task of a data set: in `env` ("none": without one), else the benchmark's environment, else the data file's.

    name: the data set's, as the user gave it. rows: the number of first rows used, or None for all: scores of a part
    do not compare with published ones.
    """
    benchmark = registry.get(name) if registry.known(name) else None
    own = None if benchmark is None else benchmark.env_id
    env_id = env or own or dataset.metadata.get("env_id")
    env_id = None if env_id == "none" else env_id
    kwargs = dict(benchmark.env_kwargs) if benchmark is not None and env_id == own else {}
    if benchmark is not None and benchmark.ref_min is not None:
        return Task(env_id, kwargs, benchmark.id, comparable=env_id == own and rows is None)
    return Task(env_id, kwargs, registry.reference_of(env_id) if env_id else None, comparable=False)


def open_task(
    name: str, dataset: OfflineDataset, *, env: str | None = None, rows: int | None = None
) -> tuple[Task, gymnasium.Env[Any, Any] | None]:
    """The task of a data set (`find_task`) and its environment, whose spaces are checked against the data.

    Raises UserError where the spaces do not fit, or the environment cannot be made. Where it was the data file and not
    the user that named it, prints the reason instead and goes on without an environment.
    """
    task = find_task(name, dataset, env=env, rows=rows)
    try:
        return task, _fitting_env(name, task, dataset)
    except UserError as error:
        if env is not None or registry.known(name):
            raise
        console.print(f"[yellow]Going on without an environment. {error}[/]")
        return replace(task, env_id=None), None


def _fitting_env(name: str, task: Task, dataset: OfflineDataset) -> gymnasium.Env[Any, Any] | None:
    """The task's environment. Raises UserError where its spaces are not those of the data."""
    if task.env_id is None:
        return None
    env = task.make()
    for kind, size in (("observation", dataset.observation_size), ("action", dataset.action_size)):
        space = getattr(env, f"{kind}_space")
        if not isinstance(space, gymnasium.spaces.Box) or space.shape != (size,):
            raise UserError(
                f"{task.env_id} and {name} do not fit: the environment's {kind}s are {space}, the data's "
                f"have {size} dimensions. Name the environment the data came from with --env."
            )
    return env


NO_DATA_LIMIT = 1000
"""Steps after which an episode is cut where neither environment nor data say."""


def capped(task: Task, env: gymnasium.Env[Any, Any] | None, dataset: OfflineDataset | None) -> Task:
    """The task with a time limit, where its environment `env` has none of its own: else an episode may never end.

    The limit is the data's longest episode; where no episode of theirs was cut, which says nothing of a limit, at
    least 1,000 steps, as where there are no data. It is part of the task, so that every evaluation has the same, and is
    said.
    """
    if env is None or _time_limit(env) is not None:
        return task
    longest = 0 if dataset is None else int(dataset.episode_lengths().max())
    # The last row ends an episode too, and says nothing.
    cut = dataset is not None and bool(dataset.timeouts[:-1].any())
    steps = longest if cut else max(longest, NO_DATA_LIMIT)
    why = "as long as the data's longest" if steps == longest else "as the data say of no limit either"
    console.print(f"{task.env_id} has no time limit: its episodes are cut after {steps:,} steps, {why}.")
    return replace(task, env_kwargs={**task.env_kwargs, "max_episode_steps": steps})


def _time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """The steps after which an environment cuts an episode, by a wrapper; None: it has none."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return int(env._max_episode_steps)
        env = env.env
    return None
