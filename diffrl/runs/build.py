"""Where a run's seeds are trained: as one stack in this process, or in groups, each in a worker process."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.base import Agent
from diffrl.augment.synther.refit import Augmented, RefittingBuffer
from diffrl.data.replay import Mixture, ReplayBuffer
from diffrl.data.transitions import Source, Transitions
from diffrl.runs import workers as crew
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import CheckpointEvaluator, actor
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.machine import cores
from diffrl.support.seeds import mix
from diffrl.training import checkpoint
from diffrl.training.compilation import compile_agent
from diffrl.training.evaluations import MOST_AT_ONCE, EvaluationPool
from diffrl.training.loop import Trainer
from diffrl.training.online import ENTROPY, Collector, OnlineTrainer
from diffrl.training.rollout import Evaluator, rows_at_once
from diffrl.training.stack import Progress, Rollout, StackTrainer
from diffrl.training.workers import WorkerTrainer
from envs.task import Task

WORKERS_PAY_FROM = 5_000
"""Steps from which a run is long enough to pay for starting workers, which takes some seconds."""

_SYNTHETIC = 0x5E7
"""Sets SynthER's noise apart from the agent's."""

Say = Callable[[str], None]
"""Where sentences for the user go."""


def choose_workers(
    config: TrainConfig, device: str, task: Task, saved: checkpoint.Checkpoint | None = None
) -> int | None:
    """How many processes share the seeds: what the user says, else one a core where that pays and is possible.

    A run that goes on keeps those of its checkpoint. On a GPU all seeds are one stack, and the configuration's word
    stays, for the day the run moves to a CPU. The answer is recorded in the run's configuration, so that another
    machine trains it the same. Raises UserError for what cannot be.
    """
    if torch.device(device).type != "cpu":
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


def choose_eval_workers(
    config: TrainConfig, device: str, task: Task, saved: checkpoint.Checkpoint | None = None
) -> int:
    """How many processes evaluate while training goes on: what the user says, else one a seed where a core is left.

    config: with its `workers` chosen. A run that goes on keeps its number, except on another kind of device. No score
    depends on it. Raises UserError for what cannot be.
    """
    wanted, n_seeds, kind = config.eval_workers, len(config.seeds), torch.device(device).type
    if task.env_id is None:
        return 0
    if saved is not None and saved.info["device"] != kind:
        wanted = None
    obstacle = crew.obstacle(task)
    if wanted is None:
        training = config.workers or 1 if kind == "cpu" else 1
        pays = config.steps >= WORKERS_PAY_FROM and obstacle is None
        return max(0, min(n_seeds, cores() - training)) if pays else 0
    if wanted and obstacle is not None:
        raise UserError(f"The run is to be evaluated by {wanted} processes, but {obstacle}: --eval-workers 0.")
    return min(wanted, MOST_AT_ONCE * n_seeds)


def group_seeds(config: TrainConfig, device: str, saved: checkpoint.Checkpoint | None = None) -> list[tuple[int, ...]]:
    """The seeds in groups of nearly equal size, each a stack of its own, one a worker.

    A run that goes on keeps the groups of its checkpoint, each of which has a generator of its own.
    """
    kind, n_seeds = torch.device(device).type, len(config.seeds)
    if saved is not None and saved.info["device"] == kind:
        sizes = _saved_sizes(saved, config)
    else:
        n = 1 if kind != "cpu" else min(config.workers or 1, n_seeds)
        sizes = [n_seeds // n + (i < n_seeds % n) for i in range(n)]
    return [config.seeds[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


def _saved_sizes(saved: checkpoint.Checkpoint, config: TrainConfig) -> list[int]:
    """The groups' sizes; runs from before there were groups are one."""
    return list(saved.info.get("groups", [len(config.seeds)]))


def build_trainer(run: Run, agent: Agent, transitions: Transitions, groups: list[tuple[int, ...]], say: Say) -> Trainer:
    """The trainer of a run: `agent`, which holds all seeds, itself where they are one group, else workers.

    For workers the rows of `transitions` move to memory that all processes share.
    """
    if run.online is not None:
        return build_online(run, agent, transitions, say)
    if len(groups) == 1:
        return build_stack(run, agent, transitions, say)

    def hint() -> str:
        if checkpoint.steps(run.path):
            return f"Go on from the last checkpoint with `diffrl train --resume {run.path}`."
        return f"Nothing was saved yet: remove {run.path} and start the run again."

    with ExitStack() as held:  # until the workers have started: then they have the rows open themselves
        try:
            rows = held.enter_context(transitions.shared())
        except OSError as error:
            raise UserError(
                f"The data ({transitions.rows.nbytes / 2**20:.0f} MiB) could not be written to {tempfile.gettempdir()} "
                f"for the workers: {error}. Free some space, set TMPDIR to a folder that has it, or use --workers 1."
            ) from error
        names = [f"seed{'s' * (len(group) > 1)} {', '.join(map(str, group))}" for group in groups]
        started = crew.start_crew(run, names, files=[rows], hint=hint, say=say)
        try:
            return WorkerTrainer(started, crew.training_requests(run, groups, rows))
        except BaseException:
            started.close()
            raise


