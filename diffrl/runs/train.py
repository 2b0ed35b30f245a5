"""Training from a data set: `train` is a run from top to bottom, `fit` makes its steps; `resume_offline` goes on."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from agents.base import Agent
from agents.planning_config import Diffuser
from diffrl.data.checks import Known, Taken, examine, take, tell, understand
from diffrl.data.d4rl import fingerprint
from diffrl.data.observations import without_goal
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import fit_preprocessing
from diffrl.data.transitions import Transitions
from diffrl.runs import packages, workers
from diffrl.runs.acting import cost_of_acting, source_of_randomness
from diffrl.runs.config import TrainConfig, chosen, group_seeds, meant, to_dict
from diffrl.runs.kind import FILES, OFFLINE, ONLINE
from diffrl.runs.policy import CheckpointEvaluator, build_agent, refuse_misfit
from diffrl.runs.run import Run, lowering_memory
from diffrl.support import failure
from diffrl.support.console import StepsBar, console, steps_bar
from diffrl.support.errors import DataError, UserError, counted
from diffrl.support.files import typed
from diffrl.support.folder import all_done, claimed, too_far, what_works
from diffrl.support.machine import products, resolve_device, settle, usual_torch
from diffrl.support.stopping import going_on
from diffrl.training import checkpoint
from diffrl.training.compilation import compile_agent
from diffrl.training.logs import SHOWN, UNCHANGED, MetricsLog, ScoreBook, Scores, plus_minus, tidy
from diffrl.training.loop import DivergedError, Evaluations, InLine, Loop, NoEvaluations, Trainer
from diffrl.training.sinks import TENSORBOARD
from diffrl.training.stack import StackTrainer
from envs import registry
from envs.datasets import FILE_SUFFIXES, called, load_dataset, load_known, whereabouts
from envs.rows import first_rows
from envs.task import Task, capped, data_limit, open_task, scaled_by_others, score_word

EXPLODED = 10.0
"""A value estimate counts as exploded at this many times the largest return the data's rewards allow."""

Say = Callable[[str], None]
"""Where sentences for the user go."""


@usual_torch()
def train(config: TrainConfig | str | Path, *, quiet: bool = False, **overrides: Any) -> Path:
    """Train, evaluate and save as `config` says; give the run's folder.

    config: a `TrainConfig`, a YAML file, the name of a shipped one such as "diffusion_ql/maze2d-umaze-v1", or of an
        agent with the data set: train("diffusion_ql", dataset="maze2d-umaze-v1") is `diffrl train --agent diffusion_ql
        --dataset maze2d-umaze-v1`, see `configuration`.
    overrides: fields of `TrainConfig`, e.g. steps=10_000, seeds=(0, 1), and of the agent's, agent={"q_weight": 2.0}.

    Raises UserError for what a user can get wrong. Ctrl-C and SIGTERM raise a KeyboardInterrupt once what was done is
    saved; its text says how to go on.
    """
    config, said = meant(config, overrides)
    if said and not quiet:
        console.print(said, markup=False)
    device = resolve_device(config.device)
    settle()
    with claimed(config.out, folder_stem(config, config.agent.name), FILES) as path:
        run, dataset, transitions = begun(config, device, path, quiet)
        algorithm = str(dataset.metadata.get("algorithm", ""))
        del dataset  # as large as the transitions, which are all that is needed from here on
        config = run.config
        with lowering_memory(config, None):
            agent = build_agent(run, device)
            try:
                agent.source(transitions)  # refuses here, before there is a folder, what the agent cannot learn from
            except DataError as error:
                if not algorithm.startswith("Flow-to-Better") or not hasattr(config.agent, "horizon"):
                    raise
                shorter = "Trajectories of Flow-to-Better have one row less than its --horizon."
                raise DataError(f"{error} {shorter}") from error
        run.write()

        # Steps, evaluations and checkpoints, to the end.
        return _fit_seeds(run, agent, transitions, quiet)


