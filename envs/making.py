"""Environments made as their specifications say; what cannot be made so is refused by name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.data import observations as flattening
from diffrl.data.env_spec import EnvSpec
from diffrl.support.errors import DataError, UserError, nearest, said_by

_WITHOUT = "Training can do without one: --env none."
_INSTEAD = f"Name an environment with --env ID. {_WITHOUT}"
_REBUILT = (
    "ClipAction",
    "ClipReward",
    "DelayObservation",
    "DtypeObservation",
    "FilterObservation",
    "FlattenObservation",
    "FrameStackObservation",
    "MaxAndSkipObservation",
    "OrderEnforcing",
    "PassiveEnvChecker",
    "RepeatAction",
    "RescaleAction",
    "RescaleObservation",
    "ReshapeObservation",
    "StickyAction",
    "TimeAwareObservation",
    "TimeLimit",
)
"""Gymnasium's wrappers whose arguments tell all that they do."""
_ONLY_WATCH = ("HumanRendering", "RecordEpisodeStatistics", "RecordVideo", "RenderCollection")
"""Gymnasium's wrappers that change no observation, reward or end: they are left out."""
_OF_ROBOTICS = (
    *("Adroit", "AntMaze", "Fetch", "Franka", "Hand", "PointMaze"),
    *("kitchen-", "pen-", "door-", "hammer-", "relocate-"),
)
"""How ids begin whose environments are Gymnasium-Robotics', or ours on top of them."""
_LARGE = ("cube-", "scene-", "puzzle-", "visual-", "kitchen-", "FrankaKitchen-")
"""How ids begin, after "ogbench/", whose simulators hold meshes and pictures.

As measured, one takes 65 to 180 MiB and .13 to .7 s of a CPU to make; one of any other benchmark's under 20 MiB.
"""
_STATISTICS = ("NormalizeObservation", "NormalizeReward")


class CannotRebuild(UserError):
    """The environment that a file names cannot be rebuilt from what the file says."""


def check_rebuilt(spec: EnvSpec) -> None:
    """Raise CannotRebuild for what a file must not say, or what does not suffice, naming it and what to do.

    A file imports no module (MODULE:ID, but for ours), reads no other file (an argument with a path), and is not taken
    for another environment (a class of another name behind a known id).
    """
    module, _, env_id = spec.id.rpartition(":")
    if module not in ("", "envs"):
        raise CannotRebuild(
            f"The data name the environment {spec.id[:80]!r}, which would import the module {module[:60]!r}: a file "
            f"may not. If you trust it, say so: --env {spec.id[:80]}. {_WITHOUT}"
        )
    registered = gymnasium.registry.get(env_id)
    known = {} if registered is None else registered.kwargs
    for key, value in spec.kwargs.items():
        path = next((text for text in _texts(value) if "/" in text or "\\" in text or text.startswith("~")), None)
        if path is not None and known.get(key) != value:
            raise CannotRebuild(
                f"The data's environment {spec.id} has {key}={path[:60]!r}, a file's name, which is not followed from "
                f"data. If you trust it: --env-kwargs {key}=PATH; or name another: --env ID. {_WITHOUT}"
            )
    ours = None if registered is None else registered.entry_point
    if spec.entry_point and isinstance(ours, str) and _class(ours) != _class(spec.entry_point):
        raise CannotRebuild(
            f"The data's environment {spec.id} was {spec.entry_point[:80]!r}; here that id is {ours!r}. {_INSTEAD}"
        )
    check_wrappers(spec.id, spec.wrappers)


def check_wrappers(env_id: str, wrappers: Sequence[Mapping[str, Any]]) -> None:
    """Raise CannotRebuild for a wrapper that cannot be put around an environment again, naming it."""
    for wrapper in wrappers:
        name, kwargs = str(wrapper.get("name")), wrapper.get("kwargs")
        theirs = str(wrapper.get("entry_point", "")).startswith("gymnasium.wrappers.")
        if theirs and name in _ONLY_WATCH:
            continue
        why = "holds code of its own"
        if theirs and name in _STATISTICS:
            why = "has running statistics, which are not stored"
        elif theirs and name in _REBUILT:
            if isinstance(kwargs, dict):
                continue
            why = "has no recorded arguments"
        raise CannotRebuild(
            f"The data's environment {env_id} cannot be rebuilt: its wrapper {name[:60]} {why}. {_INSTEAD}"
        )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value as JSON holds it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (*_texts(key), *_texts(part))


def _class(entry_point: str) -> str:
    return entry_point.rpartition(":")[2]


def register_robotics() -> None:
    """Have Gymnasium know the environments of Gymnasium-Robotics. Raises ImportError where it is not installed.

    At its import it prints what the package farama_notifications has for its version. A notice on Adroit alone, which
    advises to go back to 1.2.0, is left out: it would come with every environment, and what it is about is mended in
    `envs.adroit`, or said by `otherwise_rewarded`.
    """
    with contextlib.suppress(ImportError):
        from farama_notifications import notifications

        of_robotics = notifications.get("gymnasium_robotics", {})
        for version in [version for version, notice in of_robotics.items() if notice.startswith("AdroitHand")]:
            del of_robotics[version]
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)


def otherwise_rewarded(spec: EnvSpec) -> str:
    """A sentence where an environment is Gymnasium-Robotics' own of a task that D4RL rewards otherwise; else ""."""
    for task in ("door", "hammer", "relocate"):
        if spec.id == f"AdroitHand{task.capitalize()}-v1" and spec.kwargs.get("reward_type", "dense") == "dense":
            return (
                f"{spec.id} rewards the distance between palm and object, which D4RL punishes: --env {task}-human-v1 "
                "does as D4RL."
            )
    return ""


