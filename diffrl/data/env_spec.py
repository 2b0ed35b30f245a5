"""Which environment data belong to: more than its id. No torch.

Gymnasium's JSON text of a specification (`gymnasium.envs.registration.EnvSpec.to_json`) is what Minari stores as
`eval_env_spec` and `env_spec`, and what our files store as `metadata/env_spec`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffrl.support.errors import DataError, printable, shown

USER, BENCHMARK, FILE = "--env", "the benchmark", "the file's metadata"
"""Where a specification may come from; of a Minari data set it is the name of Minari's field."""
SPECS = ("eval_env_spec", "env_spec")
"""Minari's entries for a data set's environment, the one to evaluate in first."""
ENV_KEYS = ("env_id", "env_spec", "env_origin")
"""What of a data set's metadata is about its environment."""
NO_LIMIT = -1
"""As `max_episode_steps`: episodes have no time limit. `gymnasium.make` has the same number for it."""
LONGEST = 10**7
"""Steps after which an episode is cut, at most: where nothing else ends it, a greater limit would not either."""
_SHOWN, _MOST = 40, 200
"""Characters of an argument's value that are shown; of an id, and of all arguments."""


@dataclass(frozen=True)
class EnvSpec:
    """An environment: Gymnasium's id, and how it differs from what Gymnasium makes of the id alone."""

    id: str
    """Gymnasium's id, or MODULE:ID."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `gymnasium.make`, as JSON holds them."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut; None: as the id is registered; NO_LIMIT: never."""
    wrappers: tuple[Mapping[str, Any], ...] = ()
    """Gymnasium's specifications of the wrappers, the innermost first: `name`, `entry_point`, `kwargs`."""
    entry_point: str | None = None
    """The environment's class as the file names it. It is never imported."""
    origin: str = FILE
    """Where this is from: USER, BENCHMARK, or what holds it."""

    def __post_init__(self) -> None:
        limit = self.kwargs.get("max_episode_steps")
        if isinstance(limit, int) and not isinstance(limit, bool):  # an argument of `gymnasium.make`: one place for it
            kwargs = {key: value for key, value in self.kwargs.items() if key != "max_episode_steps"}
            object.__setattr__(self, "kwargs", kwargs)
            object.__setattr__(self, "max_episode_steps", self.max_episode_steps or limit)
        if (limit := self.max_episode_steps) is not None and limit > LONGEST:
            raise DataError(
                f"An episode of {self.id[:_MOST]} is to be cut after {shown(limit)} steps, which is no time limit; "
                f"expected at most {LONGEST:,}."
            )

    @classmethod
    def from_json(cls, text: str, where: str, origin: str = FILE) -> EnvSpec:
        """The specification from Gymnasium's JSON text. where: what holds it, for errors. Raises DataError."""
        try:
            given = json.loads(text)
            spec = cls._from_dict(given, origin)
        except DataError as error:
            raise DataError(f"{where} is damaged: {error}") from error
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise DataError(
                f"{where} is no specification of an environment, as Gymnasium writes one ({str(error)[:120]}). "
                "Write the data again."
            ) from error
        return spec

    @classmethod
    def _from_dict(cls, given: Any, origin: str) -> EnvSpec:
        if not isinstance(given, dict) or not isinstance(given.get("id"), str) or not given["id"]:
            raise ValueError("it has no `id`")
        kwargs, wrappers = given.get("kwargs") or {}, given.get("additional_wrappers") or []
        limit, entry_point = given.get("max_episode_steps", 0), given.get("entry_point")
        if not isinstance(kwargs, dict):
            raise ValueError("`kwargs` are no keys and values")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < NO_LIMIT):
            raise ValueError("`max_episode_steps` is no number of steps")
        if not isinstance(wrappers, list) or not all(isinstance(w, dict) and "name" in w for w in wrappers):
            raise ValueError("`additional_wrappers` is no list of wrappers")
        return cls(
            given["id"],
            {key: value for key, value in kwargs.items() if key != "render_mode"},  # nobody looks on
            NO_LIMIT if limit is None else limit or None,
            tuple(wrappers),
            entry_point if isinstance(entry_point, str) else None,
            origin,
        )

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> EnvSpec | None:
        """The specification in a data set's metadata; None where they name no environment. Raises DataError."""
        env_id, stored = metadata.get("env_id"), metadata.get("env_spec")
        if not isinstance(env_id, str | None):
            raise DataError(f"env_id in the metadata is {str(env_id)[:60]}; expected text, Gymnasium's id.")
        if stored is not None:
            text = stored if isinstance(stored, str) else json.dumps(stored, default=str)
            origin = metadata.get("env_origin")
            known = isinstance(origin, str) and origin in map(of_minari, SPECS)
            spec = cls.from_json(text, "env_spec in the metadata", str(origin) if known else FILE)
            if env_id in (None, spec.id):  # else somebody has named another environment since
                return spec
        return cls(env_id) if env_id else None

    def metadata(self) -> dict[str, Any]:
        """What a data set's metadata say of this environment: `env_id`, and `env_spec` where that does not tell all."""
        plain = not (self.kwargs or self.max_episode_steps or self.wrappers)
        return {"env_id": self.id} | ({} if plain else {"env_spec": self.to_json()})

    def to_json(self) -> str:
        """Gymnasium's JSON text of this environment, which Minari reads; what is registered here is filled in."""
        registered, limit = _registered(self.id), self.max_episode_steps
        if limit is None and registered is not None:
            limit = registered.max_episode_steps
        known = {} if registered is None else _plain(registered.kwargs)
        entry_point = None if registered is None else registered.entry_point
        order = True if registered is None else registered.order_enforce
        return json.dumps(
            {
                "id": self.id,
                "entry_point": entry_point if isinstance(entry_point, str) else self.entry_point,
                "reward_threshold": None,
                "nondeterministic": False,
                "max_episode_steps": None if limit == NO_LIMIT else limit,
                "order_enforce": order,
                "disable_env_checker": False,
                "kwargs": {**known, **self.kwargs},
                "additional_wrappers": [dict(wrapper) for wrapper in self.wrappers],
                "vector_entry_point": None,
            }
        )

    def changed(self, kwargs: Mapping[str, Any], max_episode_steps: int | None) -> EnvSpec:
        """This environment with some arguments and the time limit replaced; itself where nothing is to be."""
        if not kwargs and max_episode_steps is None:
            return self
        limit = kwargs.get("max_episode_steps") if max_episode_steps is None else max_episode_steps
        limit = self.max_episode_steps if limit is None else limit
        return replace(self, kwargs={**self.kwargs, **kwargs}, max_episode_steps=limit)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `gymnasium.make`, after the id."""
        limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
        return {**self.kwargs, **limit}

    def time_limit(self) -> int | None:
        """Steps after which an episode is cut; None: never, or not known here. Nothing is imported."""
        if self.max_episode_steps is not None:
            return None if self.max_episode_steps == NO_LIMIT else self.max_episode_steps
        registered = _registered(self.id)
        return None if registered is None else registered.max_episode_steps

    def __str__(self) -> str:
        """The id, and in brackets what differs from what is registered: Pendulum-v1(g=2, 50 steps)."""
        registered = _registered(self.id)
        known = {} if registered is None else _plain(registered.kwargs)
        parts = [f"{key}={_short(value)}" for key, value in self.kwargs.items() if known.get(key, ...) != value]
        limit = self.max_episode_steps
        if limit == NO_LIMIT and not (registered and registered.max_episode_steps is None):
            parts.append("no time limit")
        elif limit not in (None, NO_LIMIT) and not (registered and registered.max_episode_steps == limit):
            parts.append(f"{limit} steps")
        if self.wrappers:
            parts.append("in " + ", ".join(str(wrapper["name"])[:_SHOWN] for wrapper in self.wrappers))
        name = printable(self.id, _MOST)
        return f"{name}({printable(', '.join(parts), _MOST)})" if parts else name


def parts_in(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The parts that a data set's observations are made of, as its metadata say; None: they say nothing."""
    stored = metadata.get("observation_parts")
    if isinstance(stored, str):  # HDF5 holds text, arrays and numbers
        stored = stored.split(",")
    return tuple(map(str, stored)) if isinstance(stored, list | tuple) and stored else None


def of_minari(key: str) -> str:
    """The origin of a specification that is in Minari's entry `key`."""
    return f"the data's {key}"


def _registered(env_id: str) -> Any:
    """What Gymnasium knows of an id, importing nothing; None: nothing."""
    import gymnasium

    return gymnasium.registry.get(env_id.rpartition(":")[2])


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Registered arguments as JSON would give them back; those that it cannot hold are left out."""
    found = {}
    for key, value in kwargs.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) else json.dumps(value, default=str).removesuffix(".0")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
