"""What a training run is made of: one frozen dataclass, strict YAML, the published configurations. No torch.

What the user leaves open, a field that is None, is chosen by the machine: see `chosen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import agents
from agents import AgentConfig
from diffrl.data.config import ActionUnits, TimeLimitTerminals
from diffrl.runs import shipped as published
from diffrl.runs import workers as crew
from diffrl.runs.shipped import shipped as shipped
from diffrl.runs.shipped import ships as ships
from diffrl.support.errors import UserError, closest, joined
from diffrl.support.files import read_yaml, to_yaml, typed
from diffrl.support.folder import ABOUT
from diffrl.support.machine import choose_compiling, cores
from diffrl.support.schema import (
    Count,
    Many,
    Range,
    Seed,
    Several,
    check,
    kwargs_words,
    parse_kwargs,
    read,
    refusal,
    refuse_others,
)
from diffrl.training import sinks

if TYPE_CHECKING:
    from diffrl.training.checkpoint import Checkpoint
    from envs.task import Task

Seeds = Annotated[tuple[Seed, ...], Range(1, 10_000)]
"""One seed or several."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run, each of its settings.

    Made by hand, fields that are not given have the defaults below, and the agent those of its class. `diffrl train`
    takes what ships for the agent and the data set, where something does: in Python that is
    diffrl.configuration("diffusion_ql", dataset="maze2d-umaze-v1"), or diffrl.train with the same arguments.
    """

    dataset: str
    """An id of D4RL's, OGBench's or a package's (`diffrl data list`), a Minari id, or the path or address of a file
    (HDF5, npz). By default the configuration's."""
    agent: AgentConfig
    """The algorithm's hyper-parameters."""
    env: str | None = None
    """Gymnasium id of the environment to evaluate in, MODULE:ID for one of your own, or none; by default the
    benchmark's, or what the file names."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of that environment, by default its own: KEY=VALUE each, such as g=2.0 (values as JSON, else text)."""
    max_episode_steps: Count | None = None
    """Another time limit of its episodes than its own, which is the default."""
    seeds: Seeds = (0,)
    """Seeds, trained side by side, each with networks of its own: on a GPU as one stack, on a CPU see workers. A stack
    draws its random numbers together, so a seed's scores depend on the seeds beside it."""
    steps: Count = 1_000_000
    """Training steps in all, also when resuming."""
    rows: Annotated[int, Range(2, 10**10)] | None = None
    """Use only so many rows, the first of the data set (a maze2d set that is missing is generated with this many); by
    default all."""
    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the environment's limit of steps, or marked as timeouts too, are timeouts;
    terminals: they are true ends. By default they are taken as true ends, and what looks odd is said."""
    actions: ActionUnits | None = None
    """normalised: the data's actions are scaled to [-1, 1], where its environment has other bounds; environment: they
    are in its units. By default they are taken to be in its units, and what looks odd is said."""
    cut_contradictions: bool = False
    """Cut an episode where a stored next observation contradicts the next row."""
    eval_every: Count = 50_000
    """Steps between evaluations, each followed by a checkpoint."""
    eval_episodes: Many = 10
    """Episodes an evaluation, for each seed."""
    eval_workers: Annotated[int, Range(0, 10_000)] | None = None
    """Processes that evaluate while training goes on; 0: training waits for each evaluation. By default, in a run of
    5,000 steps or more: as many as cores are left, at most one a seed; in a shorter run 0. No score depends on it."""
    log_every: Count = 500
    """Steps between rows of metrics.csv."""
    log: str = sinks.TENSORBOARD
    """Where the numbers in metrics.csv go besides: tensorboard, wandb (Weights & Biases: offline in the run's folder,
    unless you are logged in; pip install 'diffrl[wandb]'), both (tensorboard,wandb), or csv: nowhere else."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    compile: bool | None = None
    """1.4 times the speed after a minute's wait, once; by default from 10,000 steps up."""
    workers: Several | None = None
    """Processes that share the seeds on a CPU; by default one a core in a run of 5,000 steps or more, else 1.
    Scores depend on it, as each process's seeds are a stack; config.yaml keeps what was used."""
    capture: bool = True
    """On a GPU: capture the step as a CUDA graph and replay it; --no-capture for debugging."""
    tf32: bool = True
    """On a GPU: round the factors of products and convolutions to TF32 (10 bits), as JAX does: 1.5 times the speed.
    --no-tf32: keep float32."""
    out: Path | None = None
    """The run's folder; by default runs/AGENT-DATASET-TIME."""

    def __post_init__(self) -> None:
        if isinstance(self.agent, str):  # this and what follows: from Python
            agents.get(self.agent)
            name = repr(self.agent)
            raise refusal("agent", self.agent, f"its settings; diffrl.configuration({name}, dataset=...) has them")
        if self.env is not None and not isinstance(self.env, str):
            raise refusal("env", self.env, "the id of a registered environment, or MODULE:ID for one of your own")
        object.__setattr__(self, "dataset", _named_data(self.dataset))
        object.__setattr__(self, "env_kwargs", kwargs_words(self.env_kwargs))
        check(self)
        parse_kwargs(self.env_kwargs)
        object.__setattr__(self, "log", sinks.checked(self.log))
        if len(set(self.seeds)) != len(self.seeds):
            raise refusal("--seeds", list(self.seeds), "different numbers")


