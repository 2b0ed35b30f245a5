"""Runs from start to end: data, agent, loop, evaluation, put together from a configuration. The Python interface."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.base import Agent, seed_slice
from diffrl import config as configuration
from diffrl.config import TrainConfig
from diffrl.console import console, training_observer, work
from diffrl.data.normalise import Normaliser, normaliser, tune_rewards
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.errors import DataError, UserError, nearest
from diffrl.files import atomic_path
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog, Scores
from diffrl.training.loop import Loop
from diffrl.training.rollout import Evaluator
from envs import registry
from envs.datasets import FILE_SUFFIXES, load_dataset

EXPLODED = 10.0
"""A value estimate counts as exploded at this many times the largest return the data's rewards allow."""


@dataclass(frozen=True)
class Task:
    """What a policy is evaluated on: the environment, and the references that make scores of its returns."""

    env_id: str | None
    env_kwargs: dict[str, Any]
    reference: str | None
    """The benchmark whose references normalise returns; None: there are none."""
    comparable: bool
    """Whether data and environment are that benchmark's, so that scores compare with published ones."""

    def make(self) -> gymnasium.Env[Any, Any]:
        """The environment. Raises UserError where it is unknown or not installed."""
        assert self.env_id is not None
        return make_env(self.env_id, self.env_kwargs)

    def score(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Normalised scores x100."""
        assert self.reference is not None
        return registry.normalised_score(self.reference, returns)


def make_env(env_id: str, kwargs: dict[str, Any] | None = None) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make`, with errors that say what to do."""
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
            "To train without evaluation: --env none."
        ) from error
    except (ImportError, gymnasium.error.Error) as error:
        raise UserError(
            f"The environment {env_id!r} cannot be made: {error}. Without evaluation: --env none."
        ) from error


def _task(config: TrainConfig, dataset: OfflineDataset) -> Task:
    """The environment: what --env says ("none": there is none), else the benchmark's, else what the data file names."""
    benchmark = registry.get(config.dataset) if registry.known(config.dataset) else None
    own = None if benchmark is None else benchmark.env_id
    env_id = config.env or own or dataset.metadata.get("env_id")
    env_id = None if env_id == "none" else env_id
    kwargs = dict(benchmark.env_kwargs) if benchmark is not None and env_id == own else {}
    if benchmark is not None and benchmark.ref_min is not None:
        return Task(env_id, kwargs, benchmark.id, comparable=env_id == own and config.rows is None)
    return Task(env_id, kwargs, registry.reference_of(env_id) if env_id else None, comparable=False)


@dataclass(frozen=True)
class Preprocessing:
    """Between the environment and the agent: observations normalised, actions scaled to [-1, 1]."""

    observations: Normaliser
    actions: Normaliser

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        parts = {"observations": self.observations, "actions": self.actions}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "Preprocessing":
        """The inverse of `state_dict`."""
        names = ("observations", "actions")
        return cls(*(Normaliser(state[f"{name}.shift"], state[f"{name}.scale"]) for name in names))

    def to(self, device: torch.device) -> "Preprocessing":
        """The same on another device."""
        return Preprocessing(self.observations.to(device), self.actions.to(device))


