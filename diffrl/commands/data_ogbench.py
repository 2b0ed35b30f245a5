"""What `diffrl data` does for OGBench's data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffrl.support.errors import UserError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from diffrl.data.offline import OfflineDataset
    from envs.registry import Benchmark


def matching(pattern: str) -> Iterator[Benchmark]:
    """OGBench's data sets with `pattern` in the id, all for "ogbench"; its tasks where the pattern names some."""
    from envs import registry
    from envs.ogbench import names

    for one in names.tasks() if "task" in pattern else names.datasets():
        if pattern == "ogbench" or pattern in one:
            yield registry.get(one)


def note(benchmark: Benchmark, listed: int) -> str:
    """What the list says of a data set. Beside others of OGBench's it names none, so that it is the same for all."""
    stem = benchmark.id.removesuffix("-v0")
    if benchmark.env_extra != "ogbench" or benchmark.env_id is not None or listed == 1:
        return benchmark.note
    return benchmark.note.replace(f"{stem}-singletask-v0", "ID-singletask-v0 (ID without its -v0)")


def here(path: Path) -> str:
    """What the list says of a file that is here."""
    from envs.ogbench import reading

    return "here (rebuilt)" if reading.is_rebuilt(path) else "here (by file)"


def print_fidelity(console: Console, benchmark_id: str, dataset: OfflineDataset) -> None:
    """Say how the file that a data set was read from is known to be like OGBench's own."""
    from envs.ogbench import fidelity, names, reading

    path = Path(dataset.metadata["path"])
    heading = "Rebuilt, not OGBench's own file" if reading.is_rebuilt(path) else "OGBench's layout, as found"
    console.print(f"[bold]{heading}:[/] {path}", highlight=False)
    for line in fidelity.lines(names.get(benchmark_id), path, dataset):
        console.print(f"- {line}", markup=False, highlight=False)


def recordings(benchmark_id: str, dataset: OfflineDataset) -> tuple[OfflineDataset | None, str]:
    """The rows of a task with the ends of recordings alone, and a sentence on them; None and "" where these are all."""
    from envs.ogbench import fidelity, names

    found = fidelity.recordings(names.get(benchmark_id), Path(dataset.metadata["path"]), dataset)
    if found is None:
        return None, ""
    solved = counted(int(dataset.terminals.sum()), "rows")
    return found, (
        f"recordings: {found.n_episodes:,}. A row that solves the task ends an episode, also where its recording goes "
        f"on: nothing is bootstrapped there ({solved}). The table below is of whole recordings."
    )


def generate(
    benchmark_id: str, episodes: int | None, seed: int, jobs: int | None, output: Path | None, force: bool
) -> tuple[Path, bool]:
    """Rebuild a data set; give its file, and whether it was there already."""
    from envs.ogbench import generation, names

    name = names.get(benchmark_id)
    if name.validation:
        raise UserError(f"The validation set is made with the training set: `diffrl data generate {name.dataset}`.")
    path = output or generation.cached_path(name, episodes, seed)
    there = path.is_file() and generation.validation_path(path).is_file()
    if there and not force:
        return path, True
    return generation.generate(name, path, episodes=episodes, seed=seed, jobs=jobs, again=force), False


def use(benchmark_id: str, path: Path, episodes: int | None) -> str:
    """A sentence: how to train on a file."""
    from dataclasses import replace

    from envs.ogbench import generation, names, reading

    name = names.get(benchmark_id)
    task = benchmark_id if name.task is not None else names.of_dataset(name)[0]
    if path == generation.cached_path(name):
        return f"Train on it: diffrl train --agent fql --dataset {task}"
    few = episodes if episodes is not None and episodes < name.episodes else None  # --rows asks for no more than all
    if few is not None and path == generation.cached_path(name, few):
        return f"Train on it: diffrl train --agent fql --dataset {task} --rows {few * (name.rows - 1)}"
    return reading.way_to_train(replace(name, validation=False), path, episodes)
