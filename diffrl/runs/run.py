"""A run's folder: what is written once, at its beginning, and how it is opened again; and what it runs on."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch

from agents import AGENTS, Absent, UnknownAgentError
from diffrl.data.env_spec import LONGEST, NO_LIMIT
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import ActionBounds, Preprocessing
from diffrl.runs import config as configuration
from diffrl.runs import packages
from diffrl.runs.config import TrainConfig
from diffrl.runs.kind import (
    FILES,
    OFFLINE,
    OLD_SETTINGS,
    ONLINE,
    SETTINGS,
    kind_in,
    kind_of,
    no_run,
    of_images,
    read_about,
)
from diffrl.runs.online_config import OnlineConfig
from diffrl.support import schema
from diffrl.support.errors import UserError, said_by
from diffrl.support.files import read_yaml, typed
from diffrl.support.folder import (
    ABOUT,
    IMAGES,
    IMAGES_DISTIL,
    read_tensors,
    seal,
    sealed,
    verified,
    write,
    write_json,
    write_yaml,
)
from diffrl.support.machine import explaining_memory, versions
from diffrl.support.remote import local_folder
from diffrl.support.schema import Count, Limit, Many, Natural, Range, held, kwargs_words
from diffrl.training import checkpoint
from envs.task import NOT_KEPT, Task, capped, fitting_env

_MOST_ORIGINS = 10
"""Of a run's start, its start, and so on: renamed folders may lead in a circle."""


@dataclass(frozen=True)
class _About:
    """What `run.json` says of a policy's run, besides its kind; the fields are those of `Run`."""

    task: dict[str, Any]
    observation_size: Many
    action_size: Many
    value_limit: Limit
    fingerprint: str
    limit: Count | None = None
    counted: Count | None = None
    data_limit: Natural | None = NOT_KEPT
    package: str = ""
    later_packages: dict[str, str] = field(default_factory=dict)


_ABOUT = [one.name for one in dataclasses.fields(_About)]


