"""What a sweep is made of: its runs, each a configuration with a name, and the file `sweep.json` that lists them.

The file is all that a sweep writes about itself. How far each run is stands in that run's own folder: see `state`.
No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agents
from agents import AgentConfig
from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.support.errors import UserError, listed, shown
from diffrl.support.errors import joined as together
from diffrl.support.files import address_of, atomic_path, read_json
from diffrl.support.folder import ABOUT, SWEEP
from diffrl.support.schema import checked
from diffrl.support.written import exact

ELSEWHERE = {
    "seeds": "Give --seeds 0 1 2.",
    "out": "Give --out sweeps/NAME: each run has a folder in it.",
    "agent": "Give --agent NAME NAME, or a field such as --set agent.width=64,128.",
}
"""Fields of a configuration that `--set` does not take, and what to give instead."""
_LONGEST = 120
"""Characters of a run's name at most: file systems take 255 bytes."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """The run's folder in that of the sweep."""
    settings: Mapping[str, Any]
    """What `--set` gave it: values by field, such as agent.width."""
    config: TrainConfig
    """The whole configuration; its `out` is None, so that the sweep's folder may be moved."""
    trial: int | None = None
    """In a search, the trial's number."""
    unseeded: str = ""
    """In a grid, what its name is made of but for seeds: the configuration's name and settings, however long."""

    @property
    def alone(self) -> bool:
        """Whether it is one seed by itself, as --separate-seeds asks for, and is named so."""
        seeds = self.config.seeds
        return len(seeds) == 1 and self.name == run_name(self.unseeded, {}, f"seed={seeds[0]}")


@dataclass(frozen=True)
class Span:
    """Numbers to sample from, LOW:HIGH of `--set`."""

    low: float
    high: float
    log: bool
    """Whether the logarithm is uniform."""
    whole: bool
    """Whether they are whole numbers."""


@dataclass(frozen=True)
class Axis:
    """One `--set`: a field and the values to try, or to sample from."""

    key: str
    values: tuple[Any, ...] = ()
    span: Span | None = None


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in the order they were asked for; more may be added later."""

    runs: tuple[SweepRun, ...]
    search: Mapping[str, Any] | None = None
    """Of a search: the base's configuration, `axes`, `trials` and `seed`, as JSON has them."""
    added: int = field(default=0, compare=False)
    """How many of the runs the last command added to those that were there."""


# --- What the command line says -------------------------------------------------------------------------------------


