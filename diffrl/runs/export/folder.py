"""An exported policy's folder: all that acting needs, and how it is opened again, from a disk or from the Hub.

`config.json` says what the agent is, `model.safetensors` has the tensors that acting reads, the scales of observations
and actions, and the goal of an agent that plans to one. `SHA256SUMS` covers both. No file is unpickled, no module is
imported because a file says so, and no environment is made.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agents
from agents.base import Agent
from agents.planning import Planner
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.support import folder as folders
from diffrl.support.errors import UserError, first_line, listed
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
_AGENT, _GOAL = "agent.", "goal"
_SIZE = Annotated[int, Range(1, 10**6)]


@dataclass(frozen=True)
class Settings:
    """What `config.json` holds besides the agent's hyper-parameters."""

    format: str
    version: Annotated[int, Range(1, 1)]
    """Of the folder's form, so that later ones can tell."""
    seed: Seed
    """The training seed, from which the policy's noise is drawn too."""
    step: Natural
    """The training steps behind it."""
    observation_size: _SIZE
    action_size: _SIZE
    tuned_steps: Count | None = None
    """Of a policy whose first denoising steps are a frozen network's: the number of its own, last ones."""


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
    agent: Agent, preprocessing: Preprocessing, step: int, tuned_steps: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` and `model.safetensors` hold of an agent of one seed, after so many steps.

    tuned_steps: see `Settings`.
    """
    seed, *others = agent.seeds
    assert not others
    settings = Settings(FORMAT, 1, seed, step, agent.observation_size, agent.action_size, tuned_steps)
    config = dataclasses.asdict(settings)
    config["agent"] = {"name": agent.config.name, **dataclasses.asdict(agent.config)}
    state, needed = agent.state_dict(), read_in_acting(agent)
    tensors = {f"{_AGENT}{name}": state[name] for name in state if name in needed} | preprocessing.state_dict()
    if isinstance(agent, Planner) and agent.goal is not None:
        tensors[_GOAL] = agent.goal  # in its units: scaled back and forth it would be another one by a rounding
    return config, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write(folder: Path, config: Mapping[str, Any], weights: bytes, more: Mapping[str, bytes]) -> None:
    """Write the files of an exported policy into a new folder, with the checksums of what opening it reads.

    weights: of safetensors. more: other files' content by name, such as the card's.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / WEIGHTS).write_bytes(weights)
    for name, data in more.items():
        (folder / name).write_bytes(data)
    folders.seal(folder, (CONFIG, WEIGHTS))


# --- reading --------------------------------------------------------------------------------------------------------


def open_policy(path: Path, device: str, env: str | None = None) -> tuple[Agent, Preprocessing, int]:
    """The agent of an exported policy, its preprocessing, and the steps that it was trained for.

    env: the id of an environment from which an agent that plans takes its goal. Raises UserError where the folder is
    damaged, or was made by something else.
    """
    settings, config = _read_config(path)
    tensors = folders.read_tensors(path / WEIGHTS)
    with _telling(path), explaining_memory(f"opening the policy in {path}", "a smaller one"):
        agent = config.build(settings.observation_size, settings.action_size, [settings.seed], device)
        if settings.tuned_steps is not None:
            prepare(agent, tuning.DPPOConfig(Path(), tuned_steps=settings.tuned_steps))
        preprocessing = Preprocessing.from_state_dict(tensors)
        _check_scales(preprocessing, settings)
        if isinstance(agent, Planner):
            _prepare(agent, preprocessing, tensors, env, str(path))
        _fill(agent, tensors)
        missing = {name for name in read_in_acting(agent) if _AGENT + name not in tensors}
        if missing:
            raise ValueError(f"it lacks {listed(missing, 3)}")
    return agent, preprocessing, settings.step


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


def _read_config(path: Path) -> tuple[Settings, agents.AgentConfig]:
    """What `config.json` holds. Raises UserError for whatever `contents` does not write."""
    file = path / CONFIG
    values = folders.read_json(file)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(
            f"{path} holds no policy of diffrl: its {CONFIG} does not say `format: {FORMAT}`. `diffrl export RUN --to "
            "FOLDER` makes one."
        )
    if type(values.get("version")) is int and values["version"] > 1:
        raise UserError(
            f"{path} was exported by a newer diffrl, in form {values['version']}; this one reads form 1: update."
        )
    given = values.pop("agent", None)
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise Damaged(file, "is damaged: its `agent` has no name", "Export the policy again.")
    schema = agents.get(given.pop("name"), made=True)
    return read(Settings, values, str(file)), read(schema, given, str(file), "agent.")


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


def _prepare(
    agent: Planner, preprocessing: Preprocessing, tensors: Mapping[str, Tensor], env: str | None, of: str
) -> None:
    """Tell an agent that plans its scales and its goal: the environment's that is named, else the one stored."""
    if env is None:
        agent.prepare(preprocessing, None)
        if agent.reaches_goal and _GOAL in tensors:
            agent.goal = tensors[_GOAL].to(agent.device)
            if agent.goal.shape != (agent.observation_size,):
                raise ValueError(f"its goal is not of {agent.observation_size} dimensions")
        return
    task = Task(env, {}, None, False)
    if (opened := fitting_env(of, task, agent.observation_size, agent.action_size)) is not None:
        opened.close()
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
