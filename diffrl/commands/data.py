"""`diffrl data ...`: list, inspect, generate, download and convert data sets.

Every command is a frozen dataclass, read by tyro, with a `run()` that does it. Heavy imports wait until then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from diffrl.commands.data_convert import Convert, environment_of
from diffrl.commands.data_tables import (
    distributions,
    legend,
    listing,
    ranges,
    shown_on,
    summary,
    told,
    without_cut,
)
from diffrl.data.config import HDF5_SUFFIXES, ActionUnits, TimeLimitTerminals
from diffrl.support.errors import UserError, counted
from diffrl.support.failure import no_room
from diffrl.support.files import address_of, to_write
from diffrl.support.folder import spare
from diffrl.support.schema import Count, Rows, Seed, check

if TYPE_CHECKING:
    from rich.console import Console

    from diffrl.data.checks import Finding
    from diffrl.data.env_spec import EnvSpec
    from diffrl.data.offline import OfflineDataset
    from envs.datasets import Generated, Origin
    from envs.registry import Benchmark


@dataclass(frozen=True)
class ListData:
    """List the data sets of D4RL, OGBench and other packages, and Minari's here: rows, environment, scores, where.

    `diffrl data list ogbench` shows OGBench's alone, `diffrl data list minari` those of Minari's that are here.
    """

    pattern: Annotated[Positional[str], tyro.conf.arg(metavar="[TEXT]")] = ""
    """Show only ids that contain this text; by default all."""

    def run(self) -> int:
        """Print the table, and the notes where few data sets match. Gives 1 if none does."""
        from rich.markup import escape

        from diffrl.commands import data_ogbench
        from diffrl.data import minari as minari_format
        from envs import registry
        from envs.datasets import generated, locate
        from envs.ogbench import generation

        chosen = [registry.get(benchmark_id) for benchmark_id in registry.ids() if self.pattern in benchmark_id]
        wanted = "" if self.pattern == "minari" else self.pattern.removeprefix("minari:")
        local = {name: steps for name, steps in minari_format.local_ids().items() if wanted in name}
        others, broken = _of_packages(self.pattern)
        chosen += data_ogbench.matching(self.pattern)
        console = shown_on()
        for problem in broken:
            console.print(f"[yellow]{escape(problem)}[/]", highlight=False)
        if self.pattern in ("minari", "minari:") and not local:
            console.print(
                f"No data set of Minari's is here, in {minari_format.store()}. `diffrl data download "
                "mujoco/hopper/medium-v0` fetches one.",
                highlight=False,
            )
            return 1
        if not chosen and not local and not others:
            console.print(f"No data set has {self.pattern!r} in its id: {registry.hint(self.pattern)}")
            return 1
        rows: list[tuple[str, ...]] = []
        seeded: dict[str, None] = {}
        for benchmark in chosen:
            origin = locate(benchmark.id)
            rows.append((benchmark.id, _status(origin), _rows_of(origin.path), *_scores_of(benchmark)))
            for piece in generated(benchmark.id):
                name = piece.path.name if piece.seed else _option(piece, benchmark)
                seeded |= {str(piece.path.parent): None} if piece.seed else {}
                rows.append((name, "here", _rows_of(piece.path), "", "", ""))
        for benchmark, distribution in others:
            rows.append((benchmark.id, f"by {distribution}", "-", *_scores_of(benchmark)))
        for name, steps in local.items():
            rows.append((name, "here (Minari)", f"{steps:,}", *_scores_of_local(name)))
        console.print(listing(rows))
        known = len(chosen) + len(others)
        counts = [f"{counted(known, 'data sets')} known by name"] * (known > 0)
        if local:
            counts.append(f"{len(local):,} of Minari's" if known else f"{counted(len(local), 'data sets')} of Minari's")
        said = [f"{' and '.join(counts)}.", *legend(rows, generation.folders(), seeded)]
        if local or not self.pattern:
            said.append("Further ids of Minari's, such as mujoco/hopper/medium-v0, can be downloaded too.")
        console.print(" ".join(said), highlight=False)
        if len(chosen) + len(others) <= 8:
            shown = [*chosen, *(benchmark for benchmark, _ in others)]
            for note in dict.fromkeys(data_ogbench.note(benchmark, len(chosen)) for benchmark in shown):
                if note:
                    console.print(f"- {note}", highlight=False)
        return 0


@dataclass(frozen=True)
class Info:
    """Describe a data set: rows, episodes, returns, ranges, and what is wrong with it, if anything.

    The exit code is 1 where something is wrong with it. Of a known id, also one of Minari's own, whose data are not on
    this machine it says what is known, and how to get them, with exit code 0.
    """

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """An id of D4RL's, OGBench's or another package's, a Minari id, or the path of an HDF5 or npz file or of a Minari
    folder."""
    picture: Path | None = None
    """Save a picture of returns, lengths, and positions or actions here, in the format of its ending: .png, .svg, .pdf
    or .jpg; by default none. A file that is there is kept, unless --force."""
    scores_of: str | None = None
    """The D4RL id whose reference scores normalise the returns, where the data set is not D4RL's itself; by
    default its own, or the id that the file names."""
    env: str | None = None
    """Gymnasium id of the environment that the data are checked against; none: without one. By default the benchmark's,
    or what the file names."""
    rows: int | None = None
    """Read only so many rows from the beginning; by default all. An episode that this cuts is left out of the table of
    steps and returns."""
    time_limit_terminals: TimeLimitTerminals | None = None
    """Describe the rows as `diffrl train` takes them with this option. By default terminal rows are true ends."""
    actions: ActionUnits | None = None
    """Describe the rows as `diffrl train` takes them with this option. By default actions are in the units of their
    environment."""
    cut_contradictions: bool = False
    """Describe the rows as `diffrl train` takes them with this option."""
    add_checksum: bool = False
    """Add a checksum of the contents to an HDF5 file that has none: from then on damage to it is seen at each reading.
    All else in the file stays as it is."""
    force: bool = False
    """Replace the --picture that is there."""

    def run(self) -> int:
        """Print the description. Gives 1 if the data set has problems."""
        from diffrl.commands.data_ogbench import print_fidelity, recordings
        from diffrl.data import d4rl
        from diffrl.data.env_spec import EnvSpec
        from diffrl.data.observations import goal_left_out
        from envs import registry
        from envs.datasets import load_dataset, locate, part_path
        from envs.plots import plot_dataset
        from envs.rows import first_rows, size_of

        self._refuse()
        origin = locate(self.dataset)
        console = shown_on()
        if origin.kind == "minari" and _print_minari(console, origin.name) and not origin.exists:
            console.print(f"Not on this machine. Get it with: diffrl data download {origin.name}", highlight=False)
            return self._without_data()
        if (
            origin.benchmark is not None
            and not origin.exists
            and not (self.rows is not None and part_path(origin.name, self.rows).is_file())
        ):
            _print_benchmark(console, origin.benchmark)
            _print_missing(console, origin.benchmark)
            return self._without_data()
        if self.add_checksum:
            if origin.kind not in ("file", "d4rl") or origin.path is None:
                raise UserError(f"{self.dataset} has no place for a checksum; convert it: `diffrl data convert`.")
            if not d4rl.has_checksum(origin.path) and (why := no_room(origin.path)):
                raise UserError(f"{origin.path} cannot be written anew, with a checksum: {why}. It is as it was.")
            d4rl.seal(origin.path)
        dataset = load_dataset(self.dataset, rows=self.rows, check=False)
        part = first_rows(self.dataset, dataset, self.rows) is not None
        benchmark, env_id = origin.benchmark, str(dataset.metadata.get("env_id", ""))
        if self.scores_of is not None:
            benchmark = registry.get(self.scores_of)
        elif benchmark is None and registry.known(env_id):  # maze2d: environments have the ids of the data sets
            benchmark = registry.get(env_id)
        if origin.benchmark is not None:
            _print_benchmark(console, origin.benchmark)
        spec = _named_by(origin) or EnvSpec.of(dataset.metadata)
        if spec is not None:
            console.print(f"environment: {spec}, from {spec.origin}", markup=False, highlight=False)
        if remark := goal_left_out(dataset.metadata):
            console.print(remark, markup=False, highlight=False)
        for key, value in dataset.metadata.items():
            if key not in ("dataset", "env_spec", "env_origin"):  # what was just typed; what was just said
                console.print(told(key, value), markup=False, highlight=False)
        sealable = origin.kind in ("file", "d4rl") and origin.path is not None and origin.path.suffix in HDF5_SUFFIXES
        if sealable and origin.path is not None and origin.exists and not d4rl.has_checksum(origin.path):
            advice = " (--add-checksum adds one)" if address_of(self.dataset) is None else ""
            console.print(f"checksum: none, so damage to the file would go unseen{advice}")
        dataset, findings = self._examine(dataset)
        if not dataset.structural_problems():
            recorded, said = recordings(origin.name, dataset) if origin.kind == "ogbench" else (None, "")
            shown, per = (dataset, "episode") if recorded is None else (recorded, "recording")
            if recorded is not None:  # a task that is solved in the last row of a part ends no recording
                shown = replace(recorded, cut=part and not recorded.timeouts[-1])
            whole = size_of(origin) if part and origin.exists else None
            first = summary(dataset, part, whole) + f"\n{said}" * bool(said)
            episodes = without_cut(shown)
            cut = f"--rows cuts the one {per} of these rows: there are no steps and returns to tell."
            for block in (first, cut if episodes is None else distributions(episodes, benchmark, per), ranges(dataset)):
                console.print()
                console.print(block)
            console.print()
            if origin.kind == "ogbench":
                print_fidelity(console, origin.name, dataset)
            if self.picture is not None:
                plot_dataset(self.picture, shown if episodes is None else episodes, benchmark, self.dataset, per)
                console.print(f"Picture: {self.picture}", highlight=False)
        headings = {"problem": "[bold red]Problems:[/]", "warning": "[bold yellow]Warnings:[/]"}
        for severity, heading in (headings | {"note": "[bold]Remarks:[/]"}).items():
            if chosen := [finding for finding in findings if finding.severity == severity]:
                console.print(heading)
                for finding in chosen:
                    console.print(f"- {finding}", markup=False, highlight=False)
        remarks = sum(finding.severity == "note" for finding in findings)
        if any(option in finding.remedy for option in _OF_TRAINING for finding in findings):
            console.print(
                "Here the options named only show the rows so: `diffrl train` takes them so, and `diffrl data convert` "
                "writes them so."
            )
        if not any(finding.severity != "note" for finding in findings):
            but = f", but read {counted(remarks, 'remarks')} above" if remarks else ""
            console.print(f"[green]No problems found{but}.[/]", highlight=False)
        return int(any(finding.severity == "problem" for finding in findings))

    def _refuse(self) -> None:
        """Raise UserError where nothing can be written to what is to be written, before anything is read."""
        if self.add_checksum:
            to_write(self.dataset)
        if self.picture is None:
            return
        if self.picture.suffix.lower() not in _PICTURES:
            endings = f"{', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}"
            raise UserError(f"Cannot save a picture as {self.picture}: expected a path ending in {endings}.")
        spare(self.picture, self.force)
        if why := "it is a folder" if self.picture.is_dir() else no_room(self.picture):
            raise UserError(f"{self.picture} cannot be written: {why}. Choose another place for it (--picture).")

    def _without_data(self) -> int:
        """Gives 0, that of what is known without the data; raises UserError where an option needs them."""
        if self.picture is not None or self.add_checksum:
            asked = "--add-checksum" if self.picture is None else "--picture"
            raise UserError(f"{asked} needs the data set, which is not on this machine: see above.")
        return 0

    def _examine(self, dataset: OfflineDataset) -> tuple[OfflineDataset, list[Finding]]:
        """The data set, its episodes counted where they have to be; and what is found in it."""
        from diffrl.data.checks import Finding, Known, Taken, counted_limit, examine, take
        from envs.task import DiscreteActions

        if broken := dataset.structural_problems():
            return dataset, [Finding(problem, "problem") for problem in broken]
        try:
            env, unchecked = environment_of(self.dataset, dataset, self.env, self.rows)
            unfit = self.env is not None  # one that the user named, and that it cannot be, is the problem
        except DiscreteActions as error:
            env, unchecked, unfit = None, str(error), True
        known, taken = Known.of(dataset, env), Taken.by(self)
        more = []
        if unchecked:
            more = [Finding(unchecked, "problem" if unfit else "note")]
            if unfit and not known.bounds.known:
                known, taken = replace(known, bounds=known.bounds.unlimited()), replace(taken, actions=None)
        taken = replace(taken, counted=counted_limit(dataset, known, taken))
        shown = take(dataset, known, taken)
        if shown.cut and not dataset.marks_timeouts and shown.episode_lengths()[-1] == known.limit:  # it is whole
            shown = replace(shown, cut=False)
        return shown, [*more, *examine(dataset, known, taken)]


_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""Endings of the names of pictures, which say the format."""
_OF_TRAINING = ("--actions", "--cut-contradictions", "--time-limit-terminals")
"""Options that are recommended for what is found."""


