"""Benchmarks by id: D4RL's, OGBench's, and those of other packages, entry points of the group `diffrl.datasets`.

Reference scores, download addresses, step limits, and which environment evaluates them. D4RL's ids, reference scores
and addresses are in `d4rl.csv` beside this file; what holds for whole families of it is in `families.py`.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from diffrl.data.offline import OfflineDataset
from diffrl.support import plugins
from diffrl.support.errors import UserError, closest, nearest, shown
from diffrl.support.plugins import Plugin
from envs import families
from envs.ogbench import names as ogbench


@dataclass(frozen=True)
class Benchmark:
    """A named data set, and the environment that evaluates policies trained on it: D4RL's or another package's."""

    id: str
    """The name, such as hopper-medium-v2."""
    env_id: str | None = None
    """The Gymnasium environment whose returns compare with the references, perhaps as MODULE:ID; None: there is none
    (`note` says why)."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut; None: not known."""
    ref_min: float | None = None
    """Mean return of a random policy; None where there is no reference."""
    ref_max: float | None = None
    """Mean return of an expert."""
    domain: str = ""
    """The robot or task of a D4RL id: hopper, maze2d, pen, ..."""
    url: str = ""
    """Where D4RL's file is, when the host is up."""
    note: str = ""
    """How faithful data and environment are to the original, and what to use instead."""
    fidelity: str = ""
    """One line that stands beside every score: what the environment is, and how it compares with the original."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `gymnasium.make(env_id, ...)`."""
    env_extra: str | None = None
    """The extra of diffrl that holds the environment: `pip install 'diffrl[EXTRA]'`."""
    generated: bool = False
    """Whether `diffrl data generate` rebuilds the data set here, without a download."""
    minari: str | None = None
    """A Minari data set of the same kind (not the same data), for when D4RL's host is down."""
    ours_alone: bool = False
    """Whether its rows are read as nobody else reads them, so that scores are compared with none."""
    scored_by: Literal["return", "success"] = "return"
    """What a score is made of: the return, normalised by the references, or the share of episodes that succeed."""

    @property
    def has_scores(self) -> bool:
        """Whether episodes in its environment are scored, not only by their returns."""
        return self.scored_by == "success" or self.ref_min is not None

    @property
    def reference_scores(self) -> tuple[float, float] | None:
        """The reference returns (ref_min, ref_max) of a random policy and an expert; None where there are none."""
        return None if self.ref_min is None or self.ref_max is None else (self.ref_min, self.ref_max)

    def normalised_score(self, returns: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """100 (return - ref_min) / (ref_max - ref_min), elementwise: 0 a random policy, 100 an expert.

        Raises UserError where there are no reference scores.
        """
        if self.reference_scores is None:
            raise UserError(f"There are no reference scores for {self.id!r}; report plain returns instead.")
        low, high = self.reference_scores
        values: npt.NDArray[np.float64] = np.asarray(returns, np.float64)
        return 100.0 * (values - low) / (high - low)


@dataclass(frozen=True)
class DataFamily:
    """Data sets of another package: what an entry point of the group `diffrl.datasets` names."""

    benchmarks: Sequence[Benchmark]
    """The family's data sets. Each id begins with the name of the entry point and a hyphen."""
    load: Callable[[str], OfflineDataset]
    """Gives the whole data set of an id. Where it is not on this machine and cannot be made or fetched, it raises
    `diffrl.support.errors.DataError`, saying what to do."""


def ids() -> list[str]:
    """All of D4RL's ids, in alphabetical order."""
    return list(_table())


def named() -> list[str]:
    """The ids of all data sets that have a name here: D4RL's, OGBench's, and those of other packages that can be used.

    Not Minari's, of which there are those that somebody has downloaded, or may.
    """
    others = []
    for plugin in packages():
        with contextlib.suppress(UserError):  # broken; `diffrl data list` says so
            others += [benchmark.id for benchmark in family(plugin).benchmarks]
    return [*ids(), *ogbench.datasets(), *others]


def is_d4rl(benchmark_id: str) -> bool:
    """Whether D4RL has a benchmark called `benchmark_id`."""
    return benchmark_id in _table()


def is_ogbench(benchmark_id: str) -> bool:
    """Whether OGBench has a data set or a task called `benchmark_id`. Raises UserError for a task it does not have."""
    return ogbench.parse(benchmark_id) is not None


def find(benchmark_id: str) -> Benchmark | None:
    """The benchmark called `benchmark_id`: D4RL's, else OGBench's, else another package's; None where there is none.

    Raises UserError for a broken package, and for a task that OGBench does not have.
    """
    if (of_d4rl := _table().get(benchmark_id)) is not None:
        return of_d4rl
    if "/" in benchmark_id.partition("-")[0]:  # a path, or Minari's: ids of ours and of packages begin with FAMILY-
        return None
    name = ogbench.parse(benchmark_id)
    return of_package(benchmark_id).get(benchmark_id) if name is None else _of_ogbench(benchmark_id, name)


def of_file(name: str) -> Benchmark | None:
    """D4RL's benchmark whose file has this name, as D4RL keeps it (hopper_medium-v2.hdf5) or by its id; else None."""
    return next((one for one in _table().values() if name in (f"{one.id}.hdf5", one.url.rpartition("/")[2])), None)


def known(benchmark_id: str) -> bool:
    """Whether D4RL, OGBench or another package has a benchmark called `benchmark_id`. Raises UserError as `find`."""
    return find(benchmark_id) is not None


def get(benchmark_id: str) -> Benchmark:
    """The benchmark called `benchmark_id`. Raises UserError, naming the nearest known id, where there is none."""
    found = find(benchmark_id)
    if found is None:
        raise UserError(f"Unknown benchmark {benchmark_id!r}: {hint(benchmark_id)} `diffrl data list` shows all.")
    return found


def hint(benchmark_id: str) -> str:
    """Half a sentence naming the known id nearest to `benchmark_id`; the newest version where only that is missing.

    Then, whole sentences: that it may be of a package that is not here, and whose family of the same name is left out.
    """
    versions = [known_id for known_id in ids() if known_id.rsplit("-", 1)[0] == benchmark_id]
    meant = versions[-1] if versions else ogbench.reordered(benchmark_id)
    if meant is not None:
        return f"did you mean {meant!r}?"
    known = of_package(benchmark_id) or ogbench.near(benchmark_id) or named()
    family, families = benchmark_id.partition("-")[0][:60], {known_id.partition("-")[0] for known_id in named()}
    near = difflib.get_close_matches(family, families, n=1, cutoff=0.75)
    elsewhere = plugins.not_here("diffrl.datasets") * (closest(benchmark_id, known) is None or not near)
    said = nearest(benchmark_id, known)
    if closest(benchmark_id, known) is None and near:
        said = f"did you mean {near[0]!r}? `diffrl data list {near[0]}` shows its data sets."
    return " ".join([said + elsewhere, *left_out(benchmark_id)])


def of_package(benchmark_id: str) -> dict[str, Benchmark]:
    """The benchmarks, by id, of the family of another package that `benchmark_id` would belong to; {} without one.

    Raises UserError where the package is broken.
    """
    plugin = _plugin(benchmark_id)
    return {} if plugin is None else {benchmark.id: benchmark for benchmark in family(plugin).benchmarks}


def packages() -> list[Plugin]:
    """The entry points by which other packages bring a data family."""
    return plugins.found("diffrl.datasets")


def family(plugin: Plugin) -> DataFamily:
    """The data family behind an entry point. Raises UserError where it is none, or its name or an id is refused."""
    plugins.check_name(plugin, _families())
    found = plugin.load()
    if not isinstance(found, DataFamily):
        raise plugin.broken(f"it is {found!r}; expected an envs.registry.DataFamily")
    for benchmark in found.benchmarks:
        if not benchmark.id.startswith(f"{plugin.name}-"):
            raise plugin.broken(f"its id {benchmark.id!r} does not begin with {plugin.name + '-'!r}")
        if why := _refused(benchmark.ref_min, benchmark.ref_max):
            raise plugin.broken(f"of {benchmark.id!r} {why}")
    every = [benchmark.id for benchmark in found.benchmarks]
    if twice := next((one for one in every if every.count(one) > 1), None):
        raise plugin.broken(f"it has the id {twice!r} twice")
    return found


def _refused(low: Any, high: Any) -> str:
    """Why scores cannot be made of returns by these two references, half a sentence; "" where they can, or need not."""
    if low is None and high is None:
        return ""
    if all(isinstance(one, Real) for one in (low, high)) and -math.inf < low < high < math.inf:
        return ""
    given = f"ref_min is {shown(low)} and ref_max {shown(high)}"
    return f"{given}; expected two finite returns, the second the larger one, or neither"


def load_of_package(benchmark_id: str) -> OfflineDataset:
    """The data set that another package loads for one of its ids. Raises UserError where the package fails to."""
    plugin = _plugin(benchmark_id)
    assert plugin is not None
    with plugin.blamed(f"load({benchmark_id!r})"):
        dataset = family(plugin).load(benchmark_id)
    if not isinstance(dataset, OfflineDataset):
        raise plugin.broken(f"load({benchmark_id!r}) gives {type(dataset).__name__}; expected OfflineDataset")
    return dataset


def left_out(benchmark_id: str) -> list[str]:
    """Where an id begins as ours do: why another package's family of the same name is not used, a line each."""
    return plugins.left_out("diffrl.datasets", {benchmark_id.partition("-")[0]} & _families())


def _families() -> set[str]:
    """What the ids of D4RL and OGBench begin with, which no package's family can be called."""
    return {own.partition("-")[0] for own in (*ids(), *ogbench.datasets())}


def _plugin(benchmark_id: str) -> Plugin | None:
    """The entry point of the family that an id, FAMILY-REST, would belong to; None where no package brings it."""
    name, hyphen, _ = benchmark_id.partition("-")
    if name in _families():
        return None
    return next((plugin for plugin in packages() if hyphen and plugin.name == name), None)


def normalised_score(benchmark_id: str, returns: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The normalised scores (x100) of returns in the benchmark called `benchmark_id`, elementwise."""
    return get(benchmark_id).normalised_score(returns)


def reference_of(env_id: str, env_kwargs: Mapping[str, Any] | None = None, named: str = "") -> str | None:
    """The id of a benchmark evaluated in `env_id` whose episodes are scored, the newest version; None: there is none.

    For data that are not the benchmark's: scores belong to the environment, and any of its data sets has the same. Of
    OGBench's environments `env_kwargs` say which task it is; of its data sets it is the one that the data have `named`.
    """
    if (task := ogbench.of_environment(env_id, env_kwargs or {}, named)) is not None:
        return task
    stem = env_id.rsplit("-v", 1)[0]
    if stem in _ADROIT:
        return _ADROIT[stem]
    fits = [
        benchmark_id
        for benchmark_id, benchmark in _table().items()
        if benchmark.env_id is not None
        and benchmark.env_id.rsplit("-v", 1)[0] == stem
        and benchmark.ref_min is not None
    ]
    return max(fits, key=lambda benchmark_id: benchmark_id.rsplit("-v", 1)[1], default=None)


_ADROIT = {f"AdroitHand{task}": f"{task.lower()}-human-v1" for task in ("Pen", "Door", "Hammer", "Relocate")}
"""Gymnasium-Robotics' tasks, which are D4RL's but for a point each (`envs.adroit`)."""


def _of_ogbench(benchmark_id: str, name: ogbench.Name) -> Benchmark:
    world = name.world
    oracle = "which the wheel's oracles can rebuild here" if name.has_oracle else "from a trained expert: by file only"
    if name.task is None:
        tasks = f"{ogbench.of_dataset(name)[0]} and its task1 to task5"
        note = f"OGBench's data, {oracle}. Without rewards: those are of a task, {tasks}."
        return Benchmark(benchmark_id, domain=world.name, note=note, env_extra="ogbench", generated=name.has_oracle)
    kwargs: dict[str, Any] = {"task": name.task, "timing": name.timing} | ({"sparse": True} if name.sparse else {})
    return Benchmark(
        benchmark_id,
        env_id=world.env_id,
        env_kwargs=kwargs,
        max_episode_steps=world.max_episode_steps,
        domain=world.name,
        note=f"OGBench's data, {oracle}. Scores are success x100; {_when(name)}.",
        env_extra="ogbench",
        generated=name.has_oracle,
        scored_by="success",
        ours_alone=name.after,
    )


def _when(name: ogbench.Name) -> str:
    """When rewards and success of a task are told, in data and environment, in words: see `envs.ogbench.names`."""
    data, env = ("after" if later else "before" for later in (name.after, name.timing == "post"))
    as_in = {"pre": "OGBench since 1.2.0", "post": "OGBench to 1.1.5, and so in FQL"}[name.timing]
    whose = "ours alone" if name.after else f"as in {as_in}"
    said = f"rewards and success are of the state {data} an action in the data, {env} it in the environment, {whose}"
    return said if name.after or name.timing == "pre" else f"{said}; runs of diffrl up to 0.2.0 had both after it"


@cache
def _table() -> dict[str, Benchmark]:
    lines = files("envs").joinpath("d4rl.csv").read_text().splitlines()
    return {line["id"]: _benchmark(line) for line in csv.DictReader(lines)}


def _benchmark(line: dict[str, str]) -> Benchmark:
    benchmark_id = line["id"]
    domain, task = _parse_id(benchmark_id)
    version = benchmark_id.rsplit("-", 1)[1]
    ref_min = float(line["ref_min"]) if line["ref_min"] else None
    return Benchmark(
        id=benchmark_id,
        domain=domain,
        ref_min=ref_min,
        ref_max=float(line["ref_max"]) if line["ref_max"] else None,
        url=line["url"],
        **families.family(benchmark_id, domain, task, version, ref_min),
    )


def _parse_id(benchmark_id: str) -> tuple[str, str]:
    """The domain and the rest of a D4RL id: `hopper`, `medium-v2`; `bullet-ant`, `expert-v0`."""
    words = benchmark_id.split("-")
    length = 2 if words[0] in ("bullet", "flow") or words[1] == "eval" else 1
    return "-".join(words[:length]), "-".join(words[length:])
