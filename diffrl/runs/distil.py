"""Runs that distil a policy: `distil` from top to bottom, `resume_distil`; score against network calls."""

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from agents.base import Agent
from agents.consistency_policy import ConsistencyPolicy
from agents.flow_policy import FlowPolicy
from agents.registry import get as agent_schema
from diffrl.data.preprocessing import Preprocessing
from diffrl.data.transitions import Transitions
from diffrl.runs.acting import Actor, Evaluator, Share, source_of_randomness
from diffrl.runs.config import RunOptions
from diffrl.runs.kind import FILES, kind_of
from diffrl.runs.policy import StackEvaluator, build_agent, load_stack, refuse_misfit, tell_remarks
from diffrl.runs.run import Run, lowering_memory
from diffrl.runs.train import finished, fit, folder_stem, newest, same_data, watched
from diffrl.support import folder
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, counted
from diffrl.support.files import read_json
from diffrl.support.folder import IMAGES, claimed
from diffrl.support.machine import resolve_device, settle, usual_torch
from diffrl.support.plots import BLUE, GREY, ORANGE, finish, save
from diffrl.support.schema import held, read, refuse_others
from diffrl.support.seeds import generator_at
from diffrl.support.statistics import SINGLE, estimate
from diffrl.training import checkpoint
from diffrl.training.logs import UNCHANGED
from diffrl.tuning import distil_config
from diffrl.tuning.config import tenth
from diffrl.tuning.distil import DistilLearner, Map, Teacher, keep_critics, student_map, teacher_of
from diffrl.tuning.distil_config import DISTIL, DistilConfig, keeps_critics, student_config
from diffrl.tuning.owned import OwningTrainer
from diffrl.tuning.target import forward_policy, refuse_chunks
from envs.datasets import called
from envs.task import score_word

RESULT, PICTURE = "distil.json", "distil.png"
"""Score and distance to the teacher against network calls, in the run's folder."""
_ENTROPY = 0xD157
"""Sets the noise of the comparison apart from that of training and of evaluations."""
AS_IT_ACTS = "with the noise of its own sampler's steps, and its critics' choice among its actions, where it has them"
"""What sets a policy apart from its map."""
WHILE_TRAINED = "Not of this table: the student as it acts, in the evaluations while it was trained, other episodes:\n"
"""What the scores of a run are, which are printed below the comparison with the teacher."""
_STATES = 1000
"""States of the data in which teacher and student are compared."""


@usual_torch()
def distil(settings: DistilConfig, *, quiet: bool = False, **options: Any) -> Path:
    """Distil the policies of `settings.start_run` into a run of its own; give that run's folder.

    options: fields of `RunOptions`; steps (updates) are by default 10,000 and eval_every a tenth of them. At the end
    teacher and student are compared over network calls: a table, `distil.json` and `distil.png`. Raises UserError
    where the run's policy cannot be distilled so.
    """
    held(settings, DistilConfig, "settings")
    refuse_others(options, "a distilled run, beside its settings", RunOptions)
    settings.refuse_unused()
    asked = RunOptions(**options)
    if kind_of(settings.start_run) == IMAGES:
        raise UserError(
            f"{settings.start_run} is a run of an image model, which `diffrl.images.distil_job.distil` takes: expected "
            "a run whose policy is a diffusion or a flow."
        )
    start = Run.read(settings.start_run).within(None, asked.env_kwargs, asked.max_episode_steps)
    steps = distil_config.STEPS if asked.steps is None else asked.steps
    eval_every = tenth(steps) if asked.eval_every is None else asked.eval_every
    device = resolve_device(asked.device or start.config.device)
    asked = dataclasses.replace(asked, steps=steps, eval_every=eval_every, device=device)
    config = asked.applied(start.config)
    settle()
    teacher, start_steps = load_stack(start, config.seeds, settings.start_checkpoint, device)
    tell_remarks(start, settings.start_checkpoint, start_steps, quiet, starts=True)
    policy = forward_policy(teacher)
    refuse_chunks(teacher, "distillation")
    view = teacher_of(teacher, settings)
    if view.calls == 1:
        raise UserError(f"The policy of {start.path} samples in one call already: there is nothing to distil.")
    if settings.levels != DistilConfig.levels and not view.continuous:
        raise UserError(
            f"--levels {settings.levels}: {start.config.agent.name} is a chain, distilled at the {view.calls} noise "
            "levels that it was trained at: leave --levels out."
        )
    if settings.calls > view.calls:
        raise UserError(f"--calls {settings.calls}: the policy of {start.path} itself samples in {view.calls} calls.")
    settings = dataclasses.replace(settings, start_steps=start_steps)
    student = student_config(start.config.agent, settings, view.noise_range)
    config = dataclasses.replace(config, agent=student, compile=False)
    transitions = _transitions(start, device, quiet)
    frozen = getattr(policy, "n_early", 0)
    with claimed(config.out, folder_stem(config, f"{start.config.agent.name}-{settings.to}"), FILES) as path:
        kept: dict[str, Any] = {"name": start.config.agent.name, **dataclasses.asdict(start.config.agent)}
        run = dataclasses.replace(
            start,
            path=path,
            config=dataclasses.replace(config, out=path),
            kind=DISTIL,
            settings={**settings.to_dict(), "teacher": kept, "frozen_steps": frozen},
        )
        run.write()
        agent = build_agent(run, device)
        if keeps_critics(start.config.agent.name, settings.to):
            keep_critics(agent, teacher)
        _begin_as(agent, policy)
        return _fit(run, settings, agent, teacher, transitions, quiet)