def bases(configs: Sequence[str], agents: Sequence[str], datasets: Sequence[str]) -> list[tuple[str, TrainConfig]]:
    """The configurations that `--set` changes, each with a name: by name or path, and of agents and data sets.

    Each is taken as `diffrl train` takes it; agents and data sets are combined. Raises UserError where nothing is
    asked for, or two have one name.
    """
    found = [(_stem(name), configuration.find(name)) for name in configs]
    if bool(agents) != bool(datasets):
        raise UserError("--agent and --dataset go together: --agent bc iql --dataset maze2d-umaze-v1.")
    for agent, dataset in itertools.product(agents, datasets):
        found.append((f"{agent}-{_plain(_stem(dataset))}", configuration.default(agent, dataset)[0]))
    if not found:
        raise UserError(
            "What shall be trained? Give configurations (`diffrl train list`), or --agent and --dataset; "
            "`diffrl sweep --help` shows both."
        )
    names = [name for name, _ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two configurations are called {twice}, and runs are named by them: rename one of the files.")
    return found


def refuse_unknown(datasets: Iterable[str], here: bool) -> None:
    """Raise UserError for a name of no data set, which would fail everywhere, and for a data file that is not there.

    here: whether the runs are to be on this machine: a cluster's nodes may have other files. An address is looked at
    when it is fetched.
    """
    from envs.datasets import locate, require

    for dataset in dict.fromkeys(datasets):
        if address_of(dataset) is None and locate(dataset).kind == "file" and here:
            require(dataset)


def axis(text: str, base: TrainConfig, sampled: bool = False) -> Axis:
    """One `--set FIELD=VALUE,VALUE`, its values typed by the field of the configuration.

    sampled: whether LOW:HIGH, LOW:HIGH:log are ranges to sample numbers from. Raises UserError for a field that there
    is none of, and a value that it does not take.
    """
    key, equals, rest = text.partition("=")
    if not equals or not key or not rest:
        raise UserError(f"--set {shown(text)}: expected FIELD=VALUE,VALUE, such as agent.width=64,128.")
    key = key.replace("-", "_")
    if key in ELSEWHERE:
        raise UserError(f"--set does not take {key}. {ELSEWHERE[key]}")
    ends = rest.split(":")
    if sampled and len(ends) in (2, 3) and all(_number(end) is not None for end in ends[:2]):
        return Axis(key, span=_span(key, ends, base))
    try:
        values = tuple(_typed(key, part, base) for part in _split(rest))
    except UserError as error:
        ranged = (len(ends) == 2 or ends[2:] == ["log"]) and all(_number(end) is not None for end in ends[:2])
        group, _, name = key.rpartition(".")
        if ranged and is_field(name, type(base.agent) if group else TrainConfig):
            raise UserError(
                f"--set {shown(text)} is a range, which --search optuna samples from; a grid takes values."
            ) from error
        raise
    if len({exact(value) for value in values}) < len(values):
        raise UserError(f"--set {shown(text)} names a value twice.")
    return Axis(key, values)


def grid(
    found: Iterable[tuple[str, TrainConfig]], sets: Sequence[str], seeds: Sequence[int], separate: bool
) -> list[SweepRun]:
    """Every combination of values, of every configuration, in the order of the words; the last `--set` runs fastest.

    A run is called by the fields that have several values. seeds: those of each run, as one stack; none: the
    configuration's. separate: each seed is a run of its own. Raises UserError for what a configuration does not take.
    """
    runs, found = [], list(found)
    _refuse_mixed([base.agent for _, base in found], sets)
    for stem, base in found:
        axes = [axis(text, base) for text in sets]
        once([one.key for one in axes])
        own: list[SweepRun] = []
        stacks = [(seed,) for seed in seeds or base.seeds] if separate else [tuple(seeds or base.seeds)]
        for values in itertools.product(*(one.values for one in axes)):
            settings = {one.key: value for one, value in zip(axes, values, strict=True)}
            for stack in stacks:
                several = {one.key: settings[one.key] for one in axes if len(one.values) > 1}
                unseeded = _words(stem, several)
                name = run_name(unseeded, {}, f"seed={stack[0]}" if separate else "")
                own.append(SweepRun(name, settings, changed(base, settings, stack), unseeded=unseeded))
        if any(one.key == "agent.reward_tune" and len(one.values) > 1 for one in axes):
            _refuse_without_rewards(own)
        runs += own
    return runs


def _refuse_without_rewards(runs: Sequence[SweepRun]) -> None:
    """Raise UserError where an agent, as a run has it, learns without rewards: with any tuning it would be the same."""
    without = [run for run in runs if not run.config.agent.learns_from_rewards]
    if without:
        name, everywhere = without[0].config.agent.name, len(without) == len(runs)
        where, which = ("", "all its runs") if everywhere else (f"in {without[0].name} ", "those with other tunings")
        raise UserError(
            f"--set agent.reward_tune: {where}{name} learns without rewards, so {which} would be the same. "
            f"Sweep the others with it; {_ADDED}"
        )


def _refuse_mixed(given: Sequence[AgentConfig], sets: Sequence[str]) -> None:
    """Raise UserError for a field that some of the agents have and others have not, saying which, and what to do."""
    for text in sets:
        group, _, name = text.partition("=")[0].replace("-", "_").rpartition(".")
        with_it = list(dict.fromkeys(agent.name for agent in given if is_field(name, type(agent))))
        without = list(dict.fromkeys(agent.name for agent in given if not is_field(name, type(agent))))
        if group == "agent" and with_it and without:
            has = [f"{together(names)} {'have' if len(names) > 1 else 'has'}" for names in (without, with_it)]
            raise UserError(
                f"--set agent.{name}: {has[0]} no such field, {has[1]}. Sweep {together(with_it)} with it; {_ADDED}"
            )


_ADDED = "another command with the same --out adds the runs of the others."
"""What to do where not all agents of a sweep take a field."""


def changed(base: TrainConfig, settings: Mapping[str, Any], seeds: Sequence[int]) -> TrainConfig:
    """The configuration with these fields replaced, as a run of a sweep has it.

    Its seeds are one stack in one process, and its evaluations are made there, unless it says otherwise: the sweep's
    jobs share the cores, and no result may depend on how many there are. A path of data is absolute.
    """
    of_agent = {key.removeprefix("agent."): value for key, value in settings.items() if key.startswith("agent.")}
    of_run = {key: value for key, value in settings.items() if not key.startswith("agent.")}
    config = dataclasses.replace(
        base, **{"seeds": tuple(seeds), "out": None, **of_run}, agent=dataclasses.replace(base.agent, **of_agent)
    )
    path = Path(config.dataset).expanduser()
    return dataclasses.replace(
        config,
        workers=config.workers or 1,
        eval_workers=config.eval_workers or 0,
        dataset=str(path.absolute()) if path.suffix and path.exists() else config.dataset,
    )


def run_name(stem: str, settings: Mapping[str, Any], more: str = "") -> str:
    """A run's name: the configuration's, and every setting as FIELD=VALUE, with commas between; a long one is cut."""
    words = _words(stem, settings, more)
    name = _plain(words)
    if len(name) <= _LONGEST and words == name:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _words(stem: str, settings: Mapping[str, Any], more: str = "") -> str:
    """What `run_name` makes a name of: neither cut nor made fit for a folder."""
    return ",".join([stem, *(f"{key}={exact(value)}" for key, value in settings.items()), *([more] if more else [])])


def _without_seeds(name: str) -> str:
    """What a name that was not cut is made of but for seeds."""
    return re.sub(r",seeds?=[\d+]+$", "", name)


def once(keys: Sequence[str]) -> None:
    """Raise UserError for a field that two `--set` name."""
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--set names {twice} twice: give all its values at once, {twice}=A,B.")


def _stem(name: str) -> str:
    """What runs of a configuration or a data set are called by."""
    path = Path(name)
    if path.name == "config.yaml" and (path.parent / ABOUT).is_file():  # a run's, whose folder has the name
        return _plain(path.absolute().parent.name)
    return path.stem if path.suffix in (".yaml", ".yml", ".hdf5", ".h5", ".npz") else _plain(name)


def _plain(text: str) -> str:
    """The text with what does not belong in a folder's name replaced."""
    return re.sub(r"[^\w.+=,-]+", "-", text).strip("-.") or "run"


def _split(text: str) -> list[str]:
    """The parts between commas, but those within brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _readings(text: str) -> list[Any]:
    """What a word may stand for, the likeliest first; the field decides."""
    found: list[Any] = []
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        found.append(words[text.lower()])
    if text.startswith("[") and text.endswith("]"):
        try:
            found.append(json.loads(text))
        except ValueError:
            found.append([part.strip() for part in text[1:-1].split(",") if part.strip()])
    if (number := _number(text)) is not None:
        if re.fullmatch(r"[+-]?\d+", text):
            number = int(text)
        found.append(number)
        if isinstance(number, float) and math.isfinite(number) and number.is_integer():
            found.append(int(number))
    return [*found, text]


def _typed(key: str, text: str, base: TrainConfig) -> Any:
    """A word as the value of a field of the configuration. Raises UserError, by the schema, where it is none."""
    group, _, name = key.rpartition(".")
    if group not in ("", "agent"):
        raise UserError(f"--set: there is no field {shown(key)}; an agent's are agent.NAME, a run's have no point.")
    schema, prefix = (type(base.agent), "agent.") if group else (TrainConfig, "")
    if not is_field(name, schema) and is_field(name, TrainConfig if group else type(base.agent)):
        raise UserError(f"--set: there is no field {shown(key)}; did you mean {name if group else f'agent.{name}'!r}?")
    if group and not is_field(name, schema) and (others := agents.having(name)):
        have = f"{listed(others, 4)} {'have' if len(others) > 1 else 'has'}"
        raise UserError(f"--set agent.{name}: {base.agent.name} has no such field, {have}.")
    first: UserError | None = None
    for reading in _readings(text):
        try:
            return checked(schema, {name: reading}, "--set", prefix)[name]
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def is_field(name: str, schema: type = TrainConfig) -> bool:
    """Whether a configuration has a field of this name."""
    return any(one.name == name for one in dataclasses.fields(schema))


NO_FIELD: Any = object()
"""What `default_of` gives of what is no field."""


def default_of(key: str) -> Any:
    """The default of a configuration's field, or of an agent's, agent.NAME; `NO_FIELD` where no agent has it."""
    name = key.removeprefix("agent.")
    for schema in (TrainConfig,) if name == key else agents.AGENTS.values():
        for one in dataclasses.fields(schema):
            if one.name == name:
                return one.default
    return NO_FIELD


def _span(key: str, ends: Sequence[str], base: TrainConfig) -> Span:
    """The numbers from one end to the other. Raises UserError unless the field takes both, and they make a range."""
    log = ends[2:] == ["log"]
    if ends[2:] and not log:
        raise UserError(f"--set {key}={':'.join(ends)}: after LOW:HIGH may stand :log, and nothing else.")
    low, high = (_typed(key, end, base) for end in ends[:2])
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise UserError(f"--set {key} takes no range: its values are no numbers. Give them with commas between.")
    if low >= high or (log and low <= 0):
        raise UserError(f"--set {key}={':'.join(ends)}: expected LOW less than HIGH{', and both above 0' * log}.")
    return Span(low, high, log, isinstance(low, int) and isinstance(high, int))


# --- The file -------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Sweep | None:
    """The sweep in a folder; None where there is none.

    Raises UserError where its file is damaged, and where the folder is a run's, whose scores would hide the sweep's.
    """
    path = folder / SWEEP
    if not path.exists():
        if (folder / ABOUT).exists():
            raise UserError(f"{folder} is a run's folder, and a sweep is to have its own: choose another --out.")
        return None
    content = read_json(path, advice="Restore it from a copy; or delete it and give the sweep's command again.")
    try:
        runs = tuple(
            SweepRun(
                _folder_name(entry["name"]),
                {
                    str(key): tuple(value) if isinstance(value, list) else value
                    for key, value in entry["settings"].items()
                },
                configuration.from_dict(entry["config"], f"{path}: {entry['name']}", of_run=True),
                entry.get("trial"),
                str(entry.get("unseeded", "" if "trial" in entry else _without_seeds(entry["name"]))),
            )
            for entry in content["runs"]
        )
        return Sweep(runs, content.get("search"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: it lists no runs ({error}). Delete it and give the sweep's command again."
        ) from error


def _folder_name(name: Any) -> str:
    """A run's name as the file has it. Raises ValueError where it would lead out of the sweep's folder."""
    if not isinstance(name, str) or not name or _plain(name) != name:
        raise ValueError(f"a run is called {shown(name)}")
    return name


def existing(folder: Path) -> Sweep:
    """The sweep in a folder. Raises UserError where there is none."""
    if (sweep := read(folder)) is None:
        what = "does not exist" if not folder.exists() else f"has no {SWEEP}"
        raise UserError(f"{folder} is not a sweep's folder: it {what}. Give a configuration: `diffrl sweep --help`.")
    return sweep


def write(folder: Path, sweep: Sweep) -> None:
    """Write a sweep's file, whole or not at all."""
    runs = [
        {
            "name": run.name,
            "settings": dict(run.settings),
            **({} if run.trial is None else {"trial": run.trial}),
            **({"unseeded": run.unseeded} if run.unseeded not in ("", _without_seeds(run.name)) else {}),
            "config": configuration.to_dict(run.config),
        }
        for run in sweep.runs
    ]
    with atomic_path(folder / SWEEP) as temporary:
        temporary.write_text(json.dumps({"version": 1, "search": sweep.search, "runs": runs}, indent=1))
