"""Where a run's seeds are trained: as one stack in this process, or in groups, each in a worker process."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate

import torch

from agents.base import Agent
from diffrl.data.transitions import Transitions
from diffrl.runs import workers as crew
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import CheckpointEvaluator
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.machine import cores
from diffrl.support.seeds import mix
from diffrl.training import checkpoint, compilation
from diffrl.training.compilation import compile_agent
from diffrl.training.evaluations import MOST_AT_ONCE, EvaluationPool
from diffrl.training.loop import Record, Trainer
from diffrl.training.stack import Progress, StackTrainer
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

    config: with its `workers` chosen. A run that goes on keeps its number where it can, except on another kind of
    device. No score depends on it. Raises UserError for what is asked for and cannot be.
    """
    wanted, n_seeds, kind = config.eval_workers, len(config.seeds), torch.device(device).type
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
    return min(wanted, MOST_AT_ONCE * n_seeds)


def chosen(
    config: TrainConfig,
    device: str,
    task: Task,
    saved: checkpoint.Checkpoint | None = None,
    eval_workers: int | None = None,
) -> TrainConfig:
    """The configuration with what it leaves to the machine: compiling, and the processes that train and evaluate.

    saved: of a run that goes on. eval_workers: another number than that run's. Raises UserError for what cannot be.
    """
    workers = choose_workers(config, device, task, saved)
    compiled = compilation.wanted(config.compile, config.steps, device)
    config = replace(config, workers=workers, compile=compiled)
    if eval_workers is not None:
        config, saved = replace(config, eval_workers=eval_workers), None
    return replace(config, eval_workers=choose_eval_workers(config, device, task, saved))


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
    if len(groups) == 1:
        return build_stack(run, agent, transitions, say)

    def hint() -> str:
        if checkpoint.steps(run.path):
            return f"Go on from the last checkpoint with `diffrl resume {run.path}`."
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
            starts = crew.training_requests(run, groups, rows)
            return WorkerTrainer(started, starts, value_limit=run.value_limit)
        except BaseException:
            started.close()
            raise


def build_pool(run: Run, record: Record, on_progress: Progress, say: Say, go_on: str) -> EvaluationPool:
    """The processes that evaluate an offline run's checkpoints. record: where an evaluation's returns are written."""
    n = run.config.eval_workers or 0
    names = [f"evaluations ({i + 1} of {n})" for i in range(n)]
    started = crew.start_crew(run, names, log_name="evaluation", hint=lambda: go_on, say=say)
    seeds, episodes = run.config.seeds, run.config.eval_episodes
    return EvaluationPool(started, crew.scoring_request(run), seeds, episodes, record, on_progress, say, go_on)


def build_stack(run: Run, agent: Agent, transitions: Transitions, say: Say) -> StackTrainer:
    """The seeds of `agent` as one stack in this process."""
    config = run.config
    if config.compile:
        compile_agent(agent, config.agent, transitions, say=say)
    evaluator = CheckpointEvaluator(run, agent.seeds)
    return StackTrainer(
        agent,
        transitions,
        config.agent.batch_size,
        source_of_randomness(agent),
        evaluator,
        capture=config.capture,
        value_limit=run.value_limit,
        on_close=evaluator.close,
    )


def source_of_randomness(agent: Agent, *salt: int) -> torch.Generator:
    """The list of seeds is the stack's one source of randomness: its batches and noise come from it."""
    return torch.Generator(device=agent.device).manual_seed(mix([*agent.seeds, *salt]))
