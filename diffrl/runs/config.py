"""What a training run is made of: one frozen dataclass, strict YAML, and the published configurations. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml

import agents
from agents import AgentConfig
from diffrl.augment.synther.config import RefitConfig, Sampling, Solver, SynthERConfig
from diffrl.support.errors import UserError, nearest
from diffrl.support.schema import (
    Count,
    Many,
    Natural,
    NotNegative,
    Range,
    Rows,
    SamplingSteps,
    Seed,
    Several,
    Share,
    Width,
    check,
    read,
    read_yaml,
    refusal,
)

Seeds = Annotated[tuple[Seed, ...], Range(1, 10_000)]


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    dataset: str
    """A D4RL id (`diffrl data list`), a Minari id, or a path to an HDF5 file."""
    agent: AgentConfig
    """The algorithm's hyper-parameters."""
    env: str | None = None
    """Gymnasium id of the environment to evaluate in, or none; by default the benchmark's, or what the file names."""
    seeds: Seeds = (0,)
    """Seeds, trained side by side, each with networks of its own: on a GPU as one stack, on a CPU see workers."""
    steps: Count = 1_000_000
    """Training steps in all, also when resuming."""
    rows: Annotated[int, Range(2, 10**10)] | None = None
    """Use only the first rows of the data set (a maze2d set that is missing is generated with this many)."""
    eval_every: Count = 50_000
    """Steps between evaluations, each followed by a checkpoint."""
    eval_episodes: Many = 10
    """Episodes an evaluation, for each seed."""
    eval_workers: Annotated[int, Range(0, 10_000)] | None = None
    """Processes that evaluate while training goes on; 0: training waits; by default as many as cores are left, at most
    one a seed. No score depends on it."""
    log_every: Count = 500
    """Steps between rows of metrics.csv."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    compile: bool | None = None
    """--compile, --no-compile: 1.4 times the speed after a minute's wait, once; by default from 10,000 steps up."""
    workers: Several | None = None
    """Processes that share the seeds on a CPU; by default one a core where the run is long enough to pay, else 1."""
    capture: bool = True
    """On a GPU: capture the step as a CUDA graph and replay it; --no-capture for debugging."""
    tf32: bool = True
    """On a GPU: round the factors of matrix products to TF32 (10 bits), as JAX does: 1.5 times the speed. --no-tf32:
    keep float32."""
    out: Path | None = None
    """The run's folder; by default runs/AGENT-DATASET-TIME."""

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise refusal("--seeds", list(self.seeds), "different numbers")


@dataclass(frozen=True)
class RunOptions:
    """What is said of a run that starts from another one, beside how it learns. None: as in the run it starts from."""

    steps: Count | None = None
    """Steps in all, for each seed."""
    out: Path | None = None
    """The new run's folder; by default runs/AGENT-KIND-DATASET-TIME."""
    seeds: Seeds | None = None
    """Those of the run's seeds to go on with, each from its own networks; by default all."""
    eval_every: Count | None = None
    """Steps between evaluations, each followed by a checkpoint."""
    eval_episodes: Many | None = None
    """Episodes an evaluation, for each seed; by default the run's."""
    log_every: Count | None = None
    """Steps between rows of metrics.csv; by default the run's."""
    device: str | None = None
    """cpu, cuda, cuda:N, or auto; by default the run's."""
    compile: bool | None = None
    """--compile, --no-compile: as for `diffrl train`, by default from 10,000 steps up."""

    def __post_init__(self) -> None:
        check(self)

    def applied(self, old: TrainConfig) -> TrainConfig:
        """The configuration of the new run, from that of the run it starts from. Its seeds learn as one stack."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value is not None and name != "compile"}
        return dataclasses.replace(old, **{"out": None, **given, "workers": 1, "eval_workers": 0})


ONLINE_STEPS = 100_000
"""Environment steps of an online run."""
ONLINE_EVAL_EVERY = 5_000
"""Environment steps between an online run's evaluations."""