def make_env(env_id: str, kwargs: Mapping[str, Any] | None = None) -> gymnasium.Env[Any, Any]:
    """Make an environment as `gymnasium.make` does. Raises UserError, saying what to do, where that fails."""
    if env_id.startswith(_OF_ROBOTICS):
        try:
            register_robotics()
        except ImportError as error:
            raise UserError(
                f"{env_id} needs gymnasium-robotics: `pip install 'diffrl[robotics]'`. {_WITHOUT}"
            ) from error
    try:
        with warnings.catch_warnings():
            # Gymnasium recommends v5; D4RL's scores belong to v4, chosen on purpose.
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            return gymnasium.make(env_id, **(kwargs or {}))
    except UserError:  # an environment of ours says what is wrong
        raise
    except Exception as error:
        if isinstance(error, gymnasium.error.UnregisteredEnv) and not _registered(env_id):
            raise UserError(f"{_unknown(env_id)} {_WITHOUT}") from error
        if not kwargs and not isinstance(error, ImportError | gymnasium.error.Error):
            raise
        given = ", ".join(kwargs or ())
        hint = f" Check its arguments ({given[:200]}): --env-kwargs KEY=VALUE." if given else ""
        said = str(error) if isinstance(error, ImportError | gymnasium.error.Error) else said_by(error)[:300]
        said = said.rstrip(".")
        raise UserError(f"The environment {env_id!r} cannot be made: {said}.{hint} {_WITHOUT}") from error


def _registered(env_id: str) -> bool:
    """Whether Gymnasium knows an id, or of one without a version the id of a version."""
    name = env_id.rpartition(":")[2]
    return name in gymnasium.registry or any(known.rpartition("-v")[0] == name for known in gymnasium.registry)


def _unknown(env_id: str) -> str:
    """What is said of an id that Gymnasium does not know; of MODULE:ID, what the module has registered."""
    module, _, name = env_id.rpartition(":")
    package = module.partition(".")[0]
    if package:
        own = [known for known, spec in gymnasium.registry.items() if _package(spec.entry_point) == package]
        if own:
            return f"{module} registers no environment {name!r}: {nearest(name, own, group=f'{module}:')}"
        return f"{module} registers no environment {name!r}, nor does Gymnasium: {nearest(name, gymnasium.registry)}"
    return (
        f"There is no environment {env_id!r} in Gymnasium: {nearest(env_id, gymnasium.registry)} One of your own is "
        "named MODULE:ID, where importing MODULE registers it."
    )


def _package(entry_point: Any) -> str:
    """The package that an environment's class is in."""
    where = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return str(where).partition(":")[0].partition(".")[0]


MAX_ENVIRONMENTS = 400
"""How many simulators an evaluation holds at once, where they are small."""


def max_environments(env_id: str) -> int:
    """How many simulators of `env_id` an evaluation holds at once: 400, or 10 where one takes some 100 MiB."""
    large = env_id.rpartition(":")[2].removeprefix("ogbench/").startswith(_LARGE)
    return 10 if large else MAX_ENVIRONMENTS


def make(spec: EnvSpec, parts: Sequence[str] | None = None) -> gymnasium.Env[Any, Any]:
    """Make the environment of a specification, with its wrappers; observations that are no vectors are flattened.

    parts: those of dictionary observations that are taken, see `diffrl.data.observations.flatten`. Raises UserError
    where the environment is unknown, not installed, or cannot be made as the specification says.
    """
    check_wrappers(spec.id, spec.wrappers)
    env = make_env(spec.id, spec.arguments())
    already = () if env.spec is None else env.spec.additional_wrappers  # what the id itself brings
    names = [wrapper["name"] for wrapper in spec.wrappers]
    done = len(already) if names[: len(already)] == [wrapper.name for wrapper in already] else 0
    for wrapper in spec.wrappers[done:]:
        if wrapper["name"] in _ONLY_WATCH:
            continue
        try:
            build: Callable[..., gymnasium.Env[Any, Any]] = getattr(gymnasium.wrappers, wrapper["name"])
            env = build(env, **wrapper["kwargs"])
        except Exception as error:
            raise CannotRebuild(
                f"The wrapper {wrapper['name']} of {spec.id} cannot be rebuilt: {said_by(error)[:200]}. {_INSTEAD}"
            ) from error
    space = env.observation_space
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return env
    try:
        return FlatObservation(env, parts)
    except (DataError, KeyError, TypeError, ValueError) as error:
        if parts is None:
            return env  # such as discrete observations, which the caller refuses
        raise UserError(
            f"The data's observations are made of {', '.join(parts)[:200]}, but those of {spec.id} are "
            f"{str(space)[:200]}. Name the environment the data came from with --env ID."
        ) from error


class FlatObservation(gymnasium.ObservationWrapper[NDArray[np.float32], Any, Any]):
    """Observations as vectors (O,) float32, as `diffrl.data.observations.flatten` makes them of a file's.

    parts: of a dictionary, the keys that are taken, in this order; None: all, in Gymnasium's order.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], parts: Sequence[str] | None = None) -> None:
        super().__init__(env)
        self._space, self._parts = env.observation_space, parts
        if parts is not None and not isinstance(self._space, gymnasium.spaces.Dict):
            raise DataError("the observations have no parts")
        flat: gymnasium.spaces.Space[Any] = flattening.flat_space(self._space, parts)
        self.observation_space = flat

    @property
    def parts(self) -> tuple[flattening.Part, ...]:
        """The arrays that an observation is made of, in this order."""
        return flattening.parts_of(self._space, self._parts)

    @override
    def observation(self, observation: Any) -> NDArray[np.float32]:
        flat: NDArray[np.float32] = flattening.flatten_one(self._space, observation, self._parts)
        return flat
