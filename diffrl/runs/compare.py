"""Runs of policies side by side: from the same start states, with the same noise, and whether they differ by more."""

import base64
import contextlib
import csv
import html
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents import AGENTS
from diffrl.runs.acting import Actor, Evaluator
from diffrl.runs.differences import Difference, difference
from diffrl.runs.diverged import why_short
from diffrl.runs.policy import load_stack, remarks, tell_remarks
from diffrl.runs.report import draw_maze, floor_in
from diffrl.runs.run import Run
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, counted, joined
from diffrl.support.files import address_of, path_of
from diffrl.support.folder import ABOUT
from diffrl.support.machine import settle, usual_torch
from diffrl.support.names import apart, breakable, with_agents, wrapped
from diffrl.support.plots import BLUE, COMPARED, GREEN, GREY, ORANGE, PAGE_STYLE, comparison_at, png, write_comparison
from diffrl.support.schema import held, several_paths
from diffrl.support.seeds import generator_at
from diffrl.support.statistics import estimate
from diffrl.training import checkpoint
from diffrl.training.logs import returns_of
from envs.task import Task, benchmark_family, references_of, score_word

DRAWN = 4
"""Start states whose trajectories are drawn."""


@dataclass(frozen=True)
class Rolled:
    """What the policies of a run did."""

    run: Run
    place: str
    """Where the run is, as it was asked for: a path or an address."""
    name: str
    """What it is called beside the others: the last part of its place, or all of it where another ends so too."""
    steps: tuple[int, ...]
    """The checkpoint of each of the run's seeds."""
    outcomes: NDArray[np.float64]
    """Of each seed from each start state: returns (S, E), or returns and successes (S, E, 2)."""
    paths: list[NDArray[np.float32]]
    """The observations (T, O) of the first seed's first episodes."""
    remarks: tuple[str, ...] = ()
    """What is to be known of these policies: see `diffrl.runs.policy.remarks`."""

    @property
    def amount(self) -> str:
        """Of how many seeds and start states each."""
        seeds, starts = self.returns.shape
        return f"{counted(seeds, 'seeds')}, {counted(starts, 'start states')}{' each' if seeds > 1 else ''}"

    @property
    def returns(self) -> NDArray[np.float64]:
        """(S, E) of each seed from each start state."""
        return returns_of(self.outcomes)


def compared(ours: Rolled, theirs: Rolled, task: Task, names: tuple[str, str]) -> Difference:
    """How much more one run reaches than another, of the seeds by which they compare. names: of the two."""
    common = common_seeds(ours, theirs)
    return difference(_scored(ours, task, common), _scored(theirs, task, common), names, common)


def common_seeds(one: Rolled, other: Rolled) -> tuple[int, ...]:
    """The seeds that both of two runs have, where each is to be compared with itself; (): all are, as two groups.

    They are where one run was made from the other, as by fine-tuning, or both from a third: then a seed of the one
    began as the same seed of the other, and how seeds differ among themselves is not what was made of them. Seeds that
    have but their number in common are two groups: see `diffrl.runs.differences`.
    """
    others = other.run.config.seeds
    common = tuple(seed for seed in one.run.config.seeds if seed in others)
    return common if common and set(_lineage(one)) & set(_lineage(other)) else ()


def _lineage(rolled: Rolled) -> list[str]:
    """Where a run is, and the runs that it was made from, the nearest first, as far as these are here.

    Of one that is gone its absolute path, or its address. A configuration that online training began with is no run.
    """
    run, found = rolled.run, [rolled.place if address_of(rolled.place) else str(rolled.run.path.resolve())]
    with contextlib.suppress(UserError):  # of one that is damaged
        while start := str((run.settings or {}).get("start_run") or (run.settings or {}).get("offline_run") or ""):
            # Relative to where the command was given, which may be any folder above the run.
            above = () if address_of(start) else (Path(), *run.path.resolve().parents)
            here = next((place / start for place in above if (place / start / ABOUT).is_file()), None)
            gone = bool(address_of(start)) or (Path(start).is_absolute() and not Path(start).suffix)
            place = str(here.resolve()) if here is not None else start
            if place in found or (here is None and not gone):
                break
            found.append(place)
            if here is None:
                break
            run = Run.read(here)
    return found


# --- rolled out -----------------------------------------------------------------------------------------------------