@dataclass(frozen=True)
class Generate:
    """Rebuild a data set on this machine: maze2d with D4RL's recipe, OGBench's with the oracles in its wheel.

    A million rows take under a minute (maze2d), 7 minutes of a core (pointmaze) or 70 (cubes, scene, puzzles). What is
    cut goes on with the same command.
    """

    benchmark: Annotated[Positional[str], tyro.conf.arg(metavar="ID")]
    """The id, such as maze2d-umaze-v1 or cube-single-play-v0."""
    rows: Rows | None = None
    """Number of rows (maze2d). Default: D4RL's own, 1, 2 or 4 million."""
    seed: Seed = 0
    """Seed of the walk, or of the episodes."""
    output: Path | None = None
    """The file to write, ending in .hdf5 or .h5. Default: in the data directory, where the id finds it if rows and seed
    are the default."""
    force: bool = False
    """Replace the file if it exists."""
    episodes: Count | None = None
    """Number of training episodes (OGBench), beside which a tenth for validation are made. Default: OGBench's own."""
    jobs: Count | None = None
    """Processes (OGBench); the rows do not depend on it. Default: one a core."""

    def __post_init__(self) -> None:
        check(self)
        if self.output is not None and self.output.suffix not in HDF5_SUFFIXES:
            raise UserError(f"Cannot write '{self.output}': expected a path ending in .hdf5 or .h5 (--output).")

    def run(self) -> None:
        """Generate the data set and print where it is."""
        from envs import datasets, registry

        if registry.is_ogbench(self.benchmark):
            self._of_ogbench()
            return
        if self.episodes is not None or self.jobs is not None:
            raise UserError("--episodes and --jobs are of OGBench's data sets; maze2d's have --rows.")
        path = self.output or datasets.cached_path(self.benchmark, self.rows, self.seed)
        if path.exists() and not self.force:
            shown_on().print(f"It is there already: {path} (--force replaces it)", highlight=False)
            return
        path = datasets.generate(self.benchmark, path, self.rows, self.seed)
        whole = path == datasets.cached_path(self.benchmark)
        shown_on().print(f"Written: {path}. Use it as --dataset {self.benchmark if whole else path}", highlight=False)

    def _of_ogbench(self) -> None:
        from diffrl.commands import data_ogbench

        if self.rows is not None:
            raise UserError(f"--rows is of maze2d; {self.benchmark} has --episodes.")
        path, there = data_ogbench.generate(
            self.benchmark, self.episodes, self.seed, self.jobs, self.output, self.force
        )
        said = f"It is there already: {path} (--force replaces it)." if there else f"Written: {path}"
        shown_on().print(said, highlight=False)
        shown_on().print(data_ogbench.use(self.benchmark, path, self.episodes), highlight=False)


