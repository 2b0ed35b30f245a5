"""A search among settings: Optuna's sampler proposes them, the queue runs them, and Optuna hears how they scored.

The objective is the mean over seeds of the last evaluation's score, which is to be large. What Optuna knows lies in an
SQLite file in the sweep's folder. Its sampler is made anew for each trial, from the search's seed and the number of
trials before, so that a search with one job gives the same trials whether it is cut or not.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.runs.sweep import plan
from diffrl.runs.sweep.plan import Axis, Span, Sweep, SweepRun
from diffrl.runs.sweep.state import State, result_of, state_of
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.files import typed
from diffrl.support.folder import SWEEP
from diffrl.support.seeds import mix
from diffrl.support.written import exact

STORAGE = "optuna.db"
"""The file in the sweep's folder that Optuna keeps its trials in."""


def asked(found: Sequence[tuple[str, TrainConfig]], sets: Sequence[str], seeds: Sequence[int], seed: int) -> Sweep:
    """The search that the words ask for, without a trial yet.

    sets: what to search, FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B; a field with one value has that value in
    every trial. seed: of the sampler. Raises UserError for several configurations, and where nothing is searched.
    """
    if len(found) != 1:
        raise UserError("A search is of one configuration: give one, and with --agent one --dataset.")
    stem, base = found[0]
    axes = [plan.axis(text, base, sampled=True) for text in sets]
    plan.once([axis.key for axis in axes])
    if all(axis.span is None and len(axis.values) == 1 for axis in axes):
        raise UserError("What is to be searched? Give ranges or values, such as --set agent.q_weight=0.1:3:log.")
    for axis in axes:  # whatever several fields together refuse is refused now
        ends = axis.values if axis.span is None else (axis.span.low, axis.span.high)
        for value in ends:
            plan.changed(base, {axis.key: value}, base.seeds)
    config = replace(base, seeds=tuple(seeds or base.seeds), out=None)
    described = [
        {"key": axis.key, "values": list(axis.values)} if axis.span is None else {"key": axis.key, **vars(axis.span)}
        for axis in axes
    ]
    about = {"stem": stem, "base": configuration.to_dict(config), "axes": described, "seed": seed}
    return Sweep((), about)


TRIALS = 20
"""Trials of a search whose number is not given."""


def settled(folder: Path, wanted: Sweep | None, trials: int | None) -> Sweep:
    """The search of a folder that is claimed, with so many trials in all, which its file says from now on.

    wanted: the search that is asked for; None: the folder's. Trials that are made stay, which is said where fewer are
    asked for. Raises UserError where the folder holds another sweep.
    """
    there = plan.read(folder)
    if there is not None and wanted is not None:
        same = there.search is not None and {**there.search, "trials": None} == {
            **json.loads(json.dumps(wanted.search)),
            "trials": None,
        }
        if not same:
            raise UserError(
                f"{folder} holds another sweep: `diffrl sweep --out {typed(folder)}` goes on; or choose another --out."
            )
    found = there or wanted or plan.existing(folder)
    about = dict(found.search or {})
    number = max(trials or about.get("trials") or TRIALS, made := len(found.runs))
    if trials is not None and trials < made:
        said = f"{folder}: {made} trials are begun already, more than --trials {trials}: none is added."
        console.print(said, markup=False)
    if about.get("trials") != number:
        found = replace(found, search={**about, "trials": number})
        plan.write(folder, found)
    return found


class Trials:
    """The runs of a search: those under way first, then as many new trials as are still to come.

    sweep: the search, whose trials so far are read from its storage.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self._optuna = _optuna()
        self._folder = folder
        about: Mapping[str, Any] = sweep.search or {}
        try:
            self._stem, self._seed, self._trials = str(about["stem"]), int(about["seed"]), int(about["trials"])
            self._base = configuration.from_dict(about["base"], str(folder / SWEEP), of_run=True)
            self._axes = [_axis(entry) for entry in about["axes"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / SWEEP} is damaged: it describes no search ({error}).") from error
        self.sweep = sweep
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{(folder / STORAGE).absolute()}",
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
        for trial in self._whole():
            if all(run.trial != trial.number for run in self.sweep.runs):
                self._add(trial.number, trial.params)
        running = {trial.number for trial in self._whole() if not trial.state.is_finished()}
        for run in self.sweep.runs:
            if run.trial in running and (state := state_of(folder, run)).kind in ("done", "failed"):
                self.ended(run, state)
                running.remove(run.trial)
        self._cut = [place for place, run in enumerate(self.sweep.runs) if run.trial in running]

    def next(self) -> tuple[int, SweepRun] | None:
        """A trial that was cut; else a new one by Optuna's sampler; None where there are enough."""
        if self._cut:
            place = self._cut.pop(0)
            return place, self.sweep.runs[place]
        made = len(self.sweep.runs)
        if made >= self._trials:
            return None
        self._study.sampler = self._optuna.samplers.TPESampler(seed=mix((self._seed, made, 1)) % 2**32)
        trial = self._study.ask({axis.key: self._distribution(axis) for axis in self._searched()})
        return made, self._add(trial.number, trial.params)

    def ended(self, run: SweepRun, state: State) -> None:
        """Tell Optuna how a trial has scored, or that it failed; of one that was cut it hears when it is done."""
        if state.kind not in ("done", "failed"):
            return
        result = result_of(self._folder, run) if state.kind == "done" else None
        if result is None or not math.isfinite(result.last):
            self._study.tell(run.trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(run.trial, result.last)

    def _searched(self) -> list[Axis]:
        return [axis for axis in self._axes if axis.span is not None or len(axis.values) > 1]

    def _whole(self) -> list[Any]:
        """The trials that Optuna has given every value; a kill may have left one without."""
        keys = {axis.key for axis in self._searched()}
        return [trial for trial in self._study.get_trials(deepcopy=False) if keys <= trial.params.keys()]

    def _add(self, number: int, params: Mapping[str, Any]) -> SweepRun:
        """Write the run of a trial into the sweep's file."""
        settings: dict[str, Any] = {}
        for axis in self._axes:
            if axis.span is not None:
                settings[axis.key] = params[axis.key]
            else:
                texts = {exact(value): value for value in axis.values}
                settings[axis.key] = texts[params[axis.key]] if len(texts) > 1 else axis.values[0]
        name = f"{self._stem},trial={len(self.sweep.runs):04d}"
        run = SweepRun(name, settings, plan.changed(self._base, settings, self._base.seeds), number)
        self.sweep = replace(self.sweep, runs=(*self.sweep.runs, run))
        plan.write(self._folder, self.sweep)
        return run

    def _distribution(self, axis: Axis) -> Any:
        """A field's values as Optuna takes them; those of a list by their texts."""
        kinds = self._optuna.distributions
        if axis.span is None:
            return kinds.CategoricalDistribution([exact(value) for value in axis.values])
        if axis.span.whole:
            return kinds.IntDistribution(int(axis.span.low), int(axis.span.high), log=axis.span.log)
        return kinds.FloatDistribution(axis.span.low, axis.span.high, log=axis.span.log)


def _axis(entry: Mapping[str, Any]) -> Axis:
    """An axis of the search, as the sweep's file has it."""
    if "values" not in entry:
        return Axis(entry["key"], span=Span(entry["low"], entry["high"], entry["log"], entry["whole"]))
    return Axis(entry["key"], tuple(tuple(value) if isinstance(value, list) else value for value in entry["values"]))


def _optuna() -> Any:
    """Optuna, if it is installed. Raises UserError, naming the extra, where it is not."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(
            "--search needs Optuna, which is not installed: pip install 'diffrl[search]' brings it."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
