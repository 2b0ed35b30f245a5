"""`diffrl sweep`: many runs from one command, here or on a cluster; cut anywhere, the same command goes on."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from diffrl.commands.words import parse, take
from diffrl.support.errors import UserError
from diffrl.support.files import to_write, typed
from diffrl.support.schema import Count, Many, NotNegative, Positive, Seed, check

USAGE = """Train many runs: a grid of settings, or a search among them, with several seeds each.

  diffrl sweep diffusion_ql/maze2d-umaze-v1-small --seeds 0 1 2 --set agent.q_weight=0.5,1,2 --jobs 2 --out sweeps/q
      three runs of three seeds each, two runs at a time; then a table, and sweep.csv
  diffrl sweep --agent bc iql --dataset maze2d-umaze-v1 --set steps=20000 --out sweeps/two
  diffrl sweep --out sweeps/q                     go on after a stop or a kill: runs that are done are skipped, runs
                                                  that were cut go on bit for bit; --retry: those that failed, too
  diffrl sweep --out sweeps/q --seeds 0 1 2 3 4   add the seeds that its settings do not have yet, and run them
  diffrl sweep --out sweeps/q --steps 200000      make all its runs longer, to so many steps
  diffrl sweep --out sweeps/q --dry-run           list the runs, how far each is, and data that are missing here
  diffrl sweep --out sweeps/q --slurm --submit --slurm-options="--partition=gpu --gres=gpu:1 --time=8:00:00"
                                                  the same runs as an array job; then --status shows the table
  diffrl sweep --out sweeps/q --ray auto --cpus-per-run 2
                                                  the same runs on a Ray cluster; a node that dies loses nothing
  diffrl sweep diffusion_ql/maze2d-umaze-v1-small --search optuna --trials 30 --set agent.q_weight=0.1:3:log \\
      --out sweeps/found                          settings by Optuna's sampler, which hears how the last ones scored