MACHINE = ("out", "device", "compile", "workers", "eval_workers", "capture", "log")
"""Fields of a run's configuration that say where and on what it ran, and not what was trained."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that starts from another run, apart from how it learns. None: as in the run it starts from."""

    steps: Count | None = None
    """Steps in all, for each seed."""
    out: Path | None = None
    """The new run's folder; by default runs/AGENT-KIND-DATASET-TIME."""
    seeds: Seeds | None = None
    """Those of the run's seeds to go on with, each from its own networks; by default all."""
    env_kwargs: tuple[str, ...] = ()
    """Other arguments of the run's environment, by default its own: KEY=VALUE each, such as g=2.0 (values as JSON, else
    text)."""
    max_episode_steps: Count | None = None
    """Another time limit of its episodes than the run's, which is the default."""
    eval_every: Count | None = None
    """Steps between evaluations, each followed by a checkpoint."""
    eval_episodes: Many | None = None
    """Episodes an evaluation, for each seed; by default the run's."""
    log_every: Count | None = None
    """Steps between rows of metrics.csv; by default the run's."""
    log: str | None = None
    """Where the numbers in metrics.csv go besides, see `diffrl train --help`; by default as the run's."""
    device: str | None = None
    """cpu, cuda, cuda:N, or auto; by default the run's."""
    compile: bool | None = None
    """As for `diffrl train`, by default from 10,000 steps up."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "env_kwargs", kwargs_words(self.env_kwargs))  # from Python
        check(self)
        parse_kwargs(self.env_kwargs)
        if self.log is not None:
            sinks.check_installed(sinks.checked(self.log))

    def applied(self, old: TrainConfig) -> TrainConfig:
        """The configuration of the new run, from that of the run it starts from. Its seeds learn as one stack."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value not in (None, ()) and name != "compile"}
        return dataclasses.replace(old, **{"out": None, **given, "workers": 1, "eval_workers": 0})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values for YAML; the agent's name becomes the first of the agent's fields."""
    plain = dataclasses.asdict(config)
    plain["agent"] = {"name": config.agent.name, **plain["agent"]}
    plain["seeds"], plain["env_kwargs"] = list(config.seeds), list(config.env_kwargs)
    plain["out"] = None if config.out is None else str(config.out)
    return plain


def dump(config: TrainConfig) -> str:
    """The YAML text of `to_dict`."""
    return to_yaml(to_dict(config))


def from_dict(values: Mapping[str, Any], source: str, of_run: bool = False, absent: bool = False) -> TrainConfig:
    """A configuration from what YAML holds. `source` is named in errors.

    of_run: the configuration is a run's, which names every field that there was when the run was made. A field that it
    does not name is younger, and gets the value that means what was done before. absent: see `agents.Absent`.

    Raises UserError for a key that is not known (the nearest is named), a value of the wrong type, a missing key.
    """
    values = dict(values)
    agent_values = values.pop("agent", None)
    if isinstance(agent_values, str):
        agent_values = {"name": agent_values}
    if not isinstance(agent_values, dict) or "name" not in agent_values:
        raise UserError(f"{source}: `agent` needs a `name`, one of {', '.join(agents.listed())}.")
    name, agent_values = str(agent_values["name"]), {k: v for k, v in agent_values.items() if k != "name"}
    schema = agents.get_or_absent(name, agent_values) if absent else agents.get(name, made=of_run)
    if of_run:
        agent_values = schema.of_run(agent_values)
        values = {"tf32": False} | values
    return read(TrainConfig, {**values, "agent": read(schema, agent_values, source, "agent.")}, source)


def load(path: Path, of_run: bool = False, absent: bool = False) -> TrainConfig:
    """Read a YAML file strictly. Raises UserError for anything it should not hold. of_run, absent: see `from_dict`."""
    return from_dict(read_yaml(path), str(path), of_run, absent)


def find(name: str) -> TrainConfig:
    """A configuration by path, or by its name in `configs/`, such as diffusion_ql/maze2d-umaze-v1.

    The name of one of OGBench's tasks by its number, such as fql/cube-single-play-singletask-task3-v0, means the
    configuration of its data, whose settings all five tasks have.
    """
    path = Path(name)
    if path.is_file():
        return load(path, of_run=(path.parent / "run.json").is_file())
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if (found := published.shipping(short)) is not None:
        config = load(published.folder() / f"{found[0]}.yaml")
        return dataclasses.replace(config, dataset=config.dataset.replace("-singletask", f"-singletask{found[1]}", 1))
    if name.endswith((".yaml", ".yml")) and closest(short, shipped()) is None:
        raise UserError(f"There is no file {name}. `diffrl train list` shows the configurations that ship.")
    if (path / ABOUT).is_file():
        raise UserError(f"{name} is a run, and no configuration: `diffrl resume {typed(name)}` goes on with it.")
    if agents.is_agent(name):
        raise UserError(f"{name} is an agent, and no configuration: `diffrl train --agent {name} --dataset DATASET`.")
    hint = published.hint(short)
    raise UserError(f"No configuration {name!r}: no such file, and of the shipped ones (`diffrl train list`) {hint}")


def default(agent: str, dataset: str) -> tuple[TrainConfig, str]:
    """The shipped configuration of an agent and a data set, else the defaults; and a sentence that says which."""
    schema, name = agents.get(agent), f"{agent}/{dataset}"
    if (found := published.shipping(name)) is not None:
        of_all = ", whose settings are those of all five tasks of its data" if found[1] else ""
        return find(name), f"Using the shipped configuration {found[0]}{of_all}."
    said = f"Using the defaults of {agent}: nothing is published for this data.{published.ours_for(name)}"
    return TrainConfig(dataset=dataset, agent=schema()), said


def configuration(config: TrainConfig | str | Path, **settings: Any) -> TrainConfig:
    """The configuration that `diffrl train` makes of the same words, as `train` takes it.

    config: a `TrainConfig`, a YAML file, the name of a shipped configuration such as "diffusion_ql/maze2d-umaze-v1", or
        of an agent, with the data set: configuration("diffusion_ql", dataset="maze2d-umaze-v1") is what `diffrl train
        --agent diffusion_ql --dataset maze2d-umaze-v1` trains. That is the configuration that ships for the two, and
        only where there is none the agent's defaults.
    settings: fields of `TrainConfig` to replace, e.g. steps=10_000; agent={"q_weight": 2.0} replaces fields of the
        agent's, as --agent.q-weight does.

    Raises UserError for a name or a field that there is not, and for a value that will not do.
    """
    return meant(config, settings)[0]


def meant(config: TrainConfig | str | Path, settings: Mapping[str, Any]) -> tuple[TrainConfig, str]:
    """As `configuration`; and a sentence that says where the agent's settings are from, "" where that is known.

    Raises UserError besides where a library that its `log` needs is not installed, and for settings that the run's
    folder could not be opened with again: of classes that are not those of the agent's name.
    """
    refuse_others(settings, "a run (an agent's are given by agent={...})", TrainConfig)
    said, settings, own = "", dict(settings), settings.get("agent")
    if not isinstance(config, TrainConfig):
        name = _name(config)
        config, said = _named(name, settings.get("dataset"))
        if isinstance(own, AgentConfig) and own.name != config.agent.name:
            kind = type(own).__name__
            raise UserError(
                f"{name!r} means the agent {config.agent.name}, and agent={kind}(...) is one of {own.name}: expected "
                f"settings of one agent, such as diffrl.train({own.name!r}, agent={kind}(...), dataset=...)."
            )
    if isinstance(own, Mapping):
        refuse_others(own, f"the agent {config.agent.name}", type(config.agent))
        settings["agent"] = dataclasses.replace(config.agent, **own)
    config = dataclasses.replace(config, **settings)
    _refuse_own_classes(config)
    sinks.check_installed(config.log)
    return config, said or _not_shipped(config)


def _refuse_own_classes(config: TrainConfig) -> None:
    """Raise UserError where a run's settings are of a class that is not the one its folder is read by."""
    agent = type(config.agent)
    if type(config) is not TrainConfig:
        raise UserError(f"{type(config).__name__} is a class of your own: a run's folder is read by TrainConfig alone.")
    if agents.AGENTS.get(agent.name) is agent:
        return
    known = agents.get(agent.name) if agents.is_agent(agent.name) else None
    if known is None or (known.__module__, known.__qualname__) != (agent.__module__, agent.__qualname__):  # reloaded
        raise UserError(
            f"The settings are of {agent.__module__}.{agent.__qualname__}, which no package brings as the agent "
            f"{agent.name}: the run could not be opened again. 'Adding an agent' in CONTRIBUTING.md shows how one does."
        )