@dataclass(frozen=True)
class Download:
    """Fetch a D4RL or Minari data set; an interrupted download is resumed, the file checked before it is used."""

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """A D4RL id (`diffrl data list`) or a Minari id such as mujoco/hopper/medium-v0."""
    force: bool = False
    """Fetch it even if it is on this machine."""

    def run(self) -> None:
        """Fetch the data set and print where it is."""
        from envs.datasets import download

        shown_on().print(f"Here: {download(self.dataset, self.force)}", highlight=False)


def _named_by(origin: Origin) -> EnvSpec | None:
    """The environment of a data set that has one by its name, whatever a file says; None: it has none."""
    from diffrl.data.env_spec import BENCHMARK, EnvSpec

    if origin.benchmark is None or origin.benchmark.env_id is None:
        return None
    of = "the data family" if origin.kind == "package" else BENCHMARK
    return EnvSpec(origin.benchmark.env_id, dict(origin.benchmark.env_kwargs), origin=of)


def _verb(benchmark: Benchmark) -> str:
    return "generate" if benchmark.generated else "download"


def _of_packages(pattern: str) -> tuple[list[tuple[Benchmark, str]], list[str]]:
    """Other packages' data sets with `pattern` in the id, each with its distribution; and what cannot be used, why."""
    from envs import registry

    chosen, broken = [], []
    for plugin in registry.packages():
        try:
            benchmarks = registry.family(plugin).benchmarks
        except UserError as error:
            broken.append(str(error))
            continue
        chosen += [(benchmark, plugin.distribution) for benchmark in benchmarks if pattern in benchmark.id]
    return chosen, broken