def build_pool(
    run: Run,
    record: Callable[[int, NDArray[np.float64]], None],
    on_progress: Progress,
    say: Say,
    go_on: str,
) -> EvaluationPool:
    """The processes that evaluate an offline run's checkpoints. record: hears an evaluation's step and returns."""
    n = run.config.eval_workers or 0
    names = [f"evaluations ({i + 1} of {n})" for i in range(n)]
    started = crew.start_crew(run, names, log_name="evaluation", hint=lambda: go_on, say=say)
    start = crew.scoring_request(run)
    return EvaluationPool(started, start, run.config.seeds, run.config.eval_episodes, record, on_progress, say, go_on)


def build_stack(run: Run, agent: Agent, transitions: Transitions, say: Say) -> StackTrainer:
    """The seeds of `agent` as one stack in this process."""
    if run.config.compile:
        compile_agent(agent, run.config.agent, transitions, say=say)
    evaluator = CheckpointEvaluator(run)

    def rollout(step: int, on_progress: Progress) -> NDArray[np.float64]:
        return evaluator(step, agent.seeds, on_progress)

    return _stack(run, agent, transitions, source_of_randomness(agent), rollout, evaluator.close)


def build_online(run: Run, agent: Agent, transitions: Transitions, say: Say) -> OnlineTrainer:
    """The seeds of `agent` as one stack in this process that learns in the environment: `transitions` are offline."""
    config, online = run.config, run.online
    assert online is not None
    if config.compile:
        # Every step acts, on one state a seed.
        act_rows = {1, rows_at_once(config.eval_episodes, agent.n_seeds)}
        compile_agent(agent, config.agent, transitions, act_rows=sorted(act_rows), say=say)
    generator = source_of_randomness(agent, ENTROPY)  # not the numbers of the offline run again
    sizes = transitions.observation_size, transitions.action_size
    buffer = ReplayBuffer(agent.n_seeds, min(online.capacity, config.steps), *sizes, agent.device)
    real = Mixture([transitions, buffer], [online.keep_offline, 1 - online.keep_offline])

    def draw(observations: Tensor) -> Tensor:
        actions = agent.act(observations, generator)
        if online.exploration:
            noise = torch.randn(actions.shape, generator=generator, device=actions.device)
            actions = (actions + online.exploration * noise).clamp(-1, 1)
        return actions

    collector = Collector(
        run.task.make,
        draw,
        buffer,
        agent.seeds,
        run.preprocessing,
        reward_shift=online.reward_shift,
        reward_scale=online.reward_scale,
        first_episode=int(transitions.columns.episodes.max()) + 1,
        device=agent.device,
    )
    source: Source = real
    synthetic = None
    if online.synthetic_share:
        synthetic = _synthetic(run, agent, transitions, buffer, real, say)
        source = Augmented(real, synthetic)
    return OnlineTrainer(
        _stack(run, agent, source, generator, *evaluation(run, agent)),
        collector,
        updates_per_step=online.updates_per_step,
        warm_up=online.warm_up,
        refitter=synthetic,
    )


def _synthetic(
    run: Run, agent: Agent, transitions: Transitions, buffer: ReplayBuffer, real: Mixture, say: Say
) -> RefittingBuffer:
    """SynthER of the rows as the agent sees them; each seed's model learns from the batches that its agent would."""
    assert run.online is not None

    def rows() -> Transitions:
        """Offline, where they are used, and online, of all seeds."""
        offline = [transitions.rows] if real.shares[0] else []
        return replace(transitions, rows=torch.cat([*offline, buffer.rows.flatten(0, 1)]))

    if agent.device.type == "cpu" and run.online.synthetic_width >= 1024:
        say("On a CPU each fit of the published size takes hours: --synthetic-width 256 --synthetic-steps 10000.")
    env = run.task.make()
    space: Any = env.observation_space
    env.close()
    scaled = run.preprocessing.observations
    bounds = [scaled(torch.as_tensor(bound, dtype=torch.float32)).numpy() for bound in (space.low, space.high)]
    return RefittingBuffer(
        run.online.refit,
        agent.seeds,
        mix([*agent.seeds, _SYNTHETIC]),
        rows,
        real,
        observation_size=transitions.observation_size,
        action_size=transitions.action_size,
        observation_bounds=(bounds[0], bounds[1]),
        device=agent.device,
        say=say,
    )


def source_of_randomness(agent: Agent, *salt: int) -> torch.Generator:
    """The list of seeds is the stack's one source of randomness: its batches and noise come from it."""
    return torch.Generator(device=agent.device).manual_seed(mix([*agent.seeds, *salt]))


def evaluation(run: Run, agent: Agent) -> tuple[Rollout, Callable[[], None]]:
    """What rolls out an agent as it stands, all seeds as one stack on its device, and what closes the simulators.

    For runs that learn in the environment or fine-tune; an offline run has `CheckpointEvaluator`.
    """
    evaluator = None if run.task.env_id is None else Evaluator(run.task.make, agent.n_seeds)

    def rollout(step: int, on_progress: Progress) -> NDArray[np.float64]:
        assert evaluator is not None
        act = actor(agent, run.preprocessing, step)
        return evaluator(act, run.config.eval_episodes, (*agent.seeds, step), on_progress)[0]

    return rollout, lambda: None if evaluator is None else evaluator.close()


def _stack(
    run: Run,
    agent: Agent,
    source: Source,
    generator: torch.Generator,
    rollout: Rollout,
    close: Callable[[], None],
) -> StackTrainer:
    capture = run.config.capture
    return StackTrainer(agent, source, run.config.agent.batch_size, generator, rollout, capture=capture, on_close=close)
