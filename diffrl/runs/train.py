"""Training runs from start to end: data, agent, loop and evaluation, put together from a configuration."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from agents.base import Agent
from diffrl.augment.synther.config import Solver
from diffrl.data.d4rl import digest
from diffrl.data.normalise import normaliser, reward_tuning
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import Preprocessing, action_scaling
from diffrl.data.transitions import Transitions
from diffrl.runs import config as configuration
from diffrl.runs import report
from diffrl.runs.build import Say, build_pool, build_trainer, choose_eval_workers, choose_workers, group_seeds
from diffrl.runs.config import ONLINE_EVAL_EVERY, ONLINE_STEPS, OnlineConfig, TrainConfig
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run, lowering_memory
from diffrl.support.console import console, training_observer
from diffrl.support.errors import UserError, nearest
from diffrl.support.machine import products, resolve_device, settle
from diffrl.training import checkpoint, compilation
from diffrl.training.logs import MetricsLog, Scores
from diffrl.training.loop import Evaluations, InLine, Loop, Trainer
from diffrl.training.online import OnlineTrainer
from diffrl.tuning.config import DPPOConfig
from envs.datasets import FILE_SUFFIXES, load_dataset
from envs.task import Task, open_task

EXPLODED = 10.0
"""A value estimate counts as exploded at this many times the largest return the data's rewards allow."""


def train(config: TrainConfig | str | Path, *, quiet: bool = False, **overrides: Any) -> Path:
    """Train, evaluate and save as `config` says; give the run's folder.

    config: a `TrainConfig`, a YAML file, or the name of a published one such as "diffusion_ql/maze2d-umaze-v1".
    overrides: fields of `TrainConfig`, e.g. steps=10_000, seeds=(0, 1).
    """
    if not isinstance(config, TrainConfig):
        config = configuration.find(str(config))
    unknown = [name for name in overrides if name not in TrainConfig.__dataclass_fields__]
    if unknown:
        known = TrainConfig.__dataclass_fields__
        raise UserError(
            f"There is no field {unknown[0]!r} of a run; {nearest(unknown[0], known)} An agent's fields are set by "
            "agent=dataclasses.replace(config.agent, ...)."
        )
    config = dataclasses.replace(config, **overrides)
    device = resolve_device(config.device)
    settle()
    claim(config.out)
    dataset, task, env = _open(config, quiet)
    compiled = compilation.wanted(config.compile, config.steps, device)
    config = dataclasses.replace(config, workers=choose_workers(config, device, task), compile=compiled)
    config = dataclasses.replace(config, eval_workers=choose_eval_workers(config, device, task))
    with lowering_memory(config, None):
        transitions, preprocessing = _prepare(config, dataset, env, device)
    if env is not None:
        env.close()
    largest = float(transitions.columns.rewards.abs().max()) / (1 - config.agent.discount)
    path = config.out or new_folder(config, config.agent.name)
    run = Run(
        path,
        dataclasses.replace(config, out=path),
        task,
        dataset.observation_size,
        dataset.action_size,
        preprocessing,
        EXPLODED * max(largest, 1.0),  # of data without rewards the estimates are the critics' own noise
        digest(dataset.columns()),
    )
    del dataset  # as large as the transitions, which are all that is needed from here on
    with lowering_memory(config, None):
        agent = run.build_agent(device)
    run.write()
    return _fit(run, agent, transitions, device, quiet)


def resume(
    path: Path | str,
    *,
    steps: int | None = None,
    device: str | None = None,
    eval_workers: int | None = None,
    quiet: bool = False,
) -> Path:
    """Go on with a run from its newest whole checkpoint, to `steps` steps in all (by default what it was made for).

    eval_workers: another number than the run's, on which no score depends.
    """
    run = Run.read(path)
    if run.finetune is not None:
        raise UserError(f"{path} fine-tunes a policy: `diffrl finetune policy --resume {path}` goes on with it.")
    device = resolve_device(device or run.config.device)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps or run.config.steps))
    saved, complaints = checkpoint.load_latest(run.path)
    for complaint in complaints:
        console.print(f"[yellow]{complaint}[/]")
    check_unfinished(run, saved)
    settle()
    dataset = same_data(run, quiet)
    with lowering_memory(run.config, run.path):
        transitions = run.preprocessing.transitions(dataset, run.config.agent.reward_tune, device)
    del dataset
    workers = choose_workers(run.config, device, run.task, saved)
    compiled = compilation.wanted(run.config.compile, run.config.steps, device)
    if run.config.compile and not compiled:
        console.print("The run was compiled and goes on uncompiled: equal to rounding, so not bit for bit.")
    config = dataclasses.replace(run.config, workers=workers, compile=compiled)
    if run.online is None:
        asked = config if eval_workers is None else dataclasses.replace(config, eval_workers=eval_workers)
        kept = saved if eval_workers is None else None
        config = dataclasses.replace(config, eval_workers=choose_eval_workers(asked, device, run.task, kept))
    run = dataclasses.replace(run, config=config)
    with lowering_memory(config, run.path):
        agent = run.build_agent(device)
    run.write_config()
    checkpoint.clean(run.path, saved.step)
    return _fit(run, agent, transitions, device, quiet, saved)