def _status(origin: Origin) -> str:
    from diffrl.commands import data_ogbench

    if origin.exists:
        return data_ogbench.here(origin.path) if origin.kind == "ogbench" and origin.path is not None else "here"
    assert origin.benchmark is not None
    otherwise = "by file" if origin.kind == "ogbench" else "download"
    return "generate" if origin.benchmark.generated else otherwise


def _rows_of(path: Path | None) -> str:
    from diffrl.data import d4rl

    rows = d4rl.count_rows(path) if path is not None else None
    return "-" if rows is None else f"{rows:,}"


def _scores_of(benchmark: Benchmark) -> tuple[str, str, str]:
    """A benchmark's environment, and its reference returns of a random policy and an expert, as text."""
    low, high = ("-" if score is None else f"{score:.2f}" for score in (benchmark.ref_min, benchmark.ref_max))
    return benchmark.env_id or "-", low, high


def _scores_of_minari(dataset_id: str) -> tuple[str, str, str]:
    """What `_scores_of` says, of a Minari id: the references are D4RL's, which is said."""
    from envs import families

    task = families.of_minari(dataset_id)
    return ("-", "-", "-") if task is None else _scaled_by_d4rl(task.env_id, task.reference)


def _scores_of_local(dataset_id: str) -> tuple[str, str, str]:
    """What `_scores_of` says, of a Minari data set that is here: by what its own metadata say of its environment."""
    from diffrl.data.minari import env_metadata
    from envs.task import task_of

    try:
        task = task_of(f"minari:{dataset_id}", env_metadata(dataset_id) | {"minari_id": dataset_id})
    except UserError:  # what is wrong with it, `data info` says
        return "-", "-", "-"
    return _scaled_by_d4rl(task.env_id, task.reference)