@dataclass(frozen=True)
class Run:
    """A run's folder, and what `run.json` says of it."""

    path: Path
    config: TrainConfig
    task: Task
    observation_size: int
    action_size: int
    preprocessing: Preprocessing
    value_limit: float
    """A larger mean of the critics' values counts as exploded."""
    fingerprint: str
    """SHA-256 of the data's arrays, so that a resumed run meets the same."""
    kind: str = OFFLINE
    """offline, or how a run that started from another one learns: online, or the algorithm that fine-tunes it."""
    settings: Mapping[str, Any] | None = None
    """Of a run that started from another one: the fields of the configuration of its kind, as YAML has them."""
    limit: int | None = None
    """The steps after which the environment cuts an episode; None: not known, as in old folders."""
    counted: int | None = None
    """The limit by which the episodes of the data were counted (`diffrl.data.checks.Taken`); None: they were not."""
    data_limit: int | None = NOT_KEPT
    """The steps after which the data say that an episode is cut (`envs.task.data_limit`); None: they do not say.

    `envs.task.NOT_KEPT`: not known, as in old folders.
    """
    package: str = ""
    """The package that brought its agent, and its version, such as "mypackage 0.1"; "": diffrl, or not known."""
    later_packages: Mapping[str, str] = field(default_factory=dict)
    """By the step behind which another one, or another version, went on, that one."""

    @property
    def teacher(self) -> str:
        """The name of the agent that a run was distilled from; "": it was not, or does not say."""
        teacher = (self.settings or {}).get("teacher")
        return str(teacher.get("name", "")) if isinstance(teacher, Mapping) else ""

    @property
    def agent_name(self) -> str:
        """What its agent is called: with the kind of its run, or of a student with its teacher's agent."""
        name = self.config.agent.name
        if self.teacher:
            return f"{name}, distilled from {self.teacher}"
        return name if self.kind == OFFLINE else f"{name} {self.kind}"

    @property
    def wrong_critics(self) -> str:
        """A sentence where critics that are not the functions they were trained as choose among the actions; else "".

        Older versions gave a consistency student the critics of an idql teacher, and read them with Mish.
        """
        settings = self.settings or {}
        chosen = getattr(self.config.agent, "act_candidates", 1) > 1
        if not (self.teacher == "idql" and settings.get("to") == "consistency" and chosen):
            return ""
        return (
            "Its critics choose among its actions, and wrongly: they are those of its idql teacher, trained with ReLU, "
            "and this run has them with Mish. Distil its teacher anew."
        )

    def made_by(self, step: float = math.inf) -> str:
        """The package and the version that made a step, by default the newest; "": diffrl, or not known."""
        return [self.package, *(name for _, name in self._later(step))][-1]

    def _later(self, step: float) -> list[tuple[int, str]]:
        """The entries of `later_packages` that made a step up to `step`, in their order."""
        found = [(int(after), name) for after, name in self.later_packages.items() if after.isdecimal()]
        return sorted((after, name) for after, name in found if after < step)

    def other_package(self, step: int | None = None) -> str:
        """A sentence where the agent is of another version of its package here than it was trained with; else "".

        step: of the checkpoint that is used, by default the newest.
        """
        newest = max(checkpoint.steps(self.path), default=0)
        return packages.otherwise(self.path, self.made_by(newest if step is None else step), self.config.agent.name)

    def untrained(self, step: int) -> str:
        """A sentence where the policy that acts is, at this step, still as it was made; else "".

        Of a run that started from another one this is told by that run's folder, while it is there.
        """
        return self._untrained(step, self._origins())

    def _untrained(self, step: int, origins: "Sequence[tuple[Run, int]]") -> str:
        """`untrained`, of a run with these origins."""
        agent = self.config.agent
        if self.kind == OFFLINE and step <= agent.untrained_steps:
            if not agent.untrained_steps:
                return "At step 0 the policy that acts is untrained: as it was made."
            flag = f"--agent.{agent.waits_by.replace('_', '-')}"
            return f"Up to step {agent.untrained_steps:,} the policy that acts is untrained ({flag})."
        if not origins or self.teacher:  # a student is another network
            return ""
        start, at = origins[0]
        if self.kind == ONLINE:
            settings = OnlineConfig.from_dict(self.settings or {}, str(self.path))
            updates = max(step - settings.warm_up, 0) * settings.updates_per_step
            idle = self.idle_updates()
        else:
            updates, idle = step, 0
        if updates > idle or not start._untrained(at, origins[1:]):
            return ""
        return f"At step {step:,} the policy that acts is untrained: it is that of {start.path} at step {at:,}."

    def idle_updates(self) -> int:
        """How many updates of an online run leave the policy as it is: what is left of its agent's `untrained_steps`.

        Those of the offline run that it started from count; where it started from a configuration, there are none.
        """
        waits = self.config.agent.untrained_steps
        if not waits or not (self.settings or {}).get("start_steps"):
            return waits
        origins = self._origins()
        return max(waits - origins[0][1], 0) if origins and origins[0][0].kind == OFFLINE else 0

    def began_untrained(self) -> str:
        """A sentence where the policy goes back to an untrained one that was changed but never trained; else "".

        A fine-tuned or distilled run of an untrained policy, or a run from such a one, has learned on networks as they
        were made. It is told by the folders of the runs before it, while they are there.
        """
        origins, run = self._origins(), self
        for i, (start, at) in enumerate(origins):
            if run.kind == ONLINE:  # which trains a policy as an offline run does
                return ""
            if start._untrained(at, origins[i + 1 :]):
                return f"It goes back to an untrained policy, that of {start.path} at step {at:,}."
            run = start
        return ""

    def _origins(self) -> "list[tuple[Run, int]]":
        """The runs that this one goes back to, its start first, and the least of its seeds' steps in each.

        As far as their folders are there, hold the same data, and can be read.
        """
        found: list[tuple[Run, int]] = []
        run = self
        while (start := run._start()) is not None and len(found) < _MOST_ORIGINS:
            found.append(start)
            run = start[0]
        return found

    def _start(self) -> "tuple[Run, int] | None":
        """The run that this one started from, and the least of its seeds' steps there; None: none can be read."""
        settings = self.settings or {}
        path, steps = settings.get("start_run") or settings.get("offline_run"), settings.get("start_steps")
        if not (isinstance(path, str) and isinstance(steps, Sequence) and steps and (Path(path) / ABOUT).is_file()):
            return None
        try:
            start = Run.read(path, absent=isinstance(self.config.agent, Absent))
        except UserError:
            return None
        at = min(held(step, Natural, f"start_steps in {self.path / SETTINGS}") for step in steps)
        return (start, at) if start.fingerprint == self.fingerprint else None  # else it is another run by now

    def unfinished(self) -> str:
        """A sentence where the run has made fewer steps than it is for, by its newest checkpoint; else ""."""
        made = max(checkpoint.steps(self.path), default=0)
        if made >= self.config.steps:
            return ""
        return f"Not finished: the last checkpoint is at step {made:,} of {self.config.steps:,}."

    def within(
        self,
        env: str | None,
        env_kwargs: Sequence[str] | Mapping[str, Any],
        max_episode_steps: int | None,
        quiet: bool = False,
    ) -> "Run":
        """This run in the environment that --env, --env-kwargs and --max-episode-steps name; itself without them.

        quiet: do not say after how many steps its episodes are cut. Raises UserError where that environment cannot be
        made, or does not fit the run's policies.
        """
        task = self.task.changed(env, kwargs_words(env_kwargs), max_episode_steps)
        if task is self.task:
            return self
        if (opened := fitting_env(str(self.path), task, self.observation_size, self.action_size)) is not None:
            task = capped(task, opened, self.data_limit, quiet)
            opened.close()
        return dataclasses.replace(self, task=task)

    def write(self) -> None:
        """Create the folder and write what never changes: configuration, sizes, preprocessing, versions."""
        about = {
            "kind": self.kind,
            "task": dataclasses.asdict(self.task),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "value_limit": self.value_limit,
            "fingerprint": self.fingerprint,
            "limit": self.limit,
            "counted": self.counted,
            "data_limit": self.data_limit,
            "versions": versions(),
        }
        if (name := self.config.agent.name) not in AGENTS:
            about["package"] = packages.of_agent(name) or self.package
        # What run.json stands beside is the run's own; with its checksums the folder is whole.
        write_json(self.path / ABOUT, about)
        self.write_config()
        write(self.path / "preprocessing.safetensors", safetensors.torch.save(self.preprocessing.state_dict()))
        if self.settings is not None:
            write_yaml(self.path / SETTINGS, self.settings)
        seal(self.path, (ABOUT, *FILES))

    def action_bounds(self, dataset: OfflineDataset | None) -> ActionBounds:
        """The bounds of actions that the run scales by; known where its environment or the data, if given, have any."""
        ends = torch.tensor([[-1.0], [1.0]]).expand(2, self.action_size)
        low, high = self.preprocessing.actions.inverse(ends).numpy()
        known = self.task.env_id is not None or (dataset is not None and dataset.stored_bounds() is not None)
        return ActionBounds(low, high, f"the bounds of {self.task.env_id or 'the data set'}", known)

    def write_config(self) -> None:
        """Write `config.yaml`: at the beginning, and when a resumed run is given more steps."""
        config = dataclasses.replace(self.config, out=self.path.absolute())
        write_yaml(self.path / "config.yaml", configuration.to_dict(config))

    def goes_on(self, step: int) -> None:
        """Note down in the folder that the run goes on behind `step`, as it is configured now, and by which package.

        What a cut has left behind the checkpoint of that step is cleaned away.
        """
        self.seal()
        self.write_config()
        here = packages.of_agent(self.config.agent.name)
        later = {str(after): name for after, name in self._later(step)}
        if here != self.made_by(step):
            later[str(step)] = here
        if later != self.later_packages:
            write_json(self.path / ABOUT, read_about(self.path) | {"later_packages": later})
        checkpoint.clean(self.path, step)

    def seal(self) -> None:
        """Give the folder checksums, where an older version has made it without."""
        if not sealed(self.path):
            own = (*FILES, *OLD_SETTINGS.values(), "scores.json", "preferences.safetensors")
            seal(self.path, (ABOUT, *own))

    @classmethod
    def read(cls, path: Path | str, absent: bool = False) -> "Run":
        """Open a run's folder; of one at an address, a copy of it here. Raises UserError where it is none.

        absent: one whose agent's package is not here is opened too, to be shown: see `agents.Absent`.
        """
        path = local_folder(path)
        needed = ("config.yaml", "run.json", "preprocessing.safetensors")
        missing = [name for name in needed if not (path / name).is_file()]
        if "config.yaml" in missing and (path / "finetune.yaml").is_file():
            raise of_images(path, IMAGES)
        if "config.yaml" in missing and (path / ABOUT).is_file() and kind_of(path) == IMAGES_DISTIL:
            raise of_images(path, IMAGES_DISTIL)
        if missing:
            raise UserError(no_run(path, missing))
        about = read_about(path)
        kind = kind_in(path, about)
        verified(path / "config.yaml")
        tensors = read_tensors(path / "preprocessing.safetensors")
        old = next((file for name, file in OLD_SETTINGS.items() if about.get(name)), None)
        file = old if "kind" not in about else SETTINGS if kind != OFFLINE else None
        if file is not None and (path / file).exists():
            verified(path / file)
        try:
            told = schema.read(
                _About, {name: about[name] for name in _ABOUT if name in about}, f"{path} is damaged: {ABOUT}"
            )
            task = Task(**told.task)
            limits = Annotated[int, Range(NO_LIMIT, LONGEST)] | None
            held(task.max_episode_steps, limits, f"{path} is damaged: {ABOUT}: task.max_episode_steps")
            preprocessing = Preprocessing.from_state_dict(tensors)
            sizes = told.observation_size, told.action_size
            for part, size in zip((preprocessing.observations, preprocessing.actions), sizes, strict=True):
                if {tuple(part.shift.shape), tuple(part.scale.shape)} != {(size,)}:
                    raise ValueError(f"run.json and preprocessing.safetensors tell of other sizes: {size:,} is one")
            return cls(
                path,
                dataclasses.replace(_configured(path, told.package, absent), out=path),
                task,
                *sizes,
                preprocessing,
                told.value_limit,
                told.fingerprint,
                kind,
                None if file is None else read_yaml(path / file),
                told.limit,
                told.counted,
                told.data_limit,
                told.package,
                told.later_packages,
            )
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file without a checksum leads to
            raise UserError(f"{path} is damaged: {said_by(error)}. Restore its files from a copy.") from error