def begun(config: TrainConfig, device: str, path: Path, quiet: bool) -> tuple[Run, OfflineDataset, Transitions]:
    """A run of `config` in the folder `path`, not written yet; its data, as taken, and what its agent sees of them."""
    # The data, and the environment that they fit.
    dataset = load_dataset(config.dataset, rows=config.rows, progress=not quiet, action_limit=None)
    if config.rows is not None:
        config = dataclasses.replace(config, rows=first_rows(config.dataset, dataset, config.rows, quiet))
    task, env = open_task(
        config.dataset,
        dataset,
        env=config.env,
        rows=config.rows,
        env_kwargs=config.env_kwargs,
        max_episode_steps=config.max_episode_steps,
    )
    digest = fingerprint(dataset)
    dataset, known, taken = understand(dataset, env, config, quiet)
    longest = data_limit(dataset)
    task = capped(task, env, longest)
    config = chosen(config, device, task)  # what it leaves to the machine
    if config.agent.reward_tune != "no" and not config.agent.learns_from_rewards and not quiet:
        tuned = f"reward_tune={config.agent.reward_tune} changes nothing of its training"
        console.print(f"[yellow]{config.agent.name} learns without rewards: {tuned}.[/]")

    # What the agent sees of them.
    with lowering_memory(config, None):
        preprocessing = fit_preprocessing(dataset, known.bounds, scaling=config.agent.observation_scaling)
        episodes = config.agent.episodes(dataset)
        transitions = preprocessing.transitions(episodes, config.agent.reward_tune, device)
    if env is not None:
        env.close()
    if not quiet and (said := _goal_left_out(config, task, dataset)):
        console.print(said, markup=False)

    # What the run's folder holds.
    largest = float(transitions.columns.rewards.abs().max()) / (1 - config.agent.discount)
    run = Run(
        path,
        dataclasses.replace(config, dataset=whereabouts(config.dataset), out=path),
        task,
        transitions.observation_size,
        transitions.action_size,
        preprocessing,
        EXPLODED * max(largest, 1.0),  # of data without rewards the estimates are the critics' own noise
        digest,
        limit=known.limit,
        counted=taken.counted,
        data_limit=longest,
    )
    return run, dataset, transitions


def _fit_seeds(
    run: Run, agent: Agent, transitions: Transitions, quiet: bool, saved: checkpoint.Checkpoint | None = None
) -> Path:
    """Train the seeds on the transitions, from the beginning or from `saved` on, as one stack or in groups."""
    groups = group_seeds(run.config, agent.device.type, saved)
    with watched(run, agent, _title(run, len(transitions), len(groups)), quiet, saved) as observer:
        trainer: Trainer
        if len(groups) == 1:
            trainer = build_stack(run, agent, transitions, observer.message)
        else:
            trainer = workers.start_training(run, groups, transitions, observer.message)
        scores = fit(run, agent, trainer, observer, saved)
    return finished(run, scores, quiet)


def build_stack(run: Run, agent: Agent, transitions: Transitions, say: Say) -> StackTrainer:
    """The seeds of `agent` as one stack in this process."""
    config, source = run.config, agent.source(transitions)
    if config.compile:
        compile_agent(agent, config.agent, source, say=say)
    evaluator = CheckpointEvaluator(run, agent.seeds)
    return StackTrainer(
        agent,
        source,
        config.agent.batch_size,
        source_of_randomness(agent),
        evaluator,
        capture=config.capture,
        value_limit=run.value_limit,
        on_close=evaluator.close,
    )


@contextlib.contextmanager
def watched(
    run: Run, agent: Agent, title: str, quiet: bool, saved: checkpoint.Checkpoint | None = None
) -> Iterator[StepsBar]:
    """In the block, `agent` is trained: matrix products are as the run's configuration says, and progress is shown.

    What an earlier attempt failed by is removed from its folder; where this one diverges, that is kept there.

    title: the first line shown. Raises UserError, with what to lower, where memory runs out in the block.
    """
    start = 0 if saved is None else saved.step

    def kept() -> str:
        saved = checkpoint.steps(run.path)
        if not saved:  # the command itself begins anew
            return ""
        return f"Stopped after {saved[-1]} steps; saved. Go on with `diffrl resume {typed(run.path)}`."

    with (
        going_on(kept),
        products(agent.device.type, run.config.tf32),
        lowering_memory(run.config, run.path, run.kind),
        steps_bar(run.config.steps, start, title, SHOWN, quiet) as observer,
    ):
        failure.forget(run.path)
        try:
            yield observer
        except DivergedError as error:
            failure.keep(run.path, str(error))
            raise