def _action_scaling(env: gymnasium.Env[Any, Any] | None, dataset: OfflineDataset) -> Normaliser:
    """To [-1, 1] from the environment's bounds, else those in the file's metadata, else [-1, 1] as it is.

    Raises DataError where the data's actions lie outside.
    """
    size = dataset.action_size
    low: Any
    high: Any
    if env is not None:
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        low, high, source = space.low, space.high, f"the bounds of {env.spec.id if env.spec else 'the environment'}"
    elif "action_low" in dataset.metadata and "action_high" in dataset.metadata:
        low, high, source = dataset.metadata["action_low"], dataset.metadata["action_high"], "the file's action bounds"
    else:
        low, high, source = -1.0, 1.0, "[-1, 1], assumed as no environment and no bounds in the file say otherwise"
    try:
        low = np.broadcast_to(np.asarray(low, dtype=np.float32), (size,))
        high = np.broadcast_to(np.asarray(high, dtype=np.float32), (size,))
    except ValueError as error:
        raise DataError(f"{source} do not fit actions of {size} dimensions: {low}, {high}.") from error
    outside = (dataset.actions < low - 1e-4) | (dataset.actions > high + 1e-4)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{dataset.metadata.get('source', 'The data set')}: actions, row {row}, column {column} is "
            f"{dataset.actions[row, column]:.4g}, outside {source}. Name the environment of the data with --env, or "
            "clip the actions: `diffrl data convert SRC NEW.hdf5 --clip-actions`."
        )
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DataError(f"The actions have no finite range in {source}; agents need one.")
    return Normaliser(torch.tensor((low + high) / 2), torch.tensor((high - low) / 2))


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
    """Of the transitions, so that a resumed run meets the same data."""

    def build_agent(self, device: str, seeds: Sequence[int] | None = None) -> Agent:
        """The agent with freshly initialised networks."""
        seeds = self.config.seeds if seeds is None else seeds
        return self.config.agent.build(self.observation_size, self.action_size, seeds, device)

    def write(self) -> None:
        """Create the folder and write what never changes: configuration, sizes, preprocessing, versions."""
        about = {
            "task": dataclasses.asdict(self.task),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "value_limit": self.value_limit,
            "fingerprint": self.fingerprint,
            "versions": _versions(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config()
        with atomic_path(self.path / "preprocessing.safetensors") as temporary:
            temporary.write_bytes(safetensors.torch.save(self.preprocessing.state_dict()))
        with atomic_path(self.path / "run.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1))

    def write_config(self) -> None:
        """Write `config.yaml`: at the beginning, and when a resumed run is given more steps."""
        with atomic_path(self.path / "config.yaml") as temporary:
            temporary.write_text(configuration.dump(self.config))

    @classmethod
    def read(cls, path: Path | str) -> "Run":
        """Open a run's folder. Raises UserError where it is none."""
        path = Path(path)
        needed = ("config.yaml", "run.json", "preprocessing.safetensors")
        missing = [name for name in needed if not (path / name).is_file()]
        if missing:
            what = "has no " + ", ".join(missing) if path.is_dir() else "does not exist"
            known = sorted(str(p.parent) for p in path.parent.glob("*/run.json")) if path.parent.is_dir() else []
            hint = f" Runs beside it: {', '.join(known[-3:])}." if known else ""
            raise UserError(f"{path} is not a run's folder: it {what}.{hint}")
        try:
            about = json.loads((path / "run.json").read_text())
            tensors = safetensors.torch.load((path / "preprocessing.safetensors").read_bytes())
            return cls(
                path,
                configuration.load(path / "config.yaml"),
                Task(**about["task"]),
                about["observation_size"],
                about["action_size"],
                Preprocessing.from_state_dict(tensors),
                about["value_limit"],
                about["fingerprint"],
            )
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}.") from error


def _versions() -> dict[str, str]:
    names = ("diffrl", "torch", "numpy", "gymnasium", "mujoco")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    root = Path(__file__).parents[1]
    if (root / ".git").exists():  # a checkout of ours; installed from a wheel, there is no commit to name
        with contextlib.suppress(OSError):  # no git on this machine
            command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
            versions["git"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return versions


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. Try --device cpu."
        ) from error
    return name


def train(config: TrainConfig | str | Path, *, quiet: bool = False, **overrides: Any) -> Path:
    """Train, evaluate and save as `config` says; give the run's folder.

    config: a `TrainConfig`, a YAML file, or the name of a published one such as "diffusion_ql/maze2d-umaze-v1".
    overrides: fields of `TrainConfig`, e.g. steps=10_000, seeds=(0, 1).
    """
    if not isinstance(config, TrainConfig):
        config = configuration.find(str(config))
    config = dataclasses.replace(config, **overrides)
    device = _device(config.device)
    _one_thread()
    if config.out is not None:
        if (config.out / "run.json").exists():
            raise UserError(
                f"{config.out} holds a run already: `diffrl train --resume {config.out}`, or choose another --out."
            )
        config.out.mkdir(parents=True, exist_ok=True)
    dataset, task, env = _open(config, quiet)
    transitions, preprocessing = _prepare(config, dataset, env, device)
    if env is not None:
        env.close()
    largest = float(transitions.columns.rewards.abs().max()) / (1 - config.agent.discount)
    path = config.out or _new_folder(config)
    run = Run(
        path,
        dataclasses.replace(config, out=path),
        task,
        dataset.observation_size,
        dataset.action_size,
        preprocessing,
        EXPLODED * max(largest, 1.0),  # of data without rewards the estimates are the critics' own noise
        _fingerprint(transitions),
    )
    agent = run.build_agent(device)
    run.write()
    return _fit(run, agent, transitions, device, quiet)


def resume(path: Path | str, *, steps: int | None = None, device: str | None = None, quiet: bool = False) -> Path:
    """Go on with a run from its newest whole checkpoint, to `steps` steps in all (by default what it was made for)."""
    run = Run.read(path)
    device = _device(device or run.config.device)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps or run.config.steps))
    saved, complaints = checkpoint.load_latest(run.path)
    for complaint in complaints:
        console.print(f"[yellow]{complaint}[/]")
    if saved.step >= run.config.steps:
        raise UserError(f"{run.path} has {saved.step} steps already; give a larger --steps to go on.")
    _one_thread()
    dataset = load_dataset(run.config.dataset, rows=run.config.rows, progress=not quiet, action_limit=None)
    transitions = _transform(run.config, dataset, run.preprocessing, device)
    if _fingerprint(transitions) != run.fingerprint:
        raise UserError(
            f"The data set {run.config.dataset} is not the one that {run.path} was trained on (its contents have "
            "changed), so the run cannot go on as if it had not been cut. Restore the data, or start a new run."
        )
    agent = run.build_agent(device)
    run.write_config()
    checkpoint.clean(run.path, saved.step)
    return _fit(run, agent, transitions, device, quiet, saved)


