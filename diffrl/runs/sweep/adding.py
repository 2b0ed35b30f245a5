"""What a command adds to a sweep that is there: runs of other values and of other seeds, and steps. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.runs.sweep.plan import Sweep, SweepRun, run_name
from diffrl.support.errors import UserError, joined, shown
from diffrl.support.files import typed


def widened(folder: Path, there: Sweep | None, asked: Sequence[SweepRun]) -> Sweep:
    """The sweep of a folder with the runs that are asked for: new ones are added after those that are there.

    A run that is there stays, whether it is asked for or not, and is known by its configuration. Where runs differ from
    one that is asked for in their seeds alone, a run of the seeds that none of them has is added: see `_more_seeds`.
    Raises UserError where a new one would take the name of another, and where the folder holds a search.
    """
    if there is None:
        return Sweep(tuple(asked), added=len(asked))
    if there.search is not None:
        raise UserError(
            f"{folder} holds a search: `diffrl sweep --out {typed(folder)}` goes on; or choose another --out."
        )
    runs = list(there.runs)
    for run in asked:
        alike = [old for old in runs if dataclasses.replace(old.config, seeds=run.config.seeds) == run.config]
        for new in _more_seeds(folder, alike, run) if alike else [run]:
            if taken := next((old for old in runs if old.name == new.name), None):
                raise _another(folder, taken, new)
            runs.append(new)
    return Sweep(tuple(runs), added=len(runs) - len(there.runs))


def with_seeds(there: Sweep, seeds: Sequence[int], separate: bool) -> list[SweepRun]:
    """The runs that a sweep's settings have with these seeds, as `grid` gives them. separate: each seed by itself."""
    found: list[SweepRun] = []
    for run in there.runs:
        for stack in [(seed,) for seed in seeds] if separate else [tuple(seeds)]:
            config = dataclasses.replace(run.config, seeds=stack)
            if all(one.config != config for one in found):
                name = run_name(run.unseeded, {}, f"seed={stack[0]}" if separate else "")
                found.append(SweepRun(name, run.settings, config, unseeded=run.unseeded))
    return found


def lengthened(folder: Path, there: Sweep, steps: int) -> Sweep:
    """The sweep of a folder with all its runs made longer, to `steps` steps in all.

    Each learns what it would had it been asked for with so many; but a run that has begun stays compiled, or not, and
    keeps the evaluation at its old end. Raises UserError where the folder holds a search, where its runs differ in
    their steps, and where they have more.
    """
    if there.search is not None:
        raise UserError(f"{folder} holds a search, whose trials stay as long as they are: choose another --out.")
    now = sorted({run.config.steps for run in there.runs})
    if len(now) > 1:
        have = joined([str(each) for each in now])
        raise UserError(
            f"--steps makes all runs of a sweep equally long, and those of {folder} have {have}: `diffrl resume RUN "
            "--steps N` makes one longer."
        )
    if steps < now[0]:
        raise UserError(f"--steps is {steps:,}, and the runs of {folder} have {now[0]:,}: a sweep is only made longer.")
    runs = [
        dataclasses.replace(
            run,
            settings={key: steps if key == "steps" else value for key, value in run.settings.items()},
            config=dataclasses.replace(run.config, steps=steps),
        )
        for run in there.runs
    ]
    return Sweep(tuple(runs))


def _more_seeds(folder: Path, alike: Sequence[SweepRun], asked: SweepRun) -> list[SweepRun]:
    """The runs of the asked seeds that no run of the same configuration has: one stack, or each by itself as they are.

    By themselves they are where it is asked for, and where all that are there are of one seed, by --separate-seeds or
    several. Raises UserError where a seed by itself is asked for that a stack of several has.
    """
    here = {seed: run for run in alike for seed in run.config.seeds}
    if asked.alone and (stack := here.get(asked.config.seeds[0])) is not None and len(stack.config.seeds) > 1:
        raise UserError(
            f"{folder}: seed {asked.config.seeds[0]} is in a stack already, that of {stack.name}, and by itself it has "
            "other scores. Choose another --out."
        )
    rest = tuple(seed for seed in asked.config.seeds if seed not in here)
    single = all(len(run.config.seeds) == 1 for run in alike)
    apart = asked.alone or (single and (len(alike) > 1 or alike[0].alone))
    unseeded = alike[0].unseeded
    return [
        SweepRun(
            run_name(unseeded, {}, f"seed={seeds[0]}" if apart else f"seeds={'+'.join(map(str, seeds))}"),
            asked.settings,
            dataclasses.replace(asked.config, seeds=seeds),
            unseeded=unseeded,
        )
        for seeds in ([(seed,) for seed in rest] if apart else [rest])
        if seeds
    ]


def _another(folder: Path, old: SweepRun, new: SweepRun) -> UserError:
    """What is said where a run that is asked for has the name of one with another configuration."""
    more, steps = "", new.config.steps
    if dataclasses.replace(old.config, seeds=new.config.seeds, steps=steps) == new.config and steps > old.config.steps:
        more = (
            f" `diffrl sweep --out {typed(folder)} --steps {steps}` makes all its runs longer, `diffrl resume "
            f"{typed(folder / old.name)} --steps {steps}` that one alone."
        )
    return UserError(
        f"{folder} holds another sweep: its run {old.name} has {_difference(old.config, new.config)}. `diffrl sweep "
        f"--out {typed(folder)}` goes on with it; or choose another --out.{more}"
    )


def _difference(old: TrainConfig, new: TrainConfig) -> str:
    """The first field in which two configurations differ, as a few words."""
    a, b = configuration.to_dict(old), configuration.to_dict(new)
    pairs = [(key, a[key], b[key]) for key in a if key != "agent"]
    pairs += [(f"agent.{key}", a["agent"].get(key), value) for key, value in b["agent"].items()]
    key, before, now = next((pair for pair in pairs if pair[1] != pair[2]), ("other fields", "", ""))
    return f"{key} {shown(before)}, not {shown(now)}"