def _name(config: object) -> str:
    """The name or path that is given as a configuration. Raises UserError for anything else."""
    if isinstance(config, str | PurePath):
        return str(config)
    kind = config if isinstance(config, type) else type(config)
    if issubclass(kind, AgentConfig):
        name = getattr(kind, "name", "NAME")
        raise UserError(
            f"{kind.__name__} has the settings of an agent alone: expected the agent's name before them, "
            f"diffrl.train({name!r}, agent={kind.__name__}(...), dataset=...)."
        )
    raise refusal("config", config, "a diffrl.TrainConfig, a YAML file, or the name of a configuration or an agent")


def _named(name: str, dataset: object) -> tuple[TrainConfig, str]:
    """The configuration of a file, of a shipped name, or of an agent for a data set; and what is said of it."""
    if not agents.is_agent(name) or Path(name).exists():
        return find(name), ""
    if dataset is None or (isinstance(dataset, str) and not dataset):
        raise UserError(
            f"{name} is an agent, and no configuration: expected its data set too, diffrl.train({name!r}, dataset=...)."
        )
    return default(name, _named_data(dataset))


def _named_data(dataset: object) -> str:
    """The name or path that is given as a data set. Raises UserError for data, and anything else."""
    if not isinstance(dataset, str | PurePath):
        data = "a name or a file's path (diffrl.data.d4rl.write(path, dataset) makes a file of an OfflineDataset)"
        raise refusal("dataset", dataset, data)
    return str(dataset)