Several --set make a grid. A value is what the field of the configuration takes: `diffrl train CONFIG --help` shows
them. The seeds of one setting are one run, trained side by side, unless --separate-seeds. Each run is one process with
one thread; --set workers=4 gives it more.
The same --out with other values or seeds adds runs to those that are there, and changes none of them.
The best of many noisy scores is too high, as it is chosen for its luck, too: train the winner on fresh seeds, and
take their scores, by diffrl train sweeps/q/NAME/config.yaml --seeds 10 11 12 --out sweeps/q-winner.
Ctrl-C has the runs save and end."""


@dataclass(frozen=True)
class Sweep:
    """The options of `diffrl sweep`."""

    configs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[CONFIG ...]")] = ()
    """Configurations, as `diffrl train` takes them: names of shipped ones, or files; by default none, where there is
    --agent, or a sweep goes on."""
    agent: tuple[str, ...] = ()
    """Instead of configurations: agents, each on every --dataset, as `diffrl train --agent A --dataset D`. By
    default none."""
    dataset: tuple[str, ...] = ()
    """The data sets of these agents; by default none."""
    seeds: tuple[int, ...] = ()
    """Seeds of every setting; by default those of the configuration. To a sweep that is there, those that it has not
    are added, as a stack of their own."""
    steps: Count | None = None
    """Of a sweep that is there: make all its runs longer, to so many steps in all. By default they stay as long as they
    are; those of a new sweep are as long as --set steps=N says."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE,VALUE ...")] = ()
    """Values to try of a field, such as agent.q_weight=0.5,1,2 or steps=20000; give it as often as you like. By
    default none."""
    out: Path | None = None
    """The sweep's folder, with a folder of each run in it; there is no default."""
    jobs: Many | None = None
    """Runs at a time: here by default 1, on a cluster as many as it grants. No run depends on it; but which settings
    a search tries does, as with several jobs its sampler proposes before it has heard of those under way."""
    separate_seeds: bool = False
    """Each seed is a run of its own, whose scores are others than in a stack of seeds."""
    dry_run: bool = False
    """List the runs and how far they are, and which data are missing here; run nothing, write nothing."""
    retry: bool = False
    """Go on with runs that failed, too."""
    status: bool = False
    """Print the table of what has come out so far and write sweep.csv; run nothing."""
    slurm: bool = False
    """Print the script of an array job of Slurm, a task a run, which is queued again when it is preempted or cut."""
    submit: bool = False
    """With --slurm: give the script to sbatch."""
    slurm_options: tuple[str, ...] = ()
    """With --slurm: further options of sbatch, as --slurm-options=--time=24:00:00 (once for several: "--a --b"); by
    default none."""
    ray: str | None = None
    """Run on the Ray cluster at this address (HOST:PORT, or auto), by default on this machine; --out is on storage that
    all nodes share."""
    cpus_per_run: Positive = 1.0
    """With --ray: the processors that each run takes of a node; 0.5 places two on one."""
    gpus_per_run: NotNegative = 0.0
    """With --ray: the GPUs that each run takes of a node, such as 0.25; the runs need --set device=cuda."""
    search: Literal["optuna"] | None = None
    """Settings that Optuna's sampler (TPE) proposes, to make the mean over seeds of the last evaluation's score large.
    By default a grid is run. --set takes ranges, FIELD=LOW:HIGH or FIELD=LOW:HIGH:log, and values, of what changes how
    agents learn. A trial of which a seed diverges counts as the worst."""
    trials: Many | None = None
    """With --search: settings to try in all, by default 20; when going on, another number."""
    search_seed: Seed = 0
    """With --search: the seed of the sampler."""
    task: int | None = None
    """Train the run of this place in the list, from 0, or go on with it, in this process, and end with its exit code:
    what a cluster's jobs do. By default all are run."""

    def __post_init__(self) -> None:
        check(self)
        if (self.submit or self.slurm_options) and not self.slurm:
            raise UserError("--submit and --slurm-options go with --slurm.")
        if self.slurm and self.ray is not None:
            raise UserError("Give --slurm or --ray, not both.")


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl sweep` and do it; gives 1 where runs have failed."""
    words = _gathered(list(arguments), "--set")
    if "--watched" in words:
        words.remove("--watched")
        from diffrl.runs.sweep.task import watched

        watched()
    given = parse(Sweep, words, "diffrl sweep", elsewhere=lambda name: _by_set(name, words), description=USAGE)
    if given.out is None:
        raise UserError("Where to? Give --out sweeps/NAME, the sweep's folder; `diffrl sweep --help` shows examples.")
    out = to_write(given.out, "runs")
    if given.task is not None:
        return _perform(out, given.task)
    from diffrl.runs.sweep import job, plan
    from diffrl.runs.sweep.adding import with_seeds

    asked, there = None, plan.read(out)
    if given.search or (there is not None and there.search is not None):
        return _search(given, out)
    if given.trials is not None:
        raise UserError("--trials goes with --search optuna.")
    if given.steps is not None:
        _check_longer(given, out, there is not None)
    if given.configs or given.agent or given.dataset:
        found = plan.bases(given.configs, given.agent, given.dataset)
        asked = plan.grid(found, given.sets, given.seeds, given.separate_seeds)
    elif given.seeds and there is not None and not given.sets:
        asked = with_seeds(there, given.seeds, given.separate_seeds)
    elif given.sets or given.seeds or given.separate_seeds:
        raise _of_nothing(there is not None)
    here = not (given.dry_run or given.status or given.slurm or given.ray)
    known = [] if there is None else [run.config.dataset for run in there.runs]
    plan.refuse_unknown([run.config.dataset for run in asked or () if run.config.dataset not in known], here)
    if given.dry_run:
        return job.list_runs(out, asked)
    if given.status:
        return job.show(out)
    if given.slurm:
        options = [option for text in given.slurm_options for option in shlex.split(text)]
        return job.run_on_slurm(out, asked, given.retry, given.jobs, options, given.submit, given.steps)
    if given.ray is not None:
        shares = given.cpus_per_run, given.gpus_per_run
        return job.run_on_cluster(out, asked, given.retry, given.ray, *shares, given.steps)
    return job.run_here(out, asked, given.jobs or 1, given.retry, given.steps)


def _check_longer(given: Sweep, out: Path, there: bool) -> None:
    """Raise UserError where --steps, which makes the runs of a sweep longer, does not fit what else is given."""
    named = given.configs or given.agent or given.dataset or given.sets or given.seeds or given.separate_seeds
    if not there or named:
        raise UserError(
            "--steps makes the runs of a sweep that is there longer: `diffrl sweep --out "
            f"{out} --steps {given.steps}`, and no more. Runs that are asked for have as many as `--set steps="
            f"{given.steps}` says."
        )
    if given.dry_run or given.status:
        raise UserError("--steps changes the sweep: leave out --dry-run and --status.")


