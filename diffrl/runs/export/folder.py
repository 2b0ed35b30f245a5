"""An exported policy's folder: all that acting needs, and how it is opened again, from a disk or from the Hub.

`config.json` says what the agent is, `model.safetensors` has the tensors that acting reads, the scales of observations
and actions, and the goal of an agent that plans to one. `SHA256SUMS` covers both and the graph, but not the card, which
people are to edit. No file is unpickled, no module is imported because a file says so, and no environment is made.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.markup import escape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agents
from agents.base import Agent
from agents.planning import Planner
from diffrl.data.observations import Part
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.runs import packages
from diffrl.support import folder as folders
from diffrl.support.errors import UserError, first_line, listed, shown
from diffrl.support.folder import Damaged
from diffrl.support.machine import explaining_memory
from diffrl.support.schema import Count, Natural, Range, Seed, read
from diffrl.support.seeds import generator_at
from diffrl.tuning import config as tuning
from diffrl.tuning.target import prepare
from envs.task import Task, fitting_env

CONFIG, WEIGHTS, CARD, GRAPH = "config.json", "model.safetensors", "README.md", "policy.onnx"
"""The files of an exported policy; the graph is there where it was asked for."""
READ = (CONFIG, WEIGHTS, folders.SUMS)
"""The files that opening one reads."""
FORMAT = "diffrl-policy"
"""What `format` in `config.json` says."""
_AGENT, _GOAL, _PARTS = "agent.", "goal", "observation_parts"
_SIZE = Annotated[int, Range(1, 10**6)]


@dataclass(frozen=True)
class Settings:
    """What `config.json` holds besides the agent's hyper-parameters."""

    format: str
    version: Annotated[int, Range(1, 2)]
    """Of the folder's form, so that older readers can tell: 2 where it says more than form 1 does, see below."""
    seed: Seed
    """The training seed, from which the policy's noise is drawn too."""
    step: Natural
    """The training steps behind it."""
    observation_size: _SIZE
    action_size: _SIZE
    tuned_steps: Count | None = None
    """Of a policy whose first denoising steps are a frozen network's: the number of its own, last ones."""
    needs: str | None = None
    """Form 2: the package that the agent is from and its version, such as "mypackage 0.1"; None: it is diffrl's."""


@dataclass(frozen=True)
class Opened:
    """An exported policy, put together again."""

    agent: Agent
    preprocessing: Preprocessing
    step: int
    """The training steps behind it."""
    parts: Sequence[Part] | Callable[[], Sequence[Part]] = ()
    """Those of its environment's observations, or what finds them when they are needed; (): it gives vectors."""


def is_exported(path: Path) -> bool:
    """Whether a folder holds an exported policy and no run."""
    return (path / CONFIG).is_file() and not (path / folders.ABOUT).exists()


# --- what acting reads ----------------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In its block, notes down the memory that operations are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        self.storages |= {tensor.untyped_storage().data_ptr() for tensor in given}
        return func(*args, **(kwargs or {}))


def read_in_acting(agent: Agent) -> set[str]:
    """The names, in the agent's `state_dict`, of the tensors that `act` reads: it acts once, on zeros.

    Optimisers, and networks that serve training alone, such as critics of an agent whose actor decides, are not among
    them.
    """
    zeros = torch.zeros(agent.n_seeds, 1, agent.observation_size, device=agent.device)
    generator = generator_at(0, device=agent.device)
    with _Reads() as reads:
        agent.act(zeros, generator)
    return {name for name, tensor in agent.state_dict().items() if _lies_in(tensor, reads.storages)}


def _lies_in(tensor: Tensor, storages: set[int]) -> bool:
    return tensor.untyped_storage().data_ptr() in storages


# --- writing --------------------------------------------------------------------------------------------------------


