"""Trained policies: loaded, called on observations, and scored."""

import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from torch import Tensor

from agents.base import Agent, seed_slice
from agents.planning import Planner
from diffrl.data.observations import Part
from diffrl.data.preprocessing import Preprocessing
from diffrl.nets import check_state
from diffrl.runs import packages
from diffrl.runs.acting import Actor, Evaluator, Share
from diffrl.runs.diverged import why_short
from diffrl.runs.export import hub
from diffrl.runs.export.folder import check_is, open_policy
from diffrl.runs.kind import require_checkpoint
from diffrl.runs.observing import has_parts, joined, refuse_info, vectors
from diffrl.runs.run import Run
from diffrl.runs.unchanged import unchanged, unchanged_until
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, first_line, listed, shown
from diffrl.support.files import address_of, typed
from diffrl.support.folder import mends_scores, recorded, say_once
from diffrl.support.machine import resolve_device, settle, usual_torch
from diffrl.support.remote import local_folder
from diffrl.support.schema import Many, Natural, Seed, held
from diffrl.training import checkpoint
from diffrl.training.logs import UNCHANGED, Scores
from diffrl.tuning import config as tuning
from diffrl.tuning.target import prepare


class Policy:
    """A trained policy as a function: `action = policy(observation)`, NumPy in and out, (O,) or (B, O).

    Where the environment gives observations of several parts (a dictionary, or a tuple), these are taken as they are,
    or with B rows each, and joined as they were in training. The policy of an agent that plans follows its plan from
    call to call: call `reset` where an episode begins.

    noise_seed: what the noise of sampled actions is drawn from, together with the training seed: see `load_policy`.
    parts: those of the environment's observations, or what finds them when they are needed; (): it gives vectors.
    """

    def __init__(
        self,
        agent: Agent,
        preprocessing: Preprocessing,
        noise_seed: int = 0,
        parts: Sequence[Part] | Callable[[], Sequence[Part]] = (),
    ) -> None:
        self.agent = agent
        self._act = Actor(agent, preprocessing, noise_seed)
        self._parts = parts
        self._rows: int | None = None

    def __repr__(self) -> str:
        sizes = f"{self.agent.observation_size} observations -> {self.agent.action_size} actions"
        return f"<Policy of {type(self.agent).__name__}, seed {self.agent.seeds[0]}: {sizes}>"

    @usual_torch()
    def __call__(self, observation: NDArray[Any] | Sequence[Any] | Mapping[str, Any] | Tensor) -> NDArray[np.float32]:
        """Actions (A,) or (B, A), within the environment's bounds.

        Raises ValueError for observations of another size, for such that are no real numbers or not finite, and for a
        dictionary where nothing says how it makes a vector.
        """
        x = self._vectors(observation)
        if x.size == 0:
            return np.zeros((0, self.agent.action_size), np.float32)
        batch = np.atleast_2d(x)
        actions = self._act(batch[None])[0]
        self._rows = len(batch)
        return actions if x.ndim == 2 else np.asarray(actions[0])

    def _vectors(self, observation: Any) -> NDArray[np.float32]:
        """Observations (O,) or (B, O) from what an environment gives."""
        size = self.agent.observation_size
        if not has_parts(observation, size):
            return vectors(observation, size)
        if callable(self._parts):
            self._parts = tuple(self._parts())
        refuse_info(observation, self._parts)
        if not self._parts:
            what = f"the keys {listed([*map(str, observation)])}" if isinstance(observation, Mapping) else "a tuple"
            raise ValueError(
                f"expected observations of shape ({size},) or (B, {size}), got {what}; nothing here says how these "
                "parts make a vector: join them as those of the training data are"
            )
        return joined(observation, self._parts)

    def reset(self, rows: Sequence[int] | NDArray[Any] | None = None) -> None:
        """An episode begins: drop what was planned for the last one. Without effect on agents that do not plan.

        rows: of the B environments of a vectorised one, those whose episodes begin, by their numbers from 0 or as B
        booleans, such as `terminated | truncated`; None: all, whose number may change. A mask of 0 and 1 as whole
        numbers would be read as row numbers: make it boolean. Raises ValueError for rows that the last call had not,
        and for a row that is named twice, as in such a mask; TypeError for what are no rows.
        """
        if rows is None:
            self._rows = None
            self._act.reset()
            return
        found = np.asarray(rows)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "biu"):
            raise TypeError(f"expected rows as a list of numbers, or of a boolean for each row, got {shown(rows)}")
        n = self._rows
        if found.dtype == np.bool_:
            if n is not None and len(found) != n:
                raise ValueError(f"expected a boolean for each of the {n} rows of the last call, got {len(found)}")
            found = np.flatnonzero(found)
        chosen = [int(row) for row in found]
        if any(row < 0 or (n is not None and row >= n) for row in chosen):
            raise ValueError(f"no rows {shown(chosen)} of the {'last call' if n is None else f'{n} of the last call'}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"expected each row once, got {shown(chosen)}; a mask is to be boolean: mask.astype(bool)")
        self._act.reset(chosen)


def build_agent(run: Run, device: str, seeds: Sequence[int] | None = None) -> Agent:
    """A run's agent with freshly initialised networks, for some of its seeds or all."""
    seeds = run.config.seeds if seeds is None else seeds
    agent = run.config.agent.build(run.observation_size, run.action_size, seeds, device)
    if run.kind in tuning.ALGORITHMS:
        prepare(agent, tuning.from_dict(run.settings or {}, str(run.path)))
    if isinstance(agent, Planner):
        goal = run.task.goal_state if agent.reaches_goal else None
        agent.prepare(run.preprocessing, None if goal is None else torch.from_numpy(goal))
        if run.task.env_id is not None:
            agent.check_ready()
    return agent


_NEVER_EVALUATED = "as nothing has been evaluated in it yet"


def _evaluated(run: Run) -> bool:
    """Whether a run has, or has had, scores: a lost file is one that its checksums name."""
    return (run.path / "scores.json").exists() or "scores.json" in recorded(run.path)


def _there(run: Run, which: list[str], quiet: bool) -> list[str]:
    """Those of the checkpoints asked for that the run may have: without best, which is said, where it has no scores."""
    others = [name for name in which if name != "best"]
    if len(others) in (0, len(which)) or _evaluated(run):
        return which
    if not quiet:
        console.print(f"{run.path} has no best checkpoint, {_NEVER_EVALUATED}.", markup=False, highlight=False)
    return others


def _find_checkpoint(run: Run, which: str, seed_index: int) -> checkpoint.Checkpoint:
    """The last checkpoint that is whole, the best evaluated one of a seed that is whole, or that of a step."""
    steps = checkpoint.steps(run.path)
    if which == "last":
        saved, complaints = checkpoint.load_latest(run.path)
        for complaint in complaints:
            console.print(f"[yellow]{complaint}[/]")
        return saved
    if which == "best":
        about = {UNCHANGED: unchanged_until(run)}
        of_all = Scores(run.path, about).best()
        while best := Scores(run.path, about, steps=steps).best():
            step = int(best[seed_index]["step"])
            if (gone := int(of_all[seed_index]["step"])) not in checkpoint.steps(run.path):
                seed = run.config.seeds[seed_index]
                say_once(
                    f"{run.path}: the best evaluation of seed {seed}, of step {gone:,}, has no checkpoint any more: of "
                    f"those that are there step {step:,} is the best."
                )
            try:
                return checkpoint.load(run.path, step)
            except checkpoint.CheckpointError as error:
                say_once(f"{error} The best of the others is taken.")
                steps.remove(step)
        if not _evaluated(run):
            raise UserError(f"{run.path} has no best checkpoint, {_NEVER_EVALUATED}: take the last (--which last).")
        if not (run.path / "scores.json").exists():
            lost = "has lost its scores.json, which says which one is best"
        elif Scores(run.path, {}).damaged:
            lost = "has a damaged scores.json, which says which one is best"
        else:
            raise UserError(f"{run.path} has no evaluated checkpoint that is whole, so no best one: --which last.")
        raise UserError(f"{run.path} {lost}. {mends_scores(run.path)} Until then: --which last.")
    require_checkpoint(run.path, which)
    return checkpoint.load(run.path, int(which))


def _agent_at(run: Run, saved: checkpoint.Checkpoint, seed_index: int, device: str) -> Agent:
    """The agent of one seed alone, as a checkpoint of the stack has it."""
    agent = build_agent(run, device, [run.config.seeds[seed_index]])
    try:
        agent.load_state_dict(seed_slice(saved.learner, seed_index))
    except (ValueError, IndexError, KeyError) as error:
        raise _misfit(run, saved.step, error) from error
    return agent


def refuse_misfit(run: Run, agent: Agent, saved: checkpoint.Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint does not fit a run's agent, which stays as it is."""
    if type(agent).load_state_dict is not Agent.load_state_dict:  # which alone knows
        return
    try:
        check_state(agent.state_dict(), saved.learner)
    except ValueError as error:
        raise _misfit(run, saved.step, error) from error


def _misfit(run: Run, step: int, error: Exception) -> checkpoint.CheckpointError:
    """The error for a checkpoint that does not fit the agent that its run's configuration, and its code, make."""
    said = f"The checkpoint of step {step} in {run.path} does not fit"
    package, why = packages.of_agent(run.config.agent.name), first_line(error).rstrip(".")
    if not package:
        return checkpoint.CheckpointError(f"{said} its config.yaml: {why}.")
    made_by = run.made_by(step)
    by = (
        "" if not made_by else f" It was made with {made_by}{'' if made_by == package else f', and {package} is here'}."
    )
    return checkpoint.CheckpointError(
        f"{said} the networks that the code of {package.rpartition(' ')[0]} makes by its config.yaml: {why}.{by} Give "
        "the code the networks of then, or begin a new run."
    )


def remarks(run: Run, which: str, steps: Sequence[int], starts: bool = False) -> list[str]:
    """What is to be known of policies that are shown, each a sentence.

    That they are untrained, that their critics choose wrongly, that best says nothing.

    which: last, best or a step, as it was asked for. steps: the checkpoint that this is of each seed shown. starts:
    whether another run starts from them; then where a trained policy is found is said, too.
    """
    found = [untrained] if (untrained := run.untrained(min(steps))) else []
    if starts and not found and (began := run.began_untrained()):
        found = [began]
    elif found and starts:
        trained = [step for step in checkpoint.steps(run.path) if not run.untrained(step)]
        how = f"`diffrl resume {typed(run.path)} --steps N` trains it further"
        found = [f"{untrained} {f'--start-checkpoint {trained[-1]} names a trained one' if trained else how}."]
    elif not (found or starts) and which != "0" and (same := unchanged(run, min(steps))):
        found = [same]
    if run.wrong_critics:
        found.append(run.wrong_critics)
    if which == "best" and (equal := Scores(run.path, {}).all_equal()):
        found.append(equal)
    return found


def tell_remarks(
    run: Run, which: str, steps: Sequence[int], quiet: bool = False, of: str = "", starts: bool = False
) -> None:
    """Print the `remarks`, after `of`, which names the policies; by default the run's folder and `which`."""
    for sentence in [] if quiet else remarks(run, which, steps, starts):
        console.print(f"{of or f'{run.path}, {which}'}: {sentence}", style="yellow", markup=False, highlight=False)


def _tell_other_package(run: Run, step: int | None = None) -> None:
    """Say, once, where a run's agent is of another version of its package here: see `Run.other_package`."""
    if other := run.other_package(step):
        say_once(escape(other))


def load_agent(run: Run, seed: int, which: str = "last", device: str = "cpu") -> Agent:
    """The agent of one seed alone, from the `last` or `best` checkpoint or that of a step."""
    if seed not in run.config.seeds:
        raise UserError(f"{run.path} has no seed {seed}; it has {', '.join(map(str, run.config.seeds))}.")
    index = run.config.seeds.index(seed)
    saved = _find_checkpoint(run, which, index)
    _tell_other_package(run, saved.step)
    return _agent_at(run, saved, index, resolve_device(device))


def load_stack(run: Run, seeds: Sequence[int], which: str, device: str) -> tuple[Agent, tuple[int, ...]]:
    """The agents of several of a run's seeds as one stack, each as its own checkpoint has it, and those steps.

    which: as for `load_agent`. Where the checkpoints are of different steps, the counters that the stack shares are
    those of the latest.
    """
    missing = [seed for seed in seeds if seed not in run.config.seeds]
    if missing:
        raise UserError(f"{run.path} has no seed {missing[0]}; it has {', '.join(map(str, run.config.seeds))}.")
    positions = [run.config.seeds.index(seed) for seed in seeds]
    found = [_find_checkpoint(run, which, position) for position in positions]
    steps = tuple(saved.step for saved in found)
    _tell_other_package(run, max(steps, default=None))
    parts = [seed_slice(saved.learner, position) for saved, position in zip(found, positions, strict=True)]
    latest = parts[steps.index(max(steps))]
    agent = build_agent(run, device, seeds)
    state = {n: torch.cat([part[n] for part in parts]) if tensor.ndim else tensor for n, tensor in latest.items()}
    try:
        agent.load_state_dict(state)
    except ValueError as error:
        raise _misfit(run, max(steps), error) from error
    return agent, steps


@usual_torch()
def load_policy(
    run: Path | str,
    *,
    which: str | int = "last",
    seed: int | None = None,
    device: str = "cpu",
    env: str | None = None,
    noise_seed: int = 0,
) -> Policy:
    """The policy of a run, or one that was exported, for a plain Gymnasium loop.

    run: a run's folder, or that of an exported policy, on this machine; or an exported policy's id on the Hugging Face
    Hub, "user/name". A path that exists is taken before an id; "hf://user/name" is always the Hub's. Either folder may
    be at an address of fsspec's, such as "s3://bucket/runs/NAME", of which a copy is kept here.

    which: "last", "best" (by its evaluations), or a checkpoint's step. seed: the training seed, by default the run's
    first. An exported policy has one checkpoint of one seed. env: the id of another environment than the run's, which
    has to fit; an agent that plans takes its goal from it.

    noise_seed: another number gives other noise where actions are sampled. With the same one a policy that is loaded
    twice draws the same noise in the same calls; without one that is so, too.

    Raises TypeError for a run that is no path, UserError for one that is none or is damaged.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run is {shown(run)}; expected a path, or the Hub's id, as text.")
    if run == "":
        raise UserError("run is an empty text; expected the folder of a run or of an exported policy, or the Hub's id.")
    noise_seed = held(noise_seed, Seed, "noise_seed")
    if not str(run).lower().startswith(hub.SCHEME) and address_of(run) is not None:
        run = local_folder(run)
    if (exported := hub.exported(run)) is not None:
        opened = open_policy(exported, resolve_device(device), env)
        check_is(run, opened.agent.seeds[0], opened.step, seed, which)
        return Policy(opened.agent, opened.preprocessing, noise_seed, opened.parts)
    of_run = Run.read(run).within(env, (), None)
    if of_run.wrong_critics:
        say_once(f"{of_run.path}: {of_run.wrong_critics}")
    agent = load_agent(of_run, of_run.config.seeds[0] if seed is None else seed, str(which), device)
    return Policy(agent, of_run.preprocessing, noise_seed, of_run.task.parts)


# --- Scored: episodes in an environment -----------------------------------------------------------------------------


class CheckpointEvaluator:
    """The evaluations during an offline run: a function of one seed's weights in a checkpoint, the seed and the step.

    Each seed is a stack of one that acts on the CPU by one thread, uncompiled, whatever it is trained on and whichever
    process this is: the returns are the same bit for bit.

    seeds: those of the run's that are evaluated, by default all.
    """

    def __init__(self, run: Run, seeds: Sequence[int] | None = None) -> None:
        self._run = run
        self._seeds = run.config.seeds if seeds is None else tuple(seeds)
        self._rollout = Evaluator.of(run.task)

    def __call__(
        self, step: int, on_progress: Callable[[float, int], None], seeds: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """Outcomes of the seeds, or of these, at the checkpoint of `step`; on_progress as `Trainer.evaluate`'s.

        Returns (S, E), or returns and successes (S, E, 2): see `Evaluator.outcomes`.

        Raises CheckpointError where it is not whole.
        """
        run, seeds = self._run, self._seeds if seeds is None else seeds
        saved, episodes = checkpoint.load(run.path, step), run.config.eval_episodes
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            outcomes = []
            for i, seed in enumerate(seeds):
                act = Actor(_agent_at(run, saved, run.config.seeds.index(seed), "cpu"), run.preprocessing, step)
                note = Share(on_progress, i * episodes, len(seeds))
                outcomes.append(self._rollout.outcomes(self._rollout(act, episodes, (seed, step), note)[0])[0])
        finally:
            torch.set_num_threads(threads)
        return np.stack(outcomes)

    def close(self) -> None:
        """Close the simulators."""
        self._rollout.close()


class StackEvaluator:
    """The evaluations of a run that started from another one: of its agent as it stands, all seeds as one stack."""

    def __init__(self, run: Run, agent: Agent) -> None:
        self._run, self._agent = run, agent
        self._rollout = None
        if run.task.env_id is not None:
            self._rollout = Evaluator.of(run.task, agent.n_seeds)

    def __call__(self, step: int, on_progress: Callable[[float, int], None]) -> NDArray[np.float64]:
        """Outcomes after `step` steps, as `CheckpointEvaluator` gives them; on_progress as `Trainer.evaluate`'s."""
        assert self._rollout is not None
        act = Actor(self._agent, self._run.preprocessing, step)
        episodes, entropy = self._run.config.eval_episodes, (*self._agent.seeds, step)
        return self._rollout.outcomes(self._rollout(act, episodes, entropy, on_progress)[0])

    def close(self) -> None:
        """Close the simulators."""
        if self._rollout is not None:
            self._rollout.close()


@usual_torch()
def evaluate(
    path: Path | str,
    *,
    episodes: int = 100,
    which: str | int | Sequence[str | int] = ("last", "best"),
    seed: int = 0,
    device: str = "cpu",
    record: int = 0,
    quiet: bool = False,
    env: str | None = None,
    env_kwargs: Sequence[str] | Mapping[str, Any] = (),
    max_episode_steps: int | None = None,
) -> dict[Any, Any]:
    """Roll out a run's checkpoints: `{which: {"seeds": .., "step": [..], "returns": [[..]], "scores": ...}}`.

    which: one checkpoint or several, each last, best or a step, and so called in what is given; episodes: how many, for
    each seed.

    Where the environment tells of success, "successes" has it of each episode. Of a run without evaluations "best" is
    left out where other checkpoints are asked for too.

    Start states and noise are other ones than in the evaluations during training. seed: what they are drawn from, not a
    training seed. device: where the policy acts. record: of each training seed, the number of episodes whose
    observations are kept, under "paths", and, where the agent plans, the states of their first plans, under "plans".
    env, env_kwargs, max_episode_steps: another environment than the run's, or other arguments, by name or as words
    KEY=VALUE, or another time limit. Raises UserError where there is no environment.
    """
    for number, name, kind in ((episodes, "episodes", Many), (seed, "seed", Seed), (record, "record", Natural)):
        held(number, kind, name)
    run = Run.read(path).within(env, env_kwargs, max_episode_steps, quiet)
    if run.task.env_id is None:
        why = "was trained without an environment" if env is None else f"cannot be evaluated in --env {env}"
        raise UserError(f"{run.path} {why}: name one to evaluate in with --env ID.")
    if not quiet:
        _tell_other_package(run)
    settle()
    called: dict[str, Any] = {}  # of one step that is named twice, 20 and "20", the first name
    names: tuple[Any, ...] = (which,) if isinstance(which, str | int | Integral) else tuple(which)
    for one in names:
        called.setdefault(str(one), int(one) if isinstance(one, Integral) else one)
    asked = [*called]
    if not asked:
        raise UserError("which is empty: expected last, best or steps.")
    for name in asked:
        require_checkpoint(run.path, name)
    asked = _there(run, asked, quiet)
    seeds = range(len(run.config.seeds))  # a checkpoint that is not there is refused before any is scored
    steps = {name: [_find_checkpoint(run, name, index).step for index in seeds] for name in asked}
    if (short := why_short(run)) and {"last", "best"} & set(asked) and not quiet:
        console.print(f"{run.path}: {short}", style="yellow", markup=False, highlight=False)
    evaluator = Evaluator.of(run.task)
    result: dict[Any, Any] = {}
    known: dict[tuple[int, int], tuple[Any, ...]] = {}
    try:
        for name in asked:
            entry: dict[str, Any] = {"seeds": list(run.config.seeds)}
            entry |= {"step": [], "returns": []}
            for index, training_seed in enumerate(run.config.seeds):
                step = steps[name][index]
                if (training_seed, step) not in known:  # the last checkpoint may be the best
                    saved = checkpoint.load(run.path, step)
                    act = Actor(_agent_at(run, saved, index, resolve_device(device)), run.preprocessing, seed, record)
                    with work(f"{name}, seed {training_seed}, step {step:,}", "episodes", quiet) as on_step:
                        outcome = evaluator(act, episodes, (seed, training_seed), on_step, record)
                    outcomes = evaluator.outcomes(outcome[0])
                    known[training_seed, step] = (outcomes, *outcome, act.first_plans)
                outcomes, returns, paths, plans = known[training_seed, step]
                entry["step"].append(step)
                entry["returns"].append(returns[0].tolist())
                if record:
                    entry.setdefault("paths", []).append(paths)
                if plans is not None:
                    entry.setdefault("plans", []).append(list(plans))
                if outcomes.ndim == 3:
                    entry.setdefault("successes", []).append(outcomes[0, :, 1].astype(int).tolist())
                if run.task.reference:
                    entry.setdefault("scores", []).append(run.task.score(outcomes)[0].tolist())
            result[called[name]] = entry
            tell_remarks(run, name, entry["step"], quiet, name)
    finally:
        evaluator.close()
    return result