@usual_torch()
def compare(
    paths: Path | str | Sequence[Path | str],
    out: Path | str = "compare.html",
    *,
    episodes: int = 50,
    which: str | int = "last",
    seed: int = 0,
    env: str | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Compare runs of policies with the first of them; write a page, and beside it its picture (PNG) and numbers (CSV).

    All policies start in the same `episodes` states. Those of one seed draw the same noise, so far as they draw alike;
    of runs without a common seed, those of the seeds in the same place. which: the `last` or `best` checkpoint, or that
    of a step. seed: what start states and noise are drawn from. env: the id of another environment than the runs'.
    Gives the files' paths.

    A comparison that is at `out` is replaced. Raises UserError where other files are there, for fewer than two runs,
    and for runs that are not of one environment.
    """
    out, paths = Path(held(out, Path, "out")), several_paths(paths, "paths")
    if len(paths) < 2:
        two = "by two runs or more: diffrl compare RUN RUN ..., in Python compare([RUN, RUN, ...])"
        raise UserError(f"Compare what with what? Policies are compared {two}.")
    comparison_at(out)
    runs = [Run.read(path).within(env, (), None) for path in paths]
    places = [address_of(path) or str(path_of(path)) for path in paths]
    task = _one_task(runs, places)
    settle()
    rolled = [
        _roll(run, place, name, episodes, str(which), seed, quiet, _streams(run, runs[0]))
        for run, place, name in zip(runs, places, _names(places), strict=True)
    ]
    picture = _picture(rolled, task)
    written = write_comparison(out, page(rolled, task, seed, picture, str(which)), picture, _csv(rolled))
    if not quiet:
        what = score_word(task.reference) if task.reference else "return"
        for one in rolled:
            scored = estimate(_scored(one, task)).explained
            console.print(f"{one.place}: {what} {scored}, {one.amount}", markup=False)
        if differ := lengths(rolled, places, str(which)):
            console.print(differ, style="yellow", markup=False, highlight=False)
        if task.fidelity:
            console.print(task.fidelity, markup=False, highlight=False)
        for other in rolled[1:]:
            names = other.place, rolled[0].place
            found = compared(other, rolled[0], task, names)
            less = f"{names[0]} - {names[1]}: {found.over_starts.mean:+.2f}{found.among}. {found.verdict}"
            console.print(less, markup=False)
            overs = ("seeds and start states", found.both), ("start states", found.starts), ("seeds", found.seeds)
            for over, interval in overs:
                console.print(f"  95 % interval over {over}: {interval}", markup=False, highlight=False)
    return written


def _names(places: Sequence[str]) -> list[str]:
    """What runs at these places are called beside each other: by the last part, or where two share it by the whole."""
    short = [PurePosixPath(place.rstrip("/")).name or place for place in places]
    return [name if short.count(name) == 1 else place for name, place in zip(short, places, strict=True)]


def _called(rolled: Sequence[Rolled]) -> tuple[list[str], list[str], str]:
    """What runs are called on the page; beside each other, with their agents where a name hides one; what all share."""
    whole = [one.name for one in rolled]
    names, shared = apart(whole)
    words = [name.replace("-", " ") for name in whole]  # diffusion_ql-dppo-DATA tells of diffusion_ql dppo
    return names, with_agents(names, words, [one.run.agent_name for one in rolled], AGENTS), shared


def _one_task(runs: Sequence[Run], places: Sequence[str]) -> Task:
    """The task that all runs share. places: where they are, for errors. Raises UserError where they share none."""
    first = runs[0]
    for run, place in zip(runs, places, strict=True):
        if run.task.env_id is None:
            raise UserError(f"{place} was trained without an environment: name one to compare in with --env ID.")
        if str(run.task.spec) != str(first.task.spec):
            raise UserError(
                f"{places[0]} acts in {first.task.spec} and {place} in {run.task.spec}: expected runs of one "
                "environment, or --env ID to compare them in."
            )
        sizes = (run.observation_size, run.action_size)
        if sizes != (first.observation_size, first.action_size):
            raise UserError(f"{places[0]} and {place} are not of the same observations and actions.")
    return first.task


def _streams(run: Run, first: Run) -> list[int]:
    """Which stream of noise each of a run's seeds draws from: that of the same seed of the first run, if it has one."""
    seeds, firsts = run.config.seeds, first.config.seeds
    if not set(seeds) & set(firsts):
        return list(range(len(seeds)))
    return [firsts.index(seed) if seed in firsts else len(firsts) + i for i, seed in enumerate(seeds)]


def _roll(
    run: Run, at: str, name: str, episodes: int, which: str, seed: int, quiet: bool, streams: Sequence[int]
) -> Rolled:
    evaluator, outcomes, steps = Evaluator.of(run.task), [], []
    paths: list[NDArray[np.float32]] = []
    try:
        for place, training_seed in enumerate(run.config.seeds):
            agent, (step,) = load_stack(run, [training_seed], which, "cpu")
            act = Actor(agent, run.preprocessing, generator=generator_at(seed, streams[place]))
            with work(f"{name}, seed {training_seed}, step {step:,}", "episodes", quiet) as on_step:
                found, drawn = evaluator(act, episodes, (seed,), on_step, 0 if place else DRAWN)
            outcomes.append(evaluator.outcomes(found)[0])
            steps.append(step)
            paths = paths or drawn
    finally:
        evaluator.close()
    tell_remarks(run, which, steps, quiet, f"{at}, {which}")
    said = remarks(run, which, steps)
    if short := why_short(run, which in ("last", "best")):
        said.append(short)
        if not quiet:
            console.print(f"{at}: {short}", style="yellow", markup=False, highlight=False)
    return Rolled(run, at, name, tuple(steps), np.stack(outcomes), paths, tuple(said))


def lengths(rolled: Sequence[Rolled], names: Sequence[str], which: str) -> str:
    """A sentence where runs of one kind, whose last or best checkpoints are compared, are of different lengths.

    Runs of several kinds count different things as steps; so nothing is said of them.
    """
    made = [max(checkpoint.steps(one.run.path)) for one in rolled]
    if which not in ("last", "best") or len({one.run.kind for one in rolled}) > 1 or len(set(made)) == 1:
        return ""
    each = [f"{name} of {counted(n, 'steps')}" for name, n in zip(names, made, strict=True)]
    return f"The runs are of different lengths: {joined(each)}."


def _scored(rolled: Rolled, task: Task, seeds: Sequence[int] = ()) -> NDArray[np.float64]:
    """Returns (S, E), or scores x100 where the task has references. seeds: whose, in this order; (): of all."""
    scores: NDArray[np.float64] = task.score(rolled.outcomes) if task.reference else rolled.returns
    places = rolled.run.config.seeds
    return scores[[places.index(seed) for seed in seeds or places]]


# --- shown ----------------------------------------------------------------------------------------------------------


def _picture(rolled: Sequence[Rolled], task: Task) -> bytes:
    """In a maze, what each run's first seed drove, a column a run; else returns against the first's; a PNG."""
    from matplotlib.figure import Figure

    with closing(task.make()) as env:
        env.reset(seed=0)
        floor = floor_in(env)
    _, names, _ = _called(rolled)
    if floor is not None:
        n = len(rolled[0].paths)
        figure = Figure(figsize=(2.8 * len(rolled), 2.6 * n), layout="constrained")
        axes = figure.subplots(n, len(rolled), squeeze=False)
        for column, one, called in zip(axes.T, rolled, names, strict=True):
            for start, ax in enumerate(column):
                draw_maze(ax, floor.grid, floor.goal, [floor.places(one.paths[start])], floor.radius)
                name = f"{wrapped(called, 34)}\nseed {one.run.config.seeds[0]}, " if start == 0 else ""
                ax.set_title(f"{name}return {one.returns[0, start]:z.0f}", fontsize=9)
    else:
        figure = Figure(figsize=(4.4 * (len(rolled) - 1), 4.4), layout="constrained")
        panels = figure.subplots(1, len(rolled) - 1, squeeze=False)[0]
        for ax, one, called, colour in zip(
            panels, rolled[1:], names[1:], (BLUE, ORANGE, GREEN) * len(rolled), strict=False
        ):
            common = common_seeds(one, rolled[0])
            ours, theirs = (_scored(each, task, common).mean(0) for each in (one, rolled[0]))
            ends = [min(ours.min(), theirs.min()), max(ours.max(), theirs.max())]
            ax.plot(ends, ends, color=GREY, linewidth=1)
            ax.scatter(theirs, ours, color=colour, s=14)
            ax.set(xlabel=wrapped(names[0], 48), ylabel=wrapped(called, 48), title="each point a start state")
    return png(figure)


def page(rolled: Sequence[Rolled], task: Task, seed: int, picture: bytes, which: str = "last") -> str:
    """The page's HTML, which needs no other file: what each run reaches, the differences and their verdicts, a picture.

    seed: what the start states were drawn from. which: the checkpoint: last, best or a step.
    """
    first, n = rolled[0], rolled[0].returns.shape[1]
    what = score_word(task.reference) if task.reference else "return"
    rows, several = [], []
    names, labels, shared = _called(rolled)
    for one, name, label in zip(rolled, names, labels, strict=True):
        config, scores = one.run.config, _scored(one, task)
        about = f"{one.run.agent_name}, seeds {', '.join(map(str, config.seeds))}, steps {_steps(one.steps)}"
        about = ". ".join([about, *one.remarks])
        rows.append(
            f"<tr><td><b>{breakable(name)}</b><br>{html.escape(about)}</td>"
            f"<td class=n>{estimate(scores).explained}<br>{one.amount}</td>"
            f"<td class=n>{np.median(scores):z.1f}</td></tr>"
        )
        if one is not first:
            found = compared(one, first, task, (label, labels[0]))
            both = f"{breakable(label)} − {breakable(labels[0])}"
            shown = replace(found, single=tuple(breakable(lone) for lone in found.single))  # HTML
            several.append(
                f"<tr><td><b>{both}</b>{found.among}<br>{html.escape(found.verdict)}</td>"
                f"<td class=n>{shown.both}</td><td class=n>{shown.starts}</td><td class=n>{shown.seeds}</td></tr>"
            )
    caveat = ""
    if task.scored_by_success and not task.comparable:
        caveat = " Data or environment are not the benchmark's own."
    elif task.reference and not task.comparable:
        family, of = html.escape(benchmark_family(task.reference)), html.escape(references_of(task.reference))
        caveat = f" Scaled by {of}'s references for {family}, but data or environment are not {of}'s."
    if task.fidelity:
        caveat += f" {html.escape(task.fidelity)}"
    if len(rolled) > 2:
        caveat += f" Each of the {len(rolled) - 1} differences has intervals of 95 % by itself."
    if differ := lengths(rolled, names, which):
        caveat += f" {html.escape(differ)}"
    if shared:
        caveat += f" The names of runs are without what all have: {breakable(shared)}."
    starts = "the same start state" if n == 1 else f"the same {n:,} start states"
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{COMPARED}<style>{PAGE_STYLE}</style></head><body>
<h1>Policies side by side</h1>
<p class=about>In {html.escape(task.env_text)}, from {starts} (seed {seed}), with the same noise
where policies draw alike.{caveat}</p>
<table><tr><th>run</th><th class=n>{what}, ± standard error</th><th class=n>median</th></tr>{"".join(rows)}</table>
<h2>Differences, with intervals of 95 %</h2>
<table><tr><th>difference</th><th class=n>over seeds<br>and start states</th><th class=n>over start<br>states alone</th>
<th class=n>over training<br>seeds alone</th></tr>{"".join(several)}</table>
<p class=about>More than noise: the first interval leaves 0 out. It is of the methods, and allows for other training
seeds and other start states at once (crossed random effects; half of its width is the root of summed squares, each
part with Student's quantile of its own degrees of freedom). The others tell which of both the noise comes from. Over
start states, of these very policies: Student's t on paired differences. Over training seeds, from these very states:
Welch's t on the seeds' means, as of two groups, also where both runs have seeds of the same numbers. Runs of one
origin, of which one was made from the other or both from a third, differ by what became of the seeds that both have:
Student's t on the differences of each seed.</p>
<img src="data:image/png;base64,{image}" alt="what the policies did">
</body></html>
"""


def _steps(steps: Sequence[int]) -> str:
    return f"{steps[0]:,}" if len(set(steps)) == 1 else ", ".join(f"{step:,}" for step in steps)


def _csv(rolled: Sequence[Rolled]) -> str:
    """A row an episode: run, agent, training seed, start state, return."""
    text = io.StringIO()
    writer: Any = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "agent", "seed", "step", "start", "return"])
    for one in rolled:
        config = one.run.config
        for i, seed in enumerate(config.seeds):
            for start, value in enumerate(one.returns[i]):
                writer.writerow([one.name, config.agent.name, seed, one.steps[i], start, float(value)])
    return text.getvalue()