@dataclass(frozen=True)
class OnlineConfig:
    """How an online run, one that started from an offline run, collects and learns: its folder's `settings.yaml`."""

    offline_run: Path
    """The folder of the run it started from, which is not needed any more."""
    start_checkpoint: str = "last"
    """The offline run's checkpoint to start from: last, best (each seed's), or a step."""
    keep_offline: Share = 0.5
    """Share of each batch drawn from the offline data. Half (RLPD, arXiv 2302.02948) holds the critics to what was
    learned while there is little else; 0, online data alone, is what the Consistency-AC paper does."""
    capacity: Count = 1_000_000
    """Online transitions kept for each seed, the newest."""
    updates_per_step: Count = 1
    """Training steps for each environment step."""
    warm_up: Natural = 5_000
    """First environment steps, without training: a batch is not to repeat one episode (RLPD and WSRL have 5,000)."""
    exploration: NotNegative = 0.0
    """Deviation of Gaussian noise on the actions taken, in units of half their range. Agents that draw their actions
    need none; those whose actions are fixed by the state (bc, td3_bc, iql) need some, such as 0.1."""
    synthetic_share: Share = 0.0
    """Share of each batch that SynthER generates (arXiv 2303.06614: half); 0: none. The rest is real, of which
    keep_offline says how much is offline; the models are fitted to that mixture."""
    refit_every: Count = 10_000
    """Environment steps between fits of a new SynthER model."""
    first_fit: Natural | None = None
    """Environment steps before the first fit; by default as many as between fits. Never within the warm-up."""
    synthetic_samples: Rows = 1_000_000
    """Synthetic transitions generated for each seed after every fit, in place of the last ones."""
    synthetic_steps: Count = SynthERConfig.steps
    """Training steps of each SynthER model."""
    synthetic_width: Width = SynthERConfig.width
    """Its network's width. On a CPU take 256."""
    synthetic_solver: Solver = Sampling.solver
    """dpmpp2m calls the network once a step; heun, the published one, twice (with 128 steps)."""
    synthetic_sampling_steps: SamplingSteps = Sampling.sampling_steps
    """Solver steps."""
    start_steps: tuple[int, ...] = ()
    """Filled in: the step of each seed's start checkpoint."""
    reward_shift: float = 0.0
    """Filled in: training rewards are (reward - shift) / scale, for online rewards as for the offline data's."""
    reward_scale: float = 1.0
    """Filled in: see reward_shift."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_checkpoint", str(self.start_checkpoint))  # from Python, a step
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it."""
        return {
            **dataclasses.asdict(self),
            "offline_run": str(self.offline_run),
            "start_steps": list(self.start_steps),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> OnlineConfig:
        """From what YAML holds. `source` is named in errors. Raises UserError for anything it should not hold."""
        return read(cls, values, source)

    @property
    def refit(self) -> RefitConfig:
        """How synthetic experience is made."""
        return RefitConfig(
            self.synthetic_share,
            self.refit_every,
            self.first_fit,
            self.synthetic_samples,
            SynthERConfig(steps=self.synthetic_steps, width=self.synthetic_width),
            Sampling(self.synthetic_solver, self.synthetic_sampling_steps),
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """As YAML holds it: the agent's name stands among its fields."""
    plain = dataclasses.asdict(config)
    plain["agent"] = {"name": config.agent.name, **plain["agent"]}
    plain["seeds"] = list(config.seeds)
    plain["out"] = None if config.out is None else str(config.out)
    return plain


def dump(config: TrainConfig) -> str:
    """The YAML text of `to_dict`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_dict(values: Mapping[str, Any], source: str, of_run: bool = False) -> TrainConfig:
    """A configuration from what YAML holds. `source` is named in errors.

    of_run: it is that of a run, which names every field there was: what it does not name is younger, and means what was
    done before.

    Raises UserError for a key that is not known (the nearest is named), a value of the wrong type, a missing key.
    """
    values = dict(values)
    agent_values = values.pop("agent", None)
    if isinstance(agent_values, str):
        agent_values = {"name": agent_values}
    if not isinstance(agent_values, dict) or "name" not in agent_values:
        raise UserError(f"{source}: `agent` needs a `name`, one of {', '.join(agents.listed())}.")
    agent_values = dict(agent_values)
    schema = agents.get(str(agent_values.pop("name")))
    if of_run:
        agent_values = schema.of_run(agent_values)
        values = {"tf32": False} | values
    return read(TrainConfig, {**values, "agent": read(schema, agent_values, source, "agent.")}, source)


def load(path: Path, of_run: bool = False) -> TrainConfig:
    """Read a YAML file strictly. Raises UserError for anything it should not hold. of_run: see `from_dict`."""
    return from_dict(read_yaml(path), str(path), of_run)


def published() -> list[str]:
    """The configurations that ship with the package, as AGENT/DATASET."""
    root = Path(str(resources.files("configs")))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find(name: str) -> TrainConfig:
    """A configuration by path, or by its name in `configs/`, such as diffusion_ql/maze2d-umaze-v1."""
    path = Path(name)
    if path.is_file():
        return load(path, of_run=(path.parent / "run.json").is_file())
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in published():
        return load(Path(str(resources.files("configs"))) / f"{short}.yaml")
    hint = nearest(short, published())
    raise UserError(f"No configuration {name!r}: no such file, and of the published ones (`diffrl train list`) {hint}")


def default(agent: str, dataset: str) -> tuple[TrainConfig, str]:
    """The published configuration of the pair, else the defaults; and a sentence that says which."""
    schema = agents.get(agent)
    if f"{agent}/{dataset}" in published():
        return find(f"{agent}/{dataset}"), f"Using the published configuration {agent}/{dataset}."
    return TrainConfig(
        dataset=dataset, agent=schema()
    ), f"Using the defaults of {agent}: nothing is published for this data."