def _not_shipped(config: TrainConfig) -> str:
    """What is said of an agent's bare defaults where a configuration ships that has others: a sentence, or ""."""
    name = f"{config.agent.name}/{config.dataset}"
    if not ships(name) or config.agent != type(config.agent)():
        return ""
    own = find(name).agent
    other = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(config.agent, f.name)]
    if not other:
        return ""
    return (
        f"The agent's settings are the defaults of {config.agent.name}. Those that ship for {config.dataset} have "
        f"another {joined(other)}: `diffrl train --agent {config.agent.name} --dataset {config.dataset}`, in Python "
        f"diffrl.configuration({config.agent.name!r}, dataset={config.dataset!r})."
    )


# --- What a configuration leaves to the machine ---------------------------------------------------------------------

WORKERS_PAY_FROM = 5_000
"""Steps from which a run is long enough to pay for starting workers, which takes some seconds."""


def _kind(device: str) -> str:
    """The kind of a device: cpu or cuda."""
    return device.partition(":")[0]


def chosen(
    config: TrainConfig,
    device: str,
    task: Task,
    saved: Checkpoint | None = None,
    eval_workers: int | None = None,
) -> TrainConfig:
    """The configuration with what it leaves to the machine: compiling, and the processes that train and evaluate.

    saved: of a run that goes on. eval_workers: another number than that run's. Raises UserError for what cannot be.
    """
    workers = choose_workers(config, device, task, saved)
    compiled = choose_compiling(config.compile, config.steps, device)
    config = dataclasses.replace(config, workers=workers, compile=compiled)
    if eval_workers is not None:
        config, saved = dataclasses.replace(config, eval_workers=eval_workers), None
    return dataclasses.replace(config, eval_workers=choose_eval_workers(config, device, task, saved))


