"""A sweep from its folder's claim to its table: what `diffrl sweep` does, however its runs are run."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from diffrl.runs.sweep import plan
from diffrl.runs.sweep.adding import lengthened, widened
from diffrl.runs.sweep.plan import Sweep, SweepRun
from diffrl.runs.sweep.queue import InOrder, to_run, work_through
from diffrl.runs.sweep.show import Board, tell
from diffrl.runs.sweep.state import (
    State,
    best_of,
    legend,
    luck,
    remarked,
    remarks,
    result_of,
    state_of,
    summary,
    write_table,
)
from diffrl.support.console import console
from diffrl.support.errors import UserError, counted, joined
from diffrl.support.files import typed
from diffrl.support.folder import held
from diffrl.support.stopping import Interrupted

Runner = Callable[[Sequence[tuple[int, SweepRun]], Board], str]
"""Runs the runs with these places, and tells the board; "" where all have ended, else a sentence on what cut it."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """In the block, this process alone runs the sweep of a folder."""
    with held(folder, then=f"Then {go_on(folder)}"):
        yield


def go_on(folder: Path) -> str:
    """How a sweep goes on: the end of a sentence."""
    return f"`diffrl sweep --out {typed(folder)}` goes on."


def list_runs(folder: Path, asked: Sequence[SweepRun] | None) -> int:
    """Print the runs that a command would have in the folder, a line each: place, how far it is, name, seeds.

    Gives 1 where data of runs that are not done cannot be loaded here; why is said.
    """
    sweep = plan.existing(folder) if asked is None else widened(folder, plan.read(folder), asked)
    states = {run.name: state_of(folder, run) for run in sweep.runs}
    complaints = _complaints(run for run in sweep.runs if states[run.name].kind != "done")
    without = 0
    for i, run in enumerate(sweep.runs):
        state = states[run.name]
        lacking = state.kind != "done" and run.config.dataset in complaints
        without += lacking
        how_far = f"cut at {state.step:,}" if state.kind == "cut" else state.kind
        more = f"  {state.error}" * bool(state.error) + "  (no data here)" * lacking
        print(f"{i:>4}  {how_far:<12}  {run.name}  seeds {' '.join(map(str, run.config.seeds))}{more}")
    for said in complaints.values():
        console.print(said, style="yellow", markup=False)
    if without:
        which = "The run" if without == 1 else f"The {without:,} runs"
        console.print(f"{which} marked (no data here) would fail on this machine. {_ELSEWHERE}")
    return 1 if without else 0


_ELSEWHERE = "A cluster's nodes may have other files."


def _complaints(runs: Iterable[SweepRun]) -> dict[str, str]:
    """By data set of these runs that cannot be loaded here, why: see `envs.datasets.missing`."""
    from envs.datasets import missing

    found = {dataset: missing(dataset) for dataset in dict.fromkeys(run.config.dataset for run in runs)}
    return {dataset: why for dataset, why in found.items() if why is not None}


def _tell_missing(runs: Sequence[SweepRun], elsewhere: bool = False) -> None:
    """Say which runs, about to be started, have no data here. elsewhere: they are to be on a cluster's nodes."""
    for dataset, why in _complaints(runs).items():
        names = [run.name for run in runs if run.config.dataset == dataset]
        which = joined(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1:,} others"
        said = f"no data here: {which}. {why}" + f" {_ELSEWHERE}" * elsewhere
        console.print(said, style="yellow", markup=False)


def show(folder: Path) -> int:
    """Print the table of a sweep, and write `sweep.csv`."""
    sweep = plan.existing(folder)
    return finish(folder, sweep, {run.name: state_of(folder, run) for run in sweep.runs})


def planned(folder: Path, asked: Sequence[SweepRun] | None, longer: int | None = None) -> Sweep:
    """The sweep of a folder as a command would have it: with the runs that are asked for, or with longer ones.

    longer: the steps that all its runs are to make. Nothing is written. Raises UserError where there is no sweep, and
    where it cannot be so.
    """
    if longer is not None:
        return lengthened(folder, plan.existing(folder), longer)
    return plan.existing(folder) if asked is None else widened(folder, plan.read(folder), asked)