def _scaled_by_d4rl(env_id: str | None, reference: str | None) -> tuple[str, str, str]:
    """An environment and the returns of a D4RL benchmark by which scores in it are scaled, if any, as text."""
    from envs import registry

    benchmark = None if reference is None else registry.get(reference)
    if benchmark is None or benchmark.reference_scores is None:
        return env_id or "-", "-", "-"
    _, low, high = _scores_of(benchmark)
    return env_id or "-", f"{low} (D4RL's)", f"{high} (D4RL's)"


def _print_minari(console: Console, dataset_id: str) -> bool:
    """Say what a Minari id is about, if it is one of Minari's own: environment, references, what differs from D4RL.

    Gives whether it is one.
    """
    from envs import families

    if (task := families.of_minari(dataset_id)) is not None:
        env_id, low, high = _scores_of_minari(dataset_id)
        references = f"reference returns: random {low}, expert {high}" if task.reference else "no reference returns"
        console.print(f"{dataset_id}: {env_id}; {references}{task.note and f'. Not D4RL itself: {task.note}'}.")
    return task is not None


def _option(piece: Generated, benchmark: Benchmark) -> str:
    """What names a generated file on the command line, after `--dataset` or `diffrl data info`."""
    return str(piece.path) if piece.seed else f"{benchmark.id} --rows {piece.rows}"


def _print_missing(console: Console, benchmark: Benchmark) -> None:
    """Say that a data set is not here whole, how to get it, and what of it is here."""
    from envs.datasets import generated

    if not benchmark.generated and benchmark.env_extra == "ogbench":
        console.print("Not on this machine. It is read where you have OGBench's own file.")
        return
    what = benchmark.id.removesuffix("-val")  # made with the training set
    console.print(f"Not on this machine. Get it with: diffrl data {_verb(benchmark)} {what}")
    for piece in generated(benchmark.id):
        fewer = "episodes" if benchmark.env_extra == "ogbench" else "rows"
        option = _option(piece, benchmark)
        ask = "" if piece.seed else f" (`diffrl data info {option}`; train on it with --dataset {option})"
        console.print(f"Generated here with fewer {fewer} or another seed: {option}{ask}", highlight=False)


def _print_benchmark(console: Console, benchmark: Benchmark) -> None:
    console.print(f"[bold]{benchmark.id}[/]", highlight=False)
    steps = "" if benchmark.max_episode_steps is None else f", {benchmark.max_episode_steps} steps"
    console.print(f"environment for scores: {benchmark.env_id or 'none'}{steps}")
    if benchmark.reference_scores is not None:
        console.print("reference returns: random {:g}, expert {:g}".format(*benchmark.reference_scores))
    for said in (benchmark.fidelity, benchmark.note):
        if said:
            console.print(said, highlight=False)


VERBS = {"list": ListData, "info": Info, "generate": Generate, "download": Download, "convert": Convert}
"""What stands after `diffrl data`."""