def fit(
    run: Run,
    agent: Agent,
    trainer: Trainer,
    observer: StepsBar,
    saved: checkpoint.Checkpoint | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Scores:
    """Make the trainer's steps, from the beginning or from `saved` on; log, evaluate, save; the scores of the run.

    The trainer is closed at the end.

    origin: what scores.json says of the start of a run that started from another one. Such a run is evaluated before
    its first step.
    """
    config, start = run.config, 0 if saved is None else saved.step
    with contextlib.ExitStack() as held:
        held.callback(trainer.close)
        said = to_dict(dataclasses.replace(config, dataset=called(config.dataset), out=None))
        log = MetricsLog(run.path, config.seeds, start, config.log, {**said, "kind": run.kind})
        held.callback(log.close)
        task = {"env": run.task.env_id, "reference": run.task.reference, "comparable": run.task.comparable}
        kwargs = {"env_kwargs": run.task.env_kwargs} if run.task.env_kwargs else {}
        about: dict[str, Any] = {"dataset": called(config.dataset), "agent": config.agent.name}
        about["seeds"] = list(config.seeds)
        about |= {**task, **kwargs, **(origin or {})}
        if config.agent.untrained_steps and not origin:
            about[UNCHANGED] = config.agent.untrained_steps
        book = ScoreBook(run.path, run.task, Scores(run.path, about, steps=range(start + 1)), log, observer.message)
        held.callback(book.draw)
        evaluations: Evaluations = NoEvaluations()
        then = f"Go on with `diffrl resume {typed(run.path)}`."
        if config.eval_workers:
            evaluations = workers.start_evaluations(run, book, observer.episodes, observer.message, then)
        elif run.task.env_id is not None:
            evaluations = InLine(trainer, book, observer.episodes, then)
        held.callback(evaluations.close)
        loop = Loop(
            run.path,
            trainer,
            log,
            observer,
            evaluations,
            book,
            config.log_every,
            config.eval_every,
            agent.value_metrics,
            evaluate_first=bool(origin),
        )
        if run.kind in (OFFLINE, ONLINE):  # the others have settings of their own
            loop.advice = "A lower learning rate, a lower target rate or a smaller q-weight usually helps."
        if saved is not None:
            due, complaints = unscored(run, start)
            # With an origin what is evaluated is the learner as it stands, so no step but this one.
            loop.unscored = [step for step in due if step == start] if origin else due
            for complaint in complaints:
                observer.message(f"[yellow]{complaint} Its evaluation is left out.[/]")
            loop.restore(saved)
            if trainer.new_episodes:
                observer.message("The environment begins a new episode (its state cannot be saved); all else goes on.")
        untrained = run.untrained(max(start + 1, min(config.eval_every, config.steps)))
        if untrained:
            observer.message(f"[yellow]{untrained}[/]")
        if run.task.env_id is not None and (cost := cost_of_acting(agent)):
            observer.message(cost)
        try:
            loop.fit(config.steps)
        except OSError as error:
            raise UserError(
                f"Writing to {run.path} failed: {error.strerror or error}. Mend that. {what_works(run.path)}"
            ) from error
        except Exception as error:
            if not isinstance(error, UserError) and (package := packages.of_agent(config.agent.name)):
                error.add_note(_mend(run, package))  # the last line of its traceback
            raise
    return book.scores


def _mend(run: Run, package: str) -> str:
    """What to do where the agent of a package, in this version, has raised an error in training: a line."""
    saved = checkpoint.steps(run.path)
    kept = f"Saved up to step {saved[-1]:,}" if saved else "Nothing is saved"
    then = f"mend it, and `diffrl resume {typed(run.path)}` goes on." if saved else "mend it, and begin anew."
    return f"{kept}. The agent {run.config.agent.name} is of {package}: {then}"


def finished(run: Run, scores: Scores, quiet: bool, whose: str = "") -> Path:
    """Say where a run that has made its steps is, how it scored, and what to do next; give its folder.

    whose: said before the scores, where a table above them is of others.
    """
    path = run.path
    if quiet:
        return path
    if scores.evaluations:
        last = scores.evaluations[-1]
        kind = "score" if "score" in last else "mean_return"
        best = scores.best()
        what = score_word(scores.about["reference"]) if kind == "score" else "return"
        over = "" if last["error"] is None else f", ± standard error over {'seeds' if len(best) > 1 else 'episodes'}"
        console.print(
            f"{whose}[bold]{what}[/]: last {np.mean(last[kind]):z.1f}{plus_minus(last)}, best "
            f"{np.mean([b['value'] for b in best]):z.1f} (each seed's best evaluation); {counted(len(best), 'seeds')}, "
            f"{counted(len(last['returns'][0]), 'episodes')} each{over}"
        )
        if equal := scores.all_equal():
            console.print(equal)
        if kind == "score" and run.task.scored_by_success:
            timing = run.task.env_kwargs.get("timing", "post")
            timed = f"Success is timed `{timing}`"
            where = "" if scores.about["comparable"] else ", on data that are rebuilt, not OGBench's own, or in part"
            if registry.get(scores.about["reference"]).ours_alone:
                where = ", and in the data as nobody else's, which are compared with none"
            console.print(f"{timed}{where}: say so with the number.")
        elif kind == "score" and not run.task.faithful:
            console.print(scaled_by_others(scores.about["reference"]))
        if kind == "score" and run.task.fidelity:
            console.print(run.task.fidelity, markup=False, highlight=False)
        console.print(f"learning curve: {path / 'learning_curve.png'}")
        console.print(f"evaluate:       diffrl evaluate {typed(path)} --episodes 100")
    else:
        console.print(f"Done. The policy: diffrl.load_policy({str(path)!r}) in Python.")
    if TENSORBOARD in run.config.log.split(","):
        console.print(f"TensorBoard:    tensorboard --logdir {typed(path)}")
    return path


# --- Going on -------------------------------------------------------------------------------------------------------


def resume_offline(
    run: Run, *, steps: int | None, device: str | None, eval_workers: int | None, quiet: bool = False
) -> Path:
    """Go on with a run of `train` from its newest whole checkpoint: see `diffrl.resume`."""
    run, agent, transitions, saved = reopened(run, steps, device, eval_workers, quiet)
    return _fit_seeds(run, agent, transitions, quiet, saved)


def reopened(
    run: Run, steps: int | None, device: str | None, eval_workers: int | None, quiet: bool
) -> tuple[Run, Agent, Transitions, checkpoint.Checkpoint]:
    """A run that learns from data, ready to go on: as it is configured here and now, its agent, data and checkpoint.

    What a cut has left behind the checkpoint is cleaned away. Raises UserError where the run cannot go on.
    """
    device = resolve_device(device or run.config.device)
    config = dataclasses.replace(run.config, steps=steps or run.config.steps)
    run = dataclasses.replace(run, config=config)
    saved = newest(run)
    settle()
    dataset = same_data(run, quiet)
    with lowering_memory(config, run.path, run.kind):
        episodes = config.agent.episodes(dataset)
        transitions = run.preprocessing.transitions(episodes, config.agent.reward_tune, device)
    del dataset, episodes
    config = chosen(config, device, run.task, saved, eval_workers)
    if run.config.compile and not config.compile:
        console.print("The run was compiled and goes on uncompiled: equal to rounding, so not bit for bit.")
    run = dataclasses.replace(run, config=config)
    with lowering_memory(config, run.path, run.kind):
        agent = build_agent(run, device)
    refuse_misfit(run, agent, saved)
    run.goes_on(saved.step)
    return run, agent, transitions, saved


class Complete(Exception):
    """A run that is to go on has made all the steps that it is asked for: what to say, which is no mistake."""


def newest(run: Run) -> checkpoint.Checkpoint:
    """The newest whole checkpoint of a run, to go on from; says which later ones are damaged.

    Raises Complete where nothing is left to do: all steps are done, and all evaluations in. What a kill after the last
    of them left undone is done first. Raises UserError where it has made more steps than it is asked for.
    """
    saved, complaints = checkpoint.load_latest(run.path, checkpoint.LOOP)
    for complaint in complaints:
        console.print(f"[yellow]{complaint}[/]")
    if saved.step > run.config.steps:
        raise UserError(too_far(run.path, saved.step, run.config.steps))
    if saved.step == run.config.steps and not unscored(run, saved.step)[0]:
        tidy(run.path)
        raise Complete(all_done(run.path, saved.step))
    for said in checkpoint.made_again(run.path, saved.step, run.config.steps):
        console.print(f"[yellow]{said}[/]")
    return saved


def unscored(run: Run, last: int) -> tuple[list[int], list[str]]:
    """The steps up to `last` whose evaluations a cut has left undone, and complaints: see `checkpoint.unscored`."""
    if run.task.env_id is None:
        return [], []
    scored = {int(entry["step"]) for entry in Scores(run.path, {}).evaluations}
    return checkpoint.unscored(run.path, scored, last)


def same_data(run: Run, quiet: bool, now_at: str | None = None) -> OfflineDataset:
    """The data set that a run was trained on, its rows taken as they were; says what is odd about them.

    now_at: where it is now, if not where the run's folder says. Raises UserError where it has changed, or is not there.
    """
    stored = run.config.dataset
    name = now_at or stored
    try:
        dataset = load_known(name, run.fingerprint, rows=run.config.rows, progress=not quiet)
        dataset = without_goal(dataset, run.observation_size)
    except UserError as error:
        where = "" if now_at else f" {run.path / 'config.yaml'} says that the run's data are {stored}."
        raise UserError(f"{error}{where} {_where_they_are_now(run)}") from error
    if (found := fingerprint(dataset)) != run.fingerprint:
        digests = f"SHA-256 {found[:12]}, of the run's {run.fingerprint[:12]}"
        if now_at:
            raise UserError(
                f"{name} holds other data than those that {run.path} was trained on ({digests}): nothing was changed. "
                f"{_where_they_are_now(run)}"
            )
        anew = f": `diffrl train {typed(run.path / 'config.yaml')} --out NEW`" if run.kind == OFFLINE else ""
        raise UserError(
            f"The data set {name} is not the one that {run.path} was trained on: its contents have changed "
            f"({digests}). Put the old data back; or, {_where_they_are_now(run, 'where a copy of them is elsewhere')} "
            f"To learn from the data as they are now, begin a new run{anew}."
        )
    return taken_by(run, dataset, quiet)


def _where_they_are_now(run: Run, when: str = "Where they have moved") -> str:
    """What to do where a run's data are at another place than its folder says, as a sentence."""
    return (
        f"{when}, `diffrl resume {typed(run.path)} --dataset PATH` notes the path down, also in a run that is finished."
    )


def taken_by(run: Run, dataset: OfflineDataset, quiet: bool = True) -> OfflineDataset:
    """Data of a run's kind with their rows taken as the run takes its own; says what is odd about them."""
    known, taken = (
        Known(run.action_bounds(dataset), run.limit, run.task.env_id or ""),
        Taken.by(run.config, run.counted),
    )
    tell(examine(dataset, known, taken), run.config.dataset, quiet)
    return take(dataset, known, taken, run.preprocessing.actions)


def moved(run: Run, dataset: str, quiet: bool) -> Run:
    """The run with its data where they are now, as its folder says from now on.

    Raises UserError where the contents of `dataset` are not those that the run was trained on.
    """
    now_at = whereabouts(dataset)
    same_data(run, quiet, now_at)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, dataset=now_at))
    run.seal()
    run.write_config()
    console.print(f"{run.path}: its data are at {now_at} from now on.", markup=False)
    return run