def settled(folder: Path, asked: Sequence[SweepRun] | None, longer: int | None = None) -> Sweep:
    """The sweep of a folder that is claimed, as it is `planned`, written into its file; what changes is said."""
    there, sweep = plan.read(folder), planned(folder, asked, longer)
    if there is not None and sweep.runs == there.runs:
        return sweep
    if there is not None:
        what = f"{sweep.added} run(s) added to the {len(there.runs)} that are there."
        if longer is not None:
            n = counted(len(sweep.runs), "runs")
            what = f"{n} of {there.runs[0].config.steps:,} steps made longer, to {longer:,}."
        console.print(f"{folder}: {what}", markup=False)
    plan.write(folder, sweep)
    return sweep


def _left(folder: Path, sweep: Sweep, retry: bool) -> tuple[dict[str, State], list[tuple[int, SweepRun]]]:
    """How far the runs of a sweep are, and those that are left to run, with their places."""
    states = {run.name: state_of(folder, run) for run in sweep.runs}
    return states, to_run(sweep.runs, states, retry)


def run_all(
    folder: Path,
    asked: Sequence[SweepRun] | None,
    retry: bool,
    runner: Runner,
    elsewhere: bool = False,
    longer: int | None = None,
) -> int:
    """Run what is left of a sweep by `runner`, from the folder's claim to the table; 1 where runs have failed.

    Which data are missing on this machine is said before. elsewhere: the runs are on other machines. longer: see
    `planned`. Raises UserError where another process runs the sweep, and where something has cut it, with how to go on.
    """
    if asked is None:
        plan.existing(folder)  # before a folder is made
    with claimed(folder):
        sweep = settled(folder, asked, longer)
        states, left = _left(folder, sweep, retry)
        n_done = sum(state.kind == "done" for state in states.values())
        runs = "1 run" if len(sweep.runs) == 1 else f"{len(sweep.runs)} runs"
        console.print(f"{folder}: {runs}, {n_done} of them done, {len(left)} to run.", markup=False)
        _tell_missing([run for _, run in left], elsewhere)
        board = Board(folder, sweep.runs, states, len(sweep.runs))
        with board.shown():
            cut = runner(left, board) if left else ""
        return concluded(folder, sweep, board.states, cut, board.told)


def run_here(folder: Path, asked: Sequence[SweepRun] | None, jobs: int, retry: bool, longer: int | None = None) -> int:
    """Run what is left of a sweep on this machine, `jobs` runs at a time: see `run_all`."""

    def runner(left: Sequence[tuple[int, SweepRun]], board: Board) -> str:
        return work_through(folder, InOrder(left), jobs, board)

    return run_all(folder, asked, retry, runner, longer=longer)


def run_search(folder: Path, wanted: Sweep | None, trials: int | None, jobs: int) -> int:
    """Run a search to so many trials in all, `jobs` at a time; 1 where trials have failed.

    wanted: the search, where it is not the folder's. trials: None: as many as it was made for.
    """
    from diffrl.runs.sweep import search

    if wanted is None:
        plan.existing(folder)
    with claimed(folder):
        found = search.settled(folder, wanted, trials)
        trials = int((found.search or {})["trials"])
        source = search.Trials(folder, found)
        states = {run.name: state_of(folder, run) for run in source.sweep.runs}
        done = sum(state.kind == "done" for state in states.values())
        console.print(f"{folder}: a search of {trials} trials, {done} of them done.", markup=False)
        board = Board(folder, source.sweep.runs, states, trials)
        with board.shown():
            cut = work_through(folder, source, jobs, board)
        states = {run.name: board.states.get(run.name) or state_of(folder, run) for run in source.sweep.runs}
        return concluded(folder, source.sweep, states, cut, board.told, f"{trials} trials")