def choose_workers(config: TrainConfig, device: str, task: Task, saved: Checkpoint | None = None) -> int | None:
    """How many processes share the seeds: what the user says, else one a core where that pays and is possible.

    A run that goes on keeps those of its checkpoint. On a GPU all seeds are one stack, and the configuration's word
    stays, for the day the run moves to a CPU. The answer is recorded in the run's configuration, so that another
    machine trains it the same. Raises UserError for what cannot be.
    """
    if _kind(device) != "cpu":
        return config.workers
    obstacle = crew.obstacle(task) if len(config.seeds) > 1 else None
    if saved is not None and saved.info["device"] == "cpu":
        wanted: int | None = len(_saved_sizes(saved, config))
    else:
        wanted = config.workers
    if wanted is None:
        pays = config.steps >= WORKERS_PAY_FROM and obstacle is None
        return min(len(config.seeds), cores()) if pays else 1
    if wanted > 1 and obstacle is not None:
        raise UserError(f"The run needs {wanted} workers, but {obstacle}. Start it anew with --workers 1.")
    return min(wanted, len(config.seeds))


def choose_eval_workers(config: TrainConfig, device: str, task: Task, saved: Checkpoint | None = None) -> int:
    """How many processes evaluate while training goes on: what the user says, else one a seed where a core is left.

    config: with its `workers` chosen. A run that goes on keeps its number where it can, except on another kind of
    device. No score depends on it. Raises UserError for what is asked for and cannot be.
    """
    wanted, n_seeds, kind = config.eval_workers, len(config.seeds), _kind(device)
    if task.env_id is None:
        return 0
    if saved is not None and saved.info["device"] != kind:
        wanted = None
    if wanted == 0:
        return 0
    obstacle = crew.obstacle(task)
    if wanted is None:
        training = config.workers or 1 if kind == "cpu" else 1
        pays = config.steps >= WORKERS_PAY_FROM and obstacle is None
        return max(0, min(n_seeds, cores() - training)) if pays else 0
    if wanted and obstacle is not None:
        if saved is not None:  # recorded on a machine, or by a program, that had no obstacle
            return 0
        raise UserError(f"The run is to be evaluated by {wanted} processes, but {obstacle}: --eval-workers 0.")
    from diffrl.training.evaluations import MOST_AT_ONCE

    return min(wanted, MOST_AT_ONCE * n_seeds)


def group_seeds(config: TrainConfig, device: str, saved: Checkpoint | None = None) -> list[tuple[int, ...]]:
    """The seeds in groups of nearly equal size, each a stack of its own, one a worker.

    A run that goes on keeps the groups of its checkpoint, each of which has a generator of its own.
    """
    kind, n_seeds = _kind(device), len(config.seeds)
    if saved is not None and saved.info["device"] == kind:
        sizes = _saved_sizes(saved, config)
    else:
        n = 1 if kind != "cpu" else min(config.workers or 1, n_seeds)
        sizes = [n_seeds // n + (i < n_seeds % n) for i in range(n)]
    return [config.seeds[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


def _saved_sizes(saved: Checkpoint, config: TrainConfig) -> list[int]:
    """The groups' sizes; runs from before there were groups are one."""
    return list(saved.info.get("groups", [len(config.seeds)]))