# --- What is meant, where it goes, what is said first ---------------------------------------------------------------


def folder_stem(config: TrainConfig, kind: str) -> str:
    """What the name of a run's folder begins with, where the user gives none."""
    is_path = Path(config.dataset).suffix in FILE_SUFFIXES
    name = Path(config.dataset).stem if is_path else config.dataset.replace("/", "-").replace(":", "-")
    return f"{kind}-{name}"


def _goal_left_out(config: TrainConfig, task: Task, dataset: OfflineDataset) -> str:
    """A sentence where the agent could plan to the goal of its environment, and is not told to; else ""."""
    agent = config.agent
    if not (isinstance(agent, Diffuser) and agent.could_reach(dataset.observation_size, dataset.action_size)):
        return ""
    try:
        known = task.goal_state is not None
    except UserError:  # it says no observation, which is of no matter to plans without a goal
        return ""
    if not known:
        return ""
    return f"{task.env_id} has a goal, to which this Diffuser does not plan: --agent.goal-reaching has it do so."


def _title(run: Run, n: int, groups: int) -> str:
    processes = run.config.eval_workers or 0
    beside = f" by {processes} process{'es' * (processes > 1)} while training goes on" if processes else ""
    env = escape(run.task.env_text)
    where = f", evaluated in {env}{beside}" if run.task.env_id else ". NO SCORES: no environment (--env ID)"
    shared = f" {len(run.config.seeds)} seeds in {groups} processes." if groups > 1 else ""
    return (
        f"{run.config.agent.name} on {run.config.dataset}: {counted(n, 'transitions')}{where}.{shared} Run: {run.path}"
    )