def resume_distil(run: Run, *, steps: int | None, device: str | None, quiet: bool = False) -> Path:
    """Go on with a distilled run from its newest whole checkpoint: see `diffrl.resume`.

    Where it has made its steps and was cut in the comparison after them, that is made.
    """
    settings, teacher_config, frozen = _settings(run)
    device = resolve_device(device or run.config.device)
    steps = run.config.steps if steps is None else steps
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps, device=device))
    made = checkpoint.load_latest(run.path, checkpoint.LOOP)[0]
    compared = made.step == steps and (run.path / RESULT).exists()
    saved = made if made.step == steps and not compared else newest(run)
    settle()
    transitions = _transitions(run, device, quiet)
    agent = build_agent(run, device)
    teacher = teacher_config.build(run.observation_size, run.action_size, run.config.seeds, device)
    if frozen:
        teacher.networks[teacher.generative].freeze_start(frozen)
    refuse_misfit(run, agent, saved)
    run.goes_on(saved.step)
    for file in (RESULT, PICTURE):  # of fewer steps: a cut before the new ones must not leave them standing
        (run.path / file).unlink(missing_ok=True)
    return _fit(run, settings, agent, teacher, transitions, quiet, saved)


def _settings(run: Run) -> tuple[DistilConfig, Any, int]:
    """The settings of a distilled run, its teacher's agent's configuration, and how many of its steps are frozen."""
    values, source = dict(run.settings or {}), str(run.path)
    try:
        teacher, frozen = dict(values.pop("teacher")), int(values.pop("frozen_steps"))
        schema = agent_schema(str(teacher.pop("name")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path} is damaged: settings.yaml does not say what the teacher is ({error}).") from error
    return DistilConfig.from_dict(values, source), read(schema, teacher, source, "teacher."), frozen


def _transitions(run: Run, device: str, quiet: bool) -> Transitions:
    dataset = same_data(run, quiet)
    with lowering_memory(run.config, None, DISTIL):
        return run.preprocessing.transitions(dataset, "no", device)


@torch.no_grad()
def _begin_as(agent: Agent, teacher: torch.nn.Module) -> None:
    """Begin a flow's student with the weights of a teacher that is the same network, as reflow does."""
    policy = agent.policy
    shapes = [{n: t.shape for n, t in module.state_dict().items()} for module in (policy, teacher)]
    if isinstance(policy, FlowPolicy) and isinstance(teacher, FlowPolicy) and shapes[0] == shapes[1]:
        policy.load_state_dict(teacher.state_dict())


def _fit(
    run: Run,
    settings: DistilConfig,
    agent: Agent,
    teacher: Agent,
    transitions: Transitions,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    how = {"cd": "by consistency distillation", "scm": "by sCM"}[settings.loss]
    what = f"a consistency policy {how}" if settings.to == "consistency" else "a rectified flow"
    calls = counted(settings.calls, "network calls")
    title = f"{teacher.config.name} of {settings.start_run} is distilled into {what}, {calls}"
    title += f", evaluated in {escape(run.task.env_text)}" if run.task.env_id else ". NO SCORES: no environment"
    origin = {"to": settings.to, "start_run": str(settings.start_run), "start_steps": list(settings.start_steps)}
    with watched(run, agent, f"{title}. Run: {run.path}", quiet, saved) as observer:
        evaluator = StackEvaluator(run, agent)
        learner = DistilLearner(agent, teacher, settings)
        trainer = OwningTrainer(
            learner,
            transitions,
            settings.batch_size,
            source_of_randomness(agent),
            evaluator,
            capture=run.config.capture,
            on_close=evaluator.close,
        )
        scores = fit(run, agent, trainer, observer, saved, {"distil": origin, UNCHANGED: 0})
        rows = compare_calls(run, agent, teacher, learner.teacher, transitions, quiet)
        folder.write_json(run.path / RESULT, {"settings": settings.to_dict(), "rows": [r.to_dict() for r in rows]})
        _plot(run, rows, settings)
    if not quiet:
        console.print(_table(run, rows))
        console.print(f"Drawn: {run.path / PICTURE}")
    return finished(run, scores, quiet, WHILE_TRAINED)


# --- Score against network calls -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallsRow:
    """Teacher or student at one number of network calls."""

    who: str
    """teacher, student; or "teacher, as it acts", and so of the student: by its own sampler and its critics' choice."""
    calls: int
    distance: list[float] | None
    """Root of the mean square distance to the teacher's actions from the same noise, a seed; None: not of one map."""
    values: list[list[float]] | None
    """Scores, or returns where there are no references, an episode of each seed; None: no environment."""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return dataclasses.asdict(self)


class _Alone:
    """A map as what acts, without a choice by critics: observations as the environment has them -> its actions."""

    def __init__(self, sample: Map, calls: int, size: int, preprocessing: Preprocessing, seeds: Sequence[int]) -> None:
        device = next(iter(preprocessing.state_dict().values())).device
        self._sample, self._calls, self._size, self._parts = sample, calls, size, preprocessing
        self._generator = generator_at(*seeds, _ENTROPY, device=device)

    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        z = self._parts.observations(torch.as_tensor(observations, device=self._generator.device))
        shape = (self._calls, *z.shape[:-1], self._size)
        noise = torch.randn(shape, generator=self._generator, device=z.device)
        return np.asarray(self._parts.actions.inverse(self._sample(z, noise)).cpu().numpy())


def compare_calls(
    run: Run, agent: Agent, teacher_agent: Agent, teacher: Teacher, transitions: Transitions, quiet: bool = False
) -> list[CallsRow]:
    """Teacher and student over network calls: how far apart from the same noise, and scored, each in the same episodes.

    run: the student's. agent, teacher_agent: both, as they act. teacher: its map.
    """
    policy = agent.policy
    assert isinstance(policy, ConsistencyPolicy | FlowPolicy)
    own = int(getattr(run.config.agent, "denoising_steps", 0) or getattr(run.config.agent, "flow_steps", 1))
    most, seeds = teacher.calls, agent.seeds
    generator = generator_at(*seeds, _ENTROPY, device=agent.device)
    states = transitions.draw(_STATES, agent.n_seeds, generator).observations
    noise = torch.randn(
        (max(most, own, 4), *states.shape[:-1], agent.action_size), generator=generator, device=agent.device
    )
    goal = teacher.map()(states, noise[0])

    def distance(sample: Map, calls: int) -> list[float]:
        found: Tensor = (sample(states, noise[:calls]) - goal).square().mean((-2, -1)).sqrt()
        return [float(value) for value in found.cpu()]

    def first(sample: Map) -> Map:
        return lambda observations, draws: sample(observations, draws[0])

    evaluator = None
    if run.task.env_id is not None:
        evaluator = Evaluator.of(run.task, agent.n_seeds)
    preprocessing = run.preprocessing.to(agent.device)

    def score(act: Any) -> list[list[float]] | None:
        if evaluator is None:
            return None
        note = Share(on_progress, len(scored) * len(seeds) * run.config.eval_episodes, n_scored)
        returns, _ = evaluator(act, run.config.eval_episodes, (*seeds, _ENTROPY), note)
        scored.append(returns)
        outcomes = evaluator.outcomes(returns)
        values: NDArray[Any] = run.task.score(outcomes) if run.task.reference else returns
        return [[float(value) for value in row] for row in values]

    teachers = {n: first(teacher.map(n)) for n in sorted({1, 2, 4, most}) if n <= most}
    students = {n: student_map(policy, n) for n in sorted({1, 2, 4, own})}
    rows: list[CallsRow] = []
    scored: list[NDArray[np.float64]] = []
    n_scored = len(teachers) + len(students) + 2
    try:
        with work("Comparing teacher and student:", "episodes", quiet) as on_progress:
            for who, maps in (("teacher", teachers), ("student", students)):
                for calls, sample in maps.items():
                    alone = _Alone(sample, calls, agent.action_size, preprocessing, seeds)
                    rows.append(CallsRow(who, calls, distance(sample, calls), score(alone)))
            if evaluator is not None:
                for who, calls, one in (("teacher", most, teacher_agent), ("student", own, agent)):
                    act = Actor(one, run.preprocessing, _ENTROPY)
                    rows.append(CallsRow(f"{who}, as it acts", calls, None, score(act)))
    finally:
        if evaluator is not None:
            evaluator.close()
    return rows


def _table(run: Run, rows: Sequence[CallsRow]) -> Table:
    n = len(run.config.seeds)
    about = f"Distance: from the same first noise in {_STATES:,} states of the data, actions in [-1, 1]."
    if (run.settings or {}).get("to") == "consistency":
        about += " A consistency policy adds fresh noise between its calls: more of them need not come nearer."
    if rows[0].values is not None:
        error = _error(rows) or f" ({SINGLE})"
        episodes = counted(run.config.eval_episodes, "episodes")
        about += (
            f"\nScores: {episodes} a seed (--eval-episodes), the same for all rows{error}."
            f"\nAs it acts: {AS_IT_ACTS}; the other rows are the policy's map from noise to action alone."
        )
    table = Table(
        title=f"Teacher and student after the last step, {counted(n, 'seeds')}", caption=about, caption_justify="left"
    )
    for column in ("", "network calls", "distance to the teacher", _measure(run)):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        distance = "" if row.distance is None else f"{np.mean(row.distance):.3f}"
        score = "" if row.values is None else str(estimate(row.values))
        table.add_row(row.who, str(row.calls), distance, score)
    return table


def _error(rows: Sequence[CallsRow]) -> str:
    """What the errors of the rows' scores are taken over, as a clause; "" where they have none."""
    if rows[0].values is None or np.isnan((found := estimate(rows[0].values)).error):
        return ""
    return f", ± standard error over {found.over}"


def _measure(run: Run) -> str:
    return score_word(run.task.reference) if run.task.reference else "return"


def _plot(run: Run, rows: Sequence[CallsRow], settings: DistilConfig) -> None:
    """Draw the score, where there is an environment, and the distance to the teacher, against network calls.

    Teacher and student stand a little beside the number of calls, so that no error bar hides another.
    """
    from matplotlib.figure import Figure

    beside = {("teacher", True): 2**-0.06, ("teacher", False): 2**-0.02, ("student", True): 2**0.02}

    scored = rows[0].values is not None
    figure = Figure(figsize=(11, 4.4) if scored else (7, 4), layout="constrained")
    panels = figure.subplots(1, 1 + scored, squeeze=False)[0]
    numbers = sorted({row.calls for row in rows})
    for who, colour in (("teacher", GREY), ("student", BLUE)):
        own = [row for row in rows if row.who == who]
        calls = [row.calls for row in own]
        panels[-1].plot(calls, [np.mean(row.distance or 0) for row in own], marker="o", color=colour, label=who)
        for row in [*own, *(row for row in rows if row.who.startswith(f"{who},"))]:
            if row.values is None:
                continue
            found, alone = estimate(row.values), row.who == who
            panels[0].errorbar(
                row.calls * beside.get((who, alone), 2**0.06),
                found.mean,
                None if np.isnan(found.error) else found.error,
                marker="o" if alone else "*",
                markersize=6 if alone else 12,
                color=ORANGE if who == "student" and not alone else colour,
                label=(f"{who}, the policy alone" if row is own[0] else None) if alone else row.who,
                capsize=3,
            )
        if scored:
            at = [n * beside[who, True] for n in calls]
            panels[0].plot(at, [np.mean(row.values) for row in own if row.values is not None], color=colour)
    names = [_measure(run)] if scored else []
    for ax, name in zip(panels, [*names, "distance to the teacher's action"], strict=True):
        ax.set_xscale("log", base=2)
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.minorticks_off()
        ax.set(xlabel="network calls for an action", ylabel=name)
        finish(ax, legend="best" if ax is panels[-1] else None)
    if scored:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
    title = f"{settings.to} of {settings.start_run.name} on {called(run.config.dataset)}{_error(rows)}"
    figure.suptitle("\n".join(textwrap.wrap(title, 120 if scored else 75)), fontsize=11)
    save(figure, run.path / PICTURE)


def read_result(path: Path) -> dict[str, Any]:
    """What `distil.json` of a run's folder says."""
    return dict(read_json(path / RESULT))