def _perform(folder: Path, place: int) -> int:
    """Train one run of a sweep in this process, or go on with it."""
    from diffrl.runs.sweep import plan
    from diffrl.runs.sweep.task import perform

    sweep = plan.existing(folder)
    if not 0 <= place < len(sweep.runs):
        raise UserError(f"--task is {place}; {folder} has the runs 0 to {len(sweep.runs) - 1}.")
    perform(folder, sweep.runs[place])
    return 0


def _search(given: Sweep, out: Path) -> int:
    """Do what the options say of a search, a new one or the one in the folder."""
    from diffrl.runs.sweep import job, plan, search

    for taken, flag, why in (
        (given.slurm, "--slurm", "it runs on this machine"),
        (given.ray is not None, "--ray", "it runs on this machine"),
        (given.steps is not None, "--steps", "its trials stay as long as they are"),
        (given.separate_seeds, "--separate-seeds", "the seeds of a trial train side by side"),
        (given.retry, "--retry", "a trial that failed stays failed"),
    ):
        if taken:
            raise UserError(f"A search takes no {flag}: {why}.")
    wanted = None
    if given.configs or given.agent or given.dataset:
        if given.search is None:
            raise UserError(
                f"{out} holds a search: `diffrl sweep --out {typed(out)}` goes on; or choose another --out."
            )
        found = plan.bases(given.configs, given.agent, given.dataset)
        new = plan.read(out) is None
        wanted = search.asked(found, given.sets, given.seeds, given.search_seed, new)
        if new:
            plan.refuse_unknown([config.dataset for _, config in found], here=not (given.dry_run or given.status))
    elif given.sets or given.seeds:
        raise _of_nothing(False)
    if given.dry_run or given.status:
        if wanted is not None and plan.read(out) is None:
            raise UserError("Which settings a new search will try is known as it goes: --dry-run lists those it has.")
        return job.show(out) if given.status else job.list_runs(out, None)
    if wanted is not None and plan.read(out) is None:
        search.refuse_unscored(wanted)
    return job.run_search(out, wanted, given.trials, given.jobs or 1)


def _of_nothing(there: bool) -> UserError:
    """What is said of values that change nothing. there: whether the folder holds a sweep."""
    more = " The sweep's own command with other values adds runs to it." if there else ""
    return UserError(f"Which configuration do --set and --seeds change? Give one, or --agent and --dataset.{more}")


def _by_set(name: str, words: Sequence[str]) -> str:
    """How `--set` says what an option of `diffrl train` says there, or --slurm-options one of sbatch; "" of another.

    words: with its value.
    """
    for before, word in itertools.pairwise(words):
        if before == "--slurm-options" and word.partition("=")[0] == name:
            return f'an option of sbatch is joined to --slurm-options by =, as --slurm-options="{word}".'
    from diffrl.runs.sweep.plan import ELSEWHERE, NO_FIELD, default_of

    key = name.removeprefix("--").replace("-", "_")
    default = default_of(key)
    if default is NO_FIELD and key.startswith("no_"):
        key, default = key.removeprefix("no_"), default_of(key.removeprefix("no_"))
    if key in ELSEWHERE or default is NO_FIELD:
        return ""
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == name)
    typed = [end] if (end := words[place].partition("=")[2]) else []
    typed += itertools.takewhile(lambda word: not word.startswith("--"), words[place + 1 :])
    value = typed[0] if typed else "VALUE"
    if isinstance(default, bool) or key == "compile":
        value = "false" if name.startswith("--no") else "true"
    elif isinstance(default, tuple):
        value = f"[{', '.join(typed) or 'VALUE'}]"
    return f"every field of the configuration is given by --set, so {shlex.join(['--set', f'{key}={value}'])}."


def _gathered(words: list[str], flag: str) -> list[str]:
    """The words with all values of a flag that is given several times behind one: `--set a=1 b=2 --set c=3`."""
    values: list[str] = []
    rest: list[str] = []
    while words:
        if words[0] != flag and not words[0].startswith(f"{flag}="):
            rest.append(words.pop(0))
            continue
        values.append(take(words, flag) or "")
        if re.fullmatch(r"[\w.-]+", values[-1]) and words and "=" not in words[0] and not words[0].startswith("-"):
            apart = itertools.takewhile(lambda word: not word.startswith("--") and "=" not in word, words)
            example = shlex.join([flag, f"{values[-1]}={','.join(apart)}"])
            raise UserError(f"{flag} {values[-1]}: its values follow behind =, with commas between: {example}.")
        while words and "=" in words[0] and not words[0].startswith("-"):
            values.append(words.pop(0))
    return [*rest, flag, *values] if values else rest