def _fingerprint(transitions: Transitions) -> str:
    """A digest of the rows as they are trained on."""
    return hashlib.sha256(transitions.rows.cpu().numpy().tobytes()).hexdigest()


def _one_thread() -> None:
    """Small matrices: a second thread makes a step slower. `OMP_NUM_THREADS` overrides."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _open(config: TrainConfig, quiet: bool) -> tuple[OfflineDataset, Task, gymnasium.Env[Any, Any] | None]:
    """The data set and the environment, checked against each other."""
    dataset = load_dataset(config.dataset, rows=config.rows, progress=not quiet, action_limit=None)
    task = _task(config, dataset)
    try:
        return dataset, task, _fitting_env(config, task, dataset)
    except UserError as error:
        if config.env is not None or registry.known(config.dataset):
            raise
        # The environment was the data file's idea, not the user's: train without it.
        console.print(f"[yellow]Training without evaluation. {error}[/]")
        return dataset, dataclasses.replace(task, env_id=None), None


def _fitting_env(config: TrainConfig, task: Task, dataset: OfflineDataset) -> gymnasium.Env[Any, Any] | None:
    """The task's environment. Raises UserError where its spaces are not those of the data."""
    if task.env_id is None:
        return None
    env = task.make()
    for name, size in (("observation", dataset.observation_size), ("action", dataset.action_size)):
        space = getattr(env, f"{name}_space")
        if not isinstance(space, gymnasium.spaces.Box) or space.shape != (size,):
            raise UserError(
                f"{task.env_id} and {config.dataset} do not fit: the environment's {name}s are {space}, the data's "
                f"have {size} dimensions. Name the environment the data came from with --env."
            )
    return env


def _prepare(
    config: TrainConfig, dataset: OfflineDataset, env: gymnasium.Env[Any, Any] | None, device: str
) -> tuple[Transitions, Preprocessing]:
    kind = "standard" if config.agent.normalise_observations else "identity"
    observations = normaliser(kind, torch.from_numpy(dataset.observations))
    preprocessing = Preprocessing(observations, _action_scaling(env, dataset))
    return _transform(config, dataset, preprocessing, device), preprocessing


def _transform(config: TrainConfig, dataset: OfflineDataset, preprocessing: Preprocessing, device: str) -> Transitions:
    transitions = Transitions.from_dataset(dataset, device)
    parts = preprocessing.to(transitions.device)
    transitions.columns.actions.copy_(parts.actions(transitions.columns.actions).clamp(-1, 1))
    return transitions.map(
        observations=parts.observations, rewards=lambda rewards: tune_rewards(config.agent.reward_tune, rewards)
    )


