"""A search among settings: Optuna's sampler proposes them, the queue runs them, and Optuna hears how they scored.

The objective is the mean over seeds of the last evaluation's score, which is to be large. A trial of which a seed has
diverged is told to be worse than all others, -inf: its score is that of a checkpoint of before, and a trial that is
told to have failed the sampler leaves out, and comes back to. Failed is what the machine is to blame for.

What Optuna knows lies in an SQLite file in the sweep's folder. Its sampler is made anew for each trial, from the
search's seed and the number of trials before, so that a search with one job gives the same trials whether it is cut or
not. With several jobs the sampler takes trials under way for bad ones (constant_liar), else it would propose nearly the
same for each; what it proposes then depends on which trials have ended.

A search that an older version began goes on with what that one told Optuna, and with the fields that it searches.
"""

import json
import math
import warnings
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


def asked(
    found: Sequence[tuple[str, TrainConfig]], sets: Sequence[str], seeds: Sequence[int], seed: int, new: bool = True
) -> Sweep:
    """The search that the words ask for, without a trial yet.

    sets: what to search, FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B; a field with one value has that value in
    every trial. seed: of the sampler. new: whether it is to begin; one that an older version began goes on, whatever it
    searches. Raises UserError for several configurations, where nothing is searched, and for what none should.
    """
    if len(found) != 1:
        raise UserError("A search is of one configuration: give one, and with --agent one --dataset.")
    stem, base = found[0]
    axes = [plan.axis(text, base, sampled=True) for text in sets]
    plan.once([axis.key for axis in axes])
    if all(axis.span is None and len(axis.values) == 1 for axis in axes):
        raise UserError("What is to be searched? Give ranges or values, such as --set agent.q_weight=0.1:3:log.")
    if new:
        _refuse_unlearned(axes)
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


_PART_OF = {
    **dict.fromkeys(("dataset", "env", "env_kwargs", "max_episode_steps", "rows"), "what they are scored on"),
    **dict.fromkeys(("eval_episodes", "eval_every", "log_every"), "how they are measured"),
    **dict.fromkeys((*configuration.MACHINE, "tf32"), "what they run on"),
}
"""Fields of a configuration of which a search looks for no best, and why: trials are to differ in how they learn."""


def _refuse_unlearned(axes: Sequence[Axis]) -> None:
    """Raise UserError for a field with several values that says nothing of how agents learn."""
    for axis in axes:
        if axis.key in _PART_OF and (axis.span is not None or len(axis.values) > 1):
            raise UserError(
                f"--set {axis.key}: a search compares settings by their scores, and {axis.key} is part of "
                f"{_PART_OF[axis.key]}, which is to be the same for all: give it one value."
            )


def refuse_unscored(sweep: Sweep) -> None:
    """Raise UserError where the trials of a search would have no scores: there is no environment.

    Data that do not say so by their name are opened; those that are not here are fetched, as trials would.
    """
    from envs import registry
    from envs.datasets import load_dataset
    from envs.task import open_task

    about = sweep.search or {}
    base = configuration.from_dict(about["base"], SWEEP, of_run=True)
    single = {axis.key: axis.values[0] for axis in map(_axis, about["axes"]) if len(axis.values) == 1}
    config = plan.changed(base, single, base.seeds)
    known = registry.find(config.dataset)
    if config.env is None and known is not None and known.env_id is not None:
        return
    if config.env in (None, "none"):
        asked = {name: getattr(config, name) for name in ("env", "env_kwargs", "max_episode_steps")}
        env = None
        if config.env is None:
            dataset = load_dataset(config.dataset, rows=1, progress=False, check=False)
            _, env = open_task(config.dataset, dataset, **asked)
        if env is None:
            raise UserError(
                f"A search goes by scores, and {config.dataset} has no environment to score in: name one, such as "
                "--set env=ID."
            )
        env.close()


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
        whole = {trial.number for trial in self._whole()}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number not in whole and not trial.state.is_finished():  # else it would count as one under way
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
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
        with warnings.catch_warnings():  # constant_liar is an experiment of Optuna's since 2.8
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            seed = mix((self._seed, made, 1)) % 2**32
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = self._study.ask({axis.key: self._distribution(axis) for axis in self._searched()})
        return made, self._add(trial.number, trial.params)

    def ended(self, run: SweepRun, state: State) -> None:
        """Tell Optuna how a trial has scored, or that it failed; of one that was cut it hears when it is done.

        One that has diverged, wholly or with some of its seeds, is worse than all others.
        """
        if state.kind not in ("done", "failed"):
            return
        result = result_of(self._folder, run) if state.kind == "done" else None
        if self._diverged(run) or (result is not None and not math.isfinite(result.last)):
            self._study.tell(run.trial, -math.inf)
        elif result is None:
            self._study.tell(run.trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(run.trial, result.last)

    def _diverged(self, run: SweepRun) -> bool:
        """Whether a trial's training has left the numbers' range, of some of its seeds or all."""
        from diffrl.runs.diverged import diverged
        from diffrl.runs.run import Run

        try:
            return bool(diverged(Run.read(self._folder / run.name)))
        except UserError:  # it failed before it was a run, or is damaged
            return False

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