def contents(
    agent: Agent,
    preprocessing: Preprocessing,
    step: int,
    tuned_steps: int | None,
    needs: str = "",
    parts: Sequence[Part] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` and `model.safetensors` hold of an agent of one seed, after so many steps.

    tuned_steps, needs: see `Settings`. parts: those that its environment's observations are made of, in the order in
    which they make the vector; (): it gives vectors.
    """
    seed, *others = agent.seeds
    assert not others
    form = 2 if needs or parts else 1
    settings = Settings(FORMAT, form, seed, step, agent.observation_size, agent.action_size, tuned_steps, needs or None)
    config = dataclasses.asdict(settings)
    if not needs:
        del config["needs"]
    if parts:
        config[_PARTS] = [{"path": list(part.path), "shape": list(part.shape)} for part in parts]
    config["agent"] = {"name": agent.config.name, **dataclasses.asdict(agent.config)}
    state, needed = agent.state_dict(), read_in_acting(agent)
    tensors = {f"{_AGENT}{name}": state[name] for name in state if name in needed} | preprocessing.state_dict()
    if isinstance(agent, Planner) and agent.goal is not None:
        tensors[_GOAL] = agent.goal  # in its units: scaled back and forth it would be another one by a rounding
    return config, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write(folder: Path, config: Mapping[str, Any], weights: bytes, more: Mapping[str, bytes]) -> None:
    """Write the files of an exported policy into a new folder, with the checksums of all but the card.

    weights: of safetensors. more: other files' content by name, such as the card's.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / WEIGHTS).write_bytes(weights)
    for name, data in more.items():
        (folder / name).write_bytes(data)
    folders.seal(folder, (CONFIG, WEIGHTS, GRAPH))


# --- reading --------------------------------------------------------------------------------------------------------


def open_policy(path: Path, device: str, env: str | None = None) -> Opened:
    """The policy of an exported folder.

    env: the id of another environment, which has to fit; an agent that plans takes its goal from it. Raises UserError
    where the folder is damaged, or was made by something else.
    """
    settings, config, parts = _read_config(path)
    found: Sequence[Part] | Callable[[], Sequence[Part]] = parts
    task: Task | None = None
    if env is not None:
        keys = tuple(dict.fromkeys(part.path[0] for part in parts if isinstance(part.path[0], str)))
        task = Task(None, {}, None, False, observation_parts=keys or None).changed(env, (), None)
        if (opened := fitting_env(str(path), task, settings.observation_size, settings.action_size)) is not None:
            opened.close()
            found = task.parts
    tensors = folders.read_tensors(path / WEIGHTS)
    with _telling(path), explaining_memory(f"opening the policy in {path}", "a smaller one"):
        agent = config.build(settings.observation_size, settings.action_size, [settings.seed], device)
        if settings.tuned_steps is not None:
            prepare(agent, tuning.DPPOConfig(Path(), tuned_steps=settings.tuned_steps))
        preprocessing = Preprocessing.from_state_dict(tensors)
        _check_scales(preprocessing, settings)
        if isinstance(agent, Planner):
            _prepare(agent, preprocessing, tensors, task)
        _fill(agent, tensors)
        missing = {name for name in read_in_acting(agent) if _AGENT + name not in tensors}
        if missing:
            raise ValueError(f"it lacks {listed(missing, 3)}")
    return Opened(agent, preprocessing, settings.step, found)


def check_is(name: Path | str, seed: int, step: int, wanted: int | None, which: str | int) -> None:
    """Raise UserError where an exported policy, of one seed at one step, is not the one that is wanted."""
    if wanted not in (None, seed):
        raise UserError(f"{name} is the exported policy of seed {seed} alone, and seed {wanted} is asked for.")
    if which == "best":
        raise UserError(f"{name} is the exported policy of step {step} alone; no evaluation says that it is the best.")
    if which != "last" and not str(which).isdigit():
        raise UserError(f"{name} is an exported policy, without a checkpoint {which!r}: leave out which.")
    if str(which).isdigit() and int(which) != step:
        raise UserError(f"{name} is the exported policy of step {step} alone, and step {which} is asked for.")


def _read_config(path: Path) -> tuple[Settings, agents.AgentConfig, tuple[Part, ...]]:
    """What `config.json` holds. Raises UserError for whatever `contents` does not write."""
    file = path / CONFIG
    values = folders.read_json(file)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(
            f"{path} holds no policy of diffrl: its {CONFIG} does not say `format: {FORMAT}`. `diffrl export RUN --to "
            "FOLDER` makes one."
        )
    if type(values.get("version")) is int and values["version"] > 2:
        raise UserError(
            f"{path} was exported by a newer diffrl, in form {values['version']}; this one reads forms 1 and 2: update."
        )
    if values.get("version") == 1 and (beyond := {_PARTS, "needs"} & values.keys()):
        raise Damaged(file, f"is damaged: form 1 has no {' and no '.join(sorted(beyond))}", "Export the policy again.")
    given, listed_parts = values.pop("agent", None), values.pop(_PARTS, [])
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise Damaged(file, "is damaged: its `agent` has no name", "Export the policy again.")
    settings = read(Settings, values, str(file))
    name = given.pop("name")
    try:
        schema = agents.get(name, made=True)
    except UserError as error:
        if settings.needs is None:
            raise
        raise UserError(f"{error} {path} needs {shown(settings.needs)[1:-1]}, by its {CONFIG}.") from error
    if said := packages.otherwise(path, shown(settings.needs or "")[1:-1], name):
        folders.say_once(escape(said))
    try:
        if not isinstance(listed_parts, list):
            raise TypeError("expected a list")
        parts = tuple(_part(one) for one in listed_parts)
        if parts and sum(math.prod(part.shape) for part in parts) != settings.observation_size:
            raise ValueError(f"they have not {settings.observation_size} numbers in all")
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(file, f"is damaged: its {_PARTS} are none ({first_line(error)})", "Export it again.") from error
    return settings, read(schema, given, str(file), "agent."), parts