def _new_folder(config: TrainConfig) -> Path:
    """A folder of its own for the run, made here, so that two runs of the same second do not share one."""
    is_path = Path(config.dataset).suffix in FILE_SUFFIXES
    name = Path(config.dataset).stem if is_path else config.dataset.replace("/", "-").replace(":", "-")
    stem = f"{config.agent.name}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path = Path("runs") / f"{stem}{suffix}"
            path.mkdir(parents=True)
            return path
    raise UserError(f"runs/{stem} exists a thousand times; choose another --out.")


def _fit(
    run: Run,
    agent: Agent,
    transitions: Transitions,
    device: str,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    """Train from the beginning, or from `saved`, to the end."""
    from diffrl import report

    config = run.config
    if config.compile:
        _compile(agent)
    # The list of seeds is the run's one source of randomness: the batches and noise of the stack come from it.
    generator = torch.Generator(device=device).manual_seed(_mix(config.seeds))
    start = 0 if saved is None else saved.step
    evaluator = None if run.task.env_id is None else Evaluator(run.task.make, agent.n_seeds)
    task = {"env": run.task.env_id, "reference": run.task.reference, "comparable": run.task.comparable}
    about = {"dataset": config.dataset, "seeds": list(config.seeds), **task}
    scores = Scores(run.path, about, steps=range(start + 1))
    log = MetricsLog(run.path, config.seeds, start)

    with training_observer(config.steps, start, _title(run, len(transitions)), quiet) as observer:

        def evaluate(step: int) -> None:
            if evaluator is None:
                return
            act = actor(agent, run.preprocessing, step)
            returns, _ = evaluator(act, config.eval_episodes, (*config.seeds, step), observer.rollout)
            entry = scores.add(step, returns, run.task.score if run.task.reference else None)
            values = entry.get("score", entry["mean_return"])
            log.scalars("score" if run.task.reference else "return", step, values)
            observer.message(report.evaluation_line(step, entry, config.eval_episodes))

        loop = Loop(
            run.path,
            agent,
            transitions,
            config.agent.batch_size,
            generator,
            log,
            observer,
            evaluate,
            lambda: {int(best["step"]) for best in scores.best()},
            config.log_every,
            config.eval_every,
            run.value_limit,
        )
        if saved is not None:
            loop.restore(saved)
        try:
            loop.fit(config.steps)
        except OSError as error:
            kept = checkpoint.steps(run.path)
            last = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no checkpoint yet"
            raise UserError(
                f"Writing to {run.path} failed: {error.strerror or error}; {last}. "
                f"Mend that, then `diffrl train --resume {run.path}`."
            ) from error
        finally:
            log.close()
            if evaluator is not None:
                evaluator.close()
    if scores.evaluations:
        report.learning_curve([run.path], run.path / "learning_curve.png")
    if not quiet:
        report.print_run(run.path, scores)
    return run.path


def _compile(agent: Agent) -> None:
    if agent.device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")):
        console.print(
            "[yellow]--compile needs a C++ compiler (g++ or clang++), and none is found: going on without.[/]"
        )
        return
    console.print("Compiling the losses: about a minute the first time, seconds when it has been done before.")
    agent.compile()


def _mix(seeds: Sequence[int]) -> int:
    """One number for a list of seeds."""
    return int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _title(run: Run, n: int) -> str:
    where = f", evaluated in {run.task.env_id}" if run.task.env_id else ", without evaluation (no environment: --env)"
    return f"{run.config.agent.name} on {run.config.dataset}: {n:,} transitions{where}. Run: {run.path}"


def actor(agent: Agent, preprocessing: Preprocessing, salt: int = 0) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """The agent as a function from observations (S, B, O) to actions (S, B, A), both the environment's."""
    generator = torch.Generator(device=agent.device).manual_seed(_mix([*agent.seeds, salt]))
    parts = preprocessing.to(agent.device)

    def act(observations: NDArray[Any]) -> NDArray[np.float32]:
        x = torch.as_tensor(observations, dtype=torch.float32, device=agent.device)
        actions: NDArray[np.float32] = parts.actions.inverse(agent.act(parts.observations(x), generator)).cpu().numpy()
        return actions

    return act


class Policy:
    """A trained policy as a function: `action = policy(observation)`, NumPy in and out, (O,) or (B, O)."""

    def __init__(self, agent: Agent, preprocessing: Preprocessing, salt: int = 0) -> None:
        self.agent = agent
        self._act = actor(agent, preprocessing, salt)

    def __call__(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """Actions (A,) or (B, A), within the environment's bounds. Raises ValueError for another size."""
        x = np.asarray(observation, dtype=np.float32)
        if x.ndim not in (1, 2) or x.shape[-1] != self.agent.observation_size:
            raise ValueError(
                f"expected observations of shape ({self.agent.observation_size},) or "
                f"(B, {self.agent.observation_size}), got {x.shape}"
            )
        actions = self._act(np.atleast_2d(x)[None])[0]
        return actions if x.ndim == 2 else np.asarray(actions[0])


def _checkpoint_step(run: Run, which: str, seed_index: int) -> int:
    """The step of the last, or of a seed's best evaluated, checkpoint. Falls back from a damaged last one."""
    if which == "last":
        saved, complaints = checkpoint.load_latest(run.path)
        for complaint in complaints:
            console.print(f"[yellow]{complaint}[/]")
        return saved.step
    if which == "best":
        best = Scores(run.path, {}, steps=checkpoint.steps(run.path)).best()
        if not best:
            raise UserError(f"{run.path} has no evaluations, so no best checkpoint; use the last one.")
        return int(best[seed_index]["step"])
    if which.isdigit() and int(which) in checkpoint.steps(run.path):
        return int(which)
    raise UserError(f"No checkpoint {which!r}: expected last, best, or one of {checkpoint.steps(run.path)}.")


def load_agent(run: Run, seed: int, which: str = "last", device: str = "cpu") -> Agent:
    """The agent of one seed alone, from the `last` or `best` checkpoint or that of a step."""
    if seed not in run.config.seeds:
        raise UserError(f"{run.path} has no seed {seed}; it has {', '.join(map(str, run.config.seeds))}.")
    index = run.config.seeds.index(seed)
    saved = checkpoint.load(run.path, _checkpoint_step(run, which, index))
    state = {n.removeprefix("learner."): t for n, t in saved.tensors.items() if n.startswith("learner.")}
    agent = run.build_agent(_device(device), [seed])
    agent.load_state_dict(seed_slice(state, index))
    return agent


def load_policy(run: Path | str, *, which: str = "last", seed: int | None = None, device: str = "cpu") -> Policy:
    """The policy of a run, for a plain Gymnasium loop.

    which: "last", "best" (by its evaluations), or a checkpoint's step. seed: by default the run's first.
    """
    opened = Run.read(run)
    agent = load_agent(opened, opened.config.seeds[0] if seed is None else seed, which, device)
    return Policy(agent, opened.preprocessing)


def evaluate(
    path: Path | str,
    *,
    episodes: int = 100,
    which: Sequence[str] = ("last", "best"),
    seed: int = 0,
    device: str = "cpu",
    record: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Roll out a run's checkpoints: `{which: {"seeds": .., "step": [..], "returns": [[..]], "scores": ...}}`.

    seed: what start states and noise are drawn from (not a training seed). record: keep so many episodes' observations
    of each training seed, under "paths". Raises UserError where the run has no environment.
    """
    run = Run.read(path)
    if run.task.env_id is None:
        raise UserError(f"{run.path} was trained without an environment: nothing to evaluate in.")
    _one_thread()
    evaluator = Evaluator(run.task.make, 1)
    result: dict[str, Any] = {}
    known: dict[tuple[int, int], tuple[NDArray[np.float64], list[NDArray[np.float32]]]] = {}
    try:
        for name in which:
            entry: dict[str, Any] = {"seeds": list(run.config.seeds), "step": [], "returns": [], "paths": []}
            for index, training_seed in enumerate(run.config.seeds):
                step = _checkpoint_step(run, name, index)
                if (training_seed, step) not in known:  # the last checkpoint may be the best
                    agent = load_agent(run, training_seed, str(step), device)
                    act = actor(agent, run.preprocessing, seed)
                    with work(f"{name}, seed {training_seed}, step {step:,}", "episodes", quiet) as on_step:
                        outcome = evaluator(act, episodes, (seed, training_seed), on_step, record)
                    known[training_seed, step] = outcome
                returns, paths = known[training_seed, step]
                entry["step"].append(step)
                entry["returns"].append(returns[0].tolist())
                entry["paths"].append(paths)
            if run.task.reference:
                entry["scores"] = run.task.score(np.asarray(entry["returns"])).tolist()
            result[name] = entry
    finally:
        evaluator.close()
    return result