def run_on_slurm(
    folder: Path,
    asked: Sequence[SweepRun] | None,
    retry: bool,
    jobs: int | None,
    options: Sequence[str],
    submitting: bool,
    longer: int | None = None,
) -> int:
    """Print the script of an array job of the runs that are left, or give it to sbatch. Such jobs may be under way.

    longer: see `planned`. Where the command is refused, by sbatch too, a sweep that is there stays as it was.
    """
    from diffrl.runs.sweep import slurm

    _, left = _left(folder, planned(folder, asked, longer), retry)
    if left:
        slurm.script(folder, [place for place, _ in left], jobs, options)
        if submitting:
            slurm.require_sbatch()
    with claimed(folder):
        there = plan.read(folder)
        sweep = settled(folder, asked, longer)
        states, left = _left(folder, sweep, retry)
        _tell_missing([run for _, run in left], elsewhere=True)
        if not left:
            console.print(f"{folder}: nothing is left to run.", markup=False)
            return finish(folder, sweep, states)
        text = slurm.script(folder, [place for place, _ in left], jobs, options)
        if not submitting:
            print(text, end="")
            return 0
        try:
            said = slurm.submit(folder, text)
        except UserError as error:
            if there is None or there.runs == sweep.runs:
                raise
            plan.write(folder, there)
            raise UserError(f"{str(error).rstrip('.')}. The runs of {folder} are those of before.") from error
        console.print(f"{said}: {len(left)} runs.", markup=False)
        console.print(f"how far they are: diffrl sweep --out {typed(folder)} --status", markup=False)
    return 0


def run_on_cluster(
    folder: Path,
    asked: Sequence[SweepRun] | None,
    retry: bool,
    address: str,
    cpus: float,
    gpus: float,
    longer: int | None = None,
) -> int:
    """Run what is left of a sweep on a Ray cluster, each run with such shares of a node: see `run_all`.

    Where runs are left, the cluster is asked before the sweep's folder is made or changed.
    """
    from diffrl.runs.sweep.on_ray import connected, run_on_ray

    def runner(left: Sequence[tuple[int, SweepRun]], board: Board) -> str:
        with connected(address, cpus, gpus) as ray:
            return run_on_ray(ray, folder, left, board, cpus, gpus)

    _, left = _left(folder, planned(folder, asked, longer), retry)
    with connected(address, cpus, gpus) if left else contextlib.nullcontext():
        return run_all(folder, asked, retry, runner, True, longer)


def concluded(
    folder: Path,
    sweep: Sweep,
    states: dict[str, State],
    cut: str,
    told: Mapping[str, str] = MappingProxyType({}),
    total: str = "",
) -> int:
    """Print the table of a sweep that has ended; 1 where a run is not done; raise what has cut it.

    told: see `tell`. total: of a search, how many trials are to be, as "20 trials"; by default the runs.
    """
    if not cut:
        failed = finish(folder, sweep, states, told)
        if any(state.kind in ("waiting", "cut") for state in states.values()):
            console.print(f"Runs that were stopped from elsewhere are not done: {go_on(folder)}", markup=False)
            return 1
        return failed
    done = sum(state.kind == "done" for state in states.values())
    total = total or f"{len(sweep.runs)} runs"
    text = f"{cut} {done} of {total} are done, and what was under way is saved: {go_on(folder)}"
    if cut.startswith("Stopped"):
        raise Interrupted(text)
    raise UserError(text.replace(": `", "; once there is space, `"))


def finish(folder: Path, sweep: Sweep, states: dict[str, State], told: Mapping[str, str] = MappingProxyType({})) -> int:
    """Print the table and what to type next; write `sweep.csv`. Gives 1 where runs have failed. told: see `tell`."""
    remarkable = remarks(folder, sweep)
    print("\n".join(summary(folder, sweep, states, remarkable)))
    stars = best_of(folder, sweep, states, remarkable)
    table = write_table(folder, sweep)
    for line in tell(states, told):
        console.print(line, markup=False)
    failed = any(state.kind == "failed" for state in states.values())
    if failed and sweep.search is None:  # a trial that failed stays so
        console.print(
            "What failed by a want of data, memory or a package runs again once that is mended: diffrl sweep --out "
            f"{folder} --retry. A setting that is wrong is wrong again: add runs with another one.",
            markup=False,
        )
    if all(result_of(folder, run) is None for run in sweep.runs):
        console.print("No run has been evaluated yet.")
        return 1 if failed else 0
    console.print(legend(sweep, bool(stars)))
    if said := luck(folder, sweep, stars):
        console.print(said, markup=False, highlight=False)
    for line in remarked(remarkable):
        console.print(line, style="yellow", markup=False)
    console.print(f"every evaluation: {table}", markup=False)
    console.print(f"report:           diffrl report {typed(folder)}/*/", markup=False)
    return 1 if failed else 0