def _configured(path: Path, package: str, absent: bool) -> TrainConfig:
    """The configuration of a run, see `Run.read`. package: what brought its agent; "" for one of diffrl's own."""
    try:
        return configuration.load(path / "config.yaml", of_run=True, absent=absent)
    except UnknownAgentError as error:
        raise UnknownAgentError(f"{error} The run was made with {package}." if package else str(error)) from error


def lowering_memory(config: TrainConfig, run: Path | None, kind: str = OFFLINE) -> AbstractContextManager[None]:
    """Tell, as a UserError, what to lower where memory runs out in the block. run: its folder, once there is one.

    kind: the run's; one that starts from a trained policy has its width, and a batch size of its own.
    """
    n = len(config.seeds)
    stack = f"the {n} seeds" if n > 1 else "the one seed"
    fewer = "fewer --seeds, " if n > 1 else ""
    own = kind in (OFFLINE, ONLINE)
    smaller = "a smaller --agent.batch-size or a smaller --agent.width" if own else "a smaller --batch-size"

    def kept() -> str:
        saved = [] if run is None else checkpoint.steps(run)
        if not saved:
            return ""
        goes_on = f"`diffrl resume {typed(run or '')}` goes on from step {saved[-1]}"
        return f"Nothing saved is lost: {goes_on}, where more memory is free"

    return explaining_memory(
        f"training {stack} ({', '.join(map(str, config.seeds))})",
        f"{fewer}{smaller} in a new run",
        kept,
    )