def _part(given: Any) -> Part:
    """A part of observations as `contents` writes it. Raises ValueError, TypeError or KeyError for anything else."""
    path, shape = given["path"], given["shape"]
    if not (isinstance(path, list) and isinstance(shape, list)):
        raise TypeError("expected a path and a shape as lists")
    if not (path and all(type(key) in (str, int) for key in path) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError("expected a path of keys and a shape")
    return Part(tuple(path), tuple(shape))


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """A block that puts together what files hold: what does not fit there becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error).rstrip(".")
        raise UserError(
            f"{path} is no whole policy of diffrl: its {WEIGHTS} does not fit its {CONFIG} ({why}). Export it again."
        ) from error


def _check_scales(preprocessing: Preprocessing, settings: Settings) -> None:
    sizes = {"observations": settings.observation_size, "actions": settings.action_size}
    for name, size in sizes.items():
        part: Normaliser = getattr(preprocessing, name)
        if part.shift.shape != (size,) or part.scale.shape != (size,):
            raise ValueError(f"its scales of {name} are not of {size} dimensions")


def _prepare(agent: Planner, preprocessing: Preprocessing, tensors: Mapping[str, Tensor], task: Task | None) -> None:
    """Tell an agent that plans its scales and its goal: that of the environment that is named, else the one stored."""
    if task is None:
        agent.prepare(preprocessing, None)
        if agent.reaches_goal and _GOAL in tensors:
            agent.goal = tensors[_GOAL].to(agent.device)
            if agent.goal.shape != (agent.observation_size,):
                raise ValueError(f"its goal is not of {agent.observation_size} dimensions")
        return
    goal = task.goal_state if agent.reaches_goal else None
    agent.prepare(preprocessing, None if goal is None else torch.from_numpy(goal))
    agent.check_ready()


@torch.no_grad()
def _fill(agent: Agent, tensors: Mapping[str, Tensor]) -> None:
    """Copy the stored tensors into the agent; what is not stored, as acting does not read it, becomes NaN.

    Raises ValueError for a name that the agent has not, and for another shape or type.
    """
    state = agent.state_dict()
    for name, stored in tensors.items():
        if not name.startswith(_AGENT):
            continue
        own = state.pop(name.removeprefix(_AGENT), None)
        if own is None:
            raise ValueError(f"there is no {name[:80]} in such an agent")
        if own.shape != stored.shape or own.dtype != stored.dtype:
            raise ValueError(
                f"{name[:80]} is {stored.dtype} {tuple(stored.shape)}; expected {own.dtype} {tuple(own.shape)}"
            )
        own.copy_(stored)
    for unread in state.values():
        if unread.is_floating_point():
            unread.fill_(float("nan"))