def online(
    path: Path | str,
    *,
    steps: int = ONLINE_STEPS,
    out: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    start_checkpoint: str = OnlineConfig.start_checkpoint,
    keep_offline: float = OnlineConfig.keep_offline,
    capacity: int = OnlineConfig.capacity,
    updates_per_step: int = OnlineConfig.updates_per_step,
    warm_up: int = OnlineConfig.warm_up,
    exploration: float = OnlineConfig.exploration,
    synthetic_share: float = OnlineConfig.synthetic_share,
    refit_every: int = OnlineConfig.refit_every,
    first_fit: int | None = OnlineConfig.first_fit,
    synthetic_samples: int = OnlineConfig.synthetic_samples,
    synthetic_steps: int = OnlineConfig.synthetic_steps,
    synthetic_width: int = OnlineConfig.synthetic_width,
    synthetic_solver: Solver = OnlineConfig.synthetic_solver,
    synthetic_sampling_steps: int = OnlineConfig.synthetic_sampling_steps,
    eval_every: int = ONLINE_EVAL_EVERY,
    eval_episodes: int | None = None,
    log_every: int | None = None,
    device: str | None = None,
    compile: bool | None = None,
    quiet: bool = False,
) -> Path:
    """Go on with the agents of an offline run in its environment, in a run of its own; give that run's folder.

    steps: environment steps. seeds: of the offline run's, by default all; each goes on from its own networks and
    optimisers, in an environment of its own. eval_episodes, log_every, device: by default the offline run's. compile:
    by default where it pays. The rest is explained in `diffrl.runs.config.OnlineConfig`. Such a run goes on by
    `resume`, and its step 0 is the offline agent.
    """
    offline = Run.read(path)
    if offline.online is not None:
        raise UserError(f"{path} is an online run already: `diffrl online --resume {path}`.")
    if offline.task.env_id is None:
        raise UserError(
            f"{path} was trained without an environment, so there is nothing to go on in. Train it with --env ID."
        )
    settings = OnlineConfig(
        Path(path),
        str(start_checkpoint),
        keep_offline,
        capacity,
        updates_per_step,
        warm_up,
        exploration,
        synthetic_share,
        refit_every,
        first_fit,
        synthetic_samples,
        synthetic_steps,
        synthetic_width,
        synthetic_solver,
        synthetic_sampling_steps,
    )
    if steps <= warm_up:
        raise UserError(
            f"--steps is {steps}, and the first {warm_up} only collect (--warm-up): expected more steps, or a shorter "
            "warm-up."
        )
    old = dataclasses.replace(offline.config, agent=offline.config.agent.going_online())
    offline = dataclasses.replace(offline, config=old)
    device = resolve_device(device or old.device)
    config = dataclasses.replace(
        old,
        steps=steps,
        seeds=old.seeds if seeds is None else tuple(seeds),
        eval_every=eval_every,
        eval_episodes=old.eval_episodes if eval_episodes is None else eval_episodes,
        log_every=old.log_every if log_every is None else log_every,
        device=device,
        compile=compilation.wanted(compile, steps, device),
        workers=1,  # the seeds learn as one stack, in this process
        eval_workers=0,  # which evaluates it too
        out=None if out is None else Path(out),
    )
    settle()
    agent, start_steps = load_stack(offline, config.seeds, settings.start_checkpoint, device)
    claim(config.out)
    dataset = same_data(offline, quiet)
    raw = Transitions.from_dataset(dataset).columns
    shift, scale = reward_tuning(config.agent.reward_tune, raw.rewards, raw.episodes, dataset.return_range())
    del raw
    transitions = offline.preprocessing.transitions(dataset, config.agent.reward_tune, device)
    del dataset
    folder = config.out or new_folder(config, f"{config.agent.name}-online")
    run = dataclasses.replace(
        offline,
        path=folder,
        config=dataclasses.replace(config, out=folder),
        online=dataclasses.replace(settings, start_steps=start_steps, reward_shift=shift, reward_scale=scale),
    )
    run.write()
    return _fit(run, agent, transitions, device, quiet)


def _fit(
    run: Run,
    agent: Agent,
    transitions: Transitions,
    device: str,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    """Train from the beginning, or from `saved`, to the end."""
    groups = group_seeds(run.config, device, saved)

    def build(say: Say) -> Trainer:
        return build_trainer(run, agent, transitions, groups, say)

    return fit(run, agent, _title(run, len(transitions), len(groups)), build, quiet, saved)


def fit(
    run: Run,
    agent: Agent,
    title: str,
    build: Callable[[Say], Trainer],
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
    go_on: str = "diffrl train --resume",
) -> Path:
    """Train from the beginning, or from `saved`, to the end, with the trainer that `build` makes.

    title: said first. build: hears where sentences for the user go. go_on: the command that goes on with the run.
    """
    config = run.config
    start = 0 if saved is None else saved.step
    task = {"env": run.task.env_id, "reference": run.task.reference, "comparable": run.task.comparable}
    about: dict[str, Any] = {"dataset": config.dataset, "seeds": list(config.seeds), **task}
    if run.online is not None:
        about["online"] = {"offline_run": str(run.online.offline_run), "start_steps": list(run.online.start_steps)}
    if run.finetune is not None:
        start_steps = list(run.finetune.start_steps)
        about["finetune"] = {
            "algo": run.finetune.algo,
            "start_run": str(run.finetune.start_run),
            "start_steps": start_steps,
        }
    scores = Scores(run.path, about, steps=range(start + 1))
    go_on_with = f"Go on with `{go_on} {run.path}`."

    with contextlib.ExitStack() as held:
        held.enter_context(products(str(agent.device), config.tf32))
        held.enter_context(lowering_memory(config, run.path, go_on))
        observer = held.enter_context(training_observer(config.steps, start, title, quiet))
        trainer = build(observer.message)
        held.callback(trainer.close)
        log = MetricsLog(run.path, config.seeds, start)
        held.callback(log.close)

        def record(step: int, returns: NDArray[np.float64]) -> None:
            entry = scores.add(step, returns, run.task.score if run.task.reference else None)
            values = entry.get("score", entry["mean_return"])
            log.scalars("score" if run.task.reference else "return", step, values)
            observer.message(report.evaluation_line(step, entry, config.eval_episodes))
            with contextlib.suppress(OSError):  # a full disk is the next checkpoint's to report
                report.learning_curve([run.path], run.path / "learning_curve.png")

        def evaluate(step: int) -> None:
            if run.task.env_id is not None:
                record(step, trainer.evaluate(step, observer.rollout))

        evaluations: Evaluations = InLine(evaluate)
        if config.eval_workers:
            evaluations = build_pool(run, record, observer.rollout, observer.message, go_on_with)
        held.callback(evaluations.close)

        def value_limit() -> float:
            """Rewards may be met online that the data do not hold."""
            largest = trainer.largest_reward() if isinstance(trainer, OnlineTrainer) else 0.0
            return max(run.value_limit, EXPLODED * largest / (1 - config.agent.discount))

        unscored, complaints = _unscored(run, start)
        if run.online is not None or run.finetune is not None:
            unscored = [step for step in unscored if step == start]  # what is evaluated is the learner as it stands
        loop = Loop(
            run.path,
            trainer,
            log,
            observer,
            evaluations,
            lambda: {int(best["step"]) for best in scores.best()},
            config.log_every,
            config.eval_every,
            agent.value_metrics,
            value_limit,
            evaluate_first=run.online is not None or run.finetune is not None,
            go_on=go_on_with,
            unscored=unscored,
        )
        for complaint in complaints:
            observer.message(f"[yellow]{complaint} Its evaluation is left out.[/]")
        if saved is not None:
            loop.restore(saved)
            if run.online is not None or isinstance(run.finetune, DPPOConfig):
                observer.message("The environment begins a new episode (its state cannot be saved); all else goes on.")
        try:
            loop.fit(config.steps)
        except OSError as error:
            kept = checkpoint.steps(run.path)
            last = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no checkpoint yet"
            raise UserError(
                f"Writing to {run.path} failed: {error.strerror or error}; {last}. "
                f"Mend that, then `{go_on} {run.path}`."
            ) from error
    if not quiet:
        report.print_run(run.path, scores)
    return run.path


def check_unfinished(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Raise UserError where a run has nothing left to do from `saved` on: all steps made, all evaluations in."""
    if saved.step > run.config.steps or (saved.step == run.config.steps and not _unscored(run, saved.step)[0]):
        raise UserError(f"{run.path} has {saved.step} steps already; give a larger --steps to go on.")


def _unscored(run: Run, last: int) -> tuple[list[int], list[str]]:
    """See `checkpoint.unscored`."""
    if run.task.env_id is None:
        return [], []
    scored = {int(entry["step"]) for entry in Scores(run.path, {}).evaluations}
    return checkpoint.unscored(run.path, scored, last)


def _open(config: TrainConfig, quiet: bool) -> tuple[OfflineDataset, Task, gymnasium.Env[Any, Any] | None]:
    """The data set and the environment, checked against each other."""
    dataset = load_dataset(config.dataset, rows=config.rows, progress=not quiet, action_limit=None)
    task, env = open_task(config.dataset, dataset, env=config.env, rows=config.rows)
    return dataset, task, env


def _prepare(
    config: TrainConfig, dataset: OfflineDataset, env: gymnasium.Env[Any, Any] | None, device: str
) -> tuple[Transitions, Preprocessing]:
    kind = "standard" if config.agent.normalise_observations else "identity"
    observations = normaliser(kind, torch.from_numpy(dataset.observations))
    preprocessing = Preprocessing(observations, action_scaling(env, dataset))
    return preprocessing.transitions(dataset, config.agent.reward_tune, device), preprocessing


def claim(out: Path | None) -> None:
    """Make the folder that a new run is to have. Raises UserError where there is a run in it."""
    if out is not None:
        if (out / "run.json").exists():
            raise UserError(f"{out} holds a run already: `diffrl train --resume {out}`, or choose another --out.")
        out.mkdir(parents=True, exist_ok=True)


def same_data(run: Run, quiet: bool) -> OfflineDataset:
    """The data set that a run was trained on. Raises UserError where it has changed."""
    dataset = load_dataset(run.config.dataset, rows=run.config.rows, progress=not quiet, action_limit=None)
    if digest(dataset.columns()) != run.fingerprint:
        raise UserError(
            f"The data set {run.config.dataset} is not the one that {run.path} was trained on (its contents have "
            "changed), so the run cannot go on as if it had not been cut. Restore the data, or start a new run."
        )
    return dataset


def new_folder(config: TrainConfig, kind: str) -> Path:
    """A folder of its own for the run, made here, so that two runs of the same second do not share one."""
    is_path = Path(config.dataset).suffix in FILE_SUFFIXES
    name = Path(config.dataset).stem if is_path else config.dataset.replace("/", "-").replace(":", "-")
    stem = f"{kind}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path = Path("runs") / f"{stem}{suffix}"
            path.mkdir(parents=True)
            return path
    raise UserError(f"runs/{stem} exists a thousand times; choose another --out.")


def _title(run: Run, n: int, groups: int) -> str:
    if run.online is not None:
        steps = ", ".join(f"{step:,}" for step in sorted(set(run.online.start_steps)))
        origin = f"{run.online.offline_run} (step {steps})"
        synthetic = run.online.synthetic_share
        share = f"{(1 - synthetic) * run.online.keep_offline:.0%} of each batch from its {n:,} offline transitions"
        if synthetic:
            share += f", {synthetic:.0%} from SynthER once it is fitted"
        return f"{run.config.agent.name} goes on from {origin} in {run.task.env_id}; {share}. Run: {run.path}"
    processes = run.config.eval_workers or 0
    beside = f" by {processes} process{'es' * (processes > 1)} while training goes on" if processes else ""
    where = f", evaluated in {run.task.env_id}{beside}" if run.task.env_id else ". NO SCORES: no environment (--env ID)"
    shared = f" {len(run.config.seeds)} seeds in {groups} processes." if groups > 1 else ""
    return f"{run.config.agent.name} on {run.config.dataset}: {n:,} transitions{where}.{shared} Run: {run.path}"
