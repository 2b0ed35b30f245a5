"""OGBench's data sets rebuilt on this machine: episodes by several processes, kept one by one, then joined to a file.

An episode's rows follow from the data set, the seed, the split and its number alone: neither the number of processes
nor a kill changes the file by a bit.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data import d4rl
from diffrl.support.console import console, work
from diffrl.support.errors import UserError
from diffrl.support.files import alone, data_directory
from diffrl.support.machine import cores
from diffrl.support.stopping import going_on
from envs.ogbench import parts, worlds
from envs.ogbench.names import Name
from envs.ogbench.oracles import ROWS_VERSION
from envs.ogbench.parts import TRAIN, VALIDATION
from envs.ogbench.worker import Job

_STREAM = 0x0B
"""What of a seed's streams the episodes are drawn from."""
_AT_ONCE = 16
"""Episodes in memory while they are joined."""
_RATES = {True: 2500, False: 250}
"""Rows a second that a process makes, in mazes and of arms, as measured on a core of 2 GHz."""
_LONG = 10
"""Minutes from which it is said what can be read instead of waiting."""
_DECIDE = ("ogbench", "mujoco", "dm_control", "gymnasium", "numpy", "scipy")
"""The packages whose versions decide the rows."""


def cached_path(name: Name, episodes: int | None = None, seed: int = 0, validation: bool = False) -> Path:
    """Where a data set is kept: `<data directory>/ogbench/ID.hdf5`, its validation set in `ID-val.hdf5`.

    One with another number of episodes or another seed has them in its name, so that the id alone never means it.
    """
    some = "" if episodes in (None, name.episodes) else f".{episodes}-episodes"
    stem = name.dataset + some + ("" if seed == 0 else f".seed-{seed}")
    return data_directory() / "ogbench" / f"{stem}{'-val' if validation else ''}.hdf5"


def parts_here(name: Name, least: int) -> list[tuple[int, Path]]:
    """The files here of seed 0 that hold fewer episodes than OGBench's, `least` or more: (episodes, file), ascending.

    Of a small data set and of the whole that it begins, whose first episodes are the same.
    """
    found = []
    for stem in dict.fromkeys((name.dataset, name.whole.dataset)):
        pattern = re.compile(rf"{re.escape(stem)}\.(\d+)-episodes{'-val' if name.validation else ''}\.hdf5")
        matches = [(path, pattern.fullmatch(path.name)) for path in cached_path(name).parent.glob("*.hdf5")]
        found += [(int(match[1]), path) for path, match in matches if match]
    return sorted((n, path) for n, path in found if least <= n < name.whole.episodes)


def official_folder() -> Path:
    """OGBench's own folder of data: `$OGBENCH_DATASET_DIR`, else ~/.ogbench/data."""
    return Path(os.environ.get("OGBENCH_DATASET_DIR") or "~/.ogbench/data").expanduser()


def folders() -> str:
    """The folders that OGBench's own files are read from, in words: ours is the first that is looked in."""
    whose = " ($OGBENCH_DATASET_DIR)" if os.environ.get("OGBENCH_DATASET_DIR") else ""
    return f"{official_folder()}{whose} or {data_directory() / 'ogbench'}"


def validation_path(path: Path) -> Path:
    """The file of the validation set beside that of the training set."""
    return path.with_name(f"{path.stem}-val{path.suffix}")


def validation_episodes(episodes: int) -> int:
    """A tenth of the training episodes, as OGBench has it; at least one."""
    return max(1, episodes // 10)


def generate(
    name: Name,
    path: Path | None = None,
    *,
    episodes: int | None = None,
    rows: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    again: bool = False,
    quiet: bool = False,
    instead: str = "",
) -> Path:
    """Rebuild a data set, training and validation, and give the training set's file, `cached_path(...)` unless given.

    episodes: of training, by default OGBench's number. rows: of an episode, by default OGBench's. jobs: processes, by
    default the machine's cores. again: also where the file is there. What a kill has left is gone on from. instead: a
    sentence on what else can be done, said where the work is for more than ten minutes. Raises UserError for data that
    need a trained expert, without OGBench's wheel, and where a process dies.
    """
    if not name.has_oracle:
        raise UserError(
            f"{name.dataset} cannot be rebuilt: its data are from a trained expert. Put OGBench's {name.dataset}.npz "
            f"in {folders()}."
        )
    episodes = name.episodes if episodes is None else episodes
    jobs = cores() if jobs is None else jobs
    rows = name.rows if rows is None else rows
    for what, value, least in (("episodes", episodes, 1), ("jobs", jobs, 1), ("rows of an episode", rows, 2)):
        if value < least:
            raise UserError(f"The number of {what} is {value}; expected at least {least}.")
    worlds.require_wheel()
    target = (path or cached_path(name, episodes, seed)).expanduser()
    with alone(target, lambda: console.print(f"Waiting for another process, which is generating {target}.")):
        if target.is_file() and validation_path(target).is_file() and not again:
            return target
        _make(name, target, episodes, rows, seed, jobs, quiet, instead)
    return target


def _make(name: Name, target: Path, episodes: int, rows: int, seed: int, jobs: int, quiet: bool, instead: str) -> None:
    about = {
        "dataset": name.whole.dataset,
        "rebuilt": "by diffrl, with the environments and oracles of OGBench's wheel",
        "seed": seed,
        "rows": rows,
        "rows_version": ROWS_VERSION,
        "versions": {package: version(package) for package in _DECIDE},
    }
    folder = target.with_name(f".{target.name}.parts")
    if parts.open_folder(folder, about) and not quiet:
        console.print(f"{folder} held episodes of other settings or versions: they are made again.", markup=False)
    splits = {TRAIN: episodes, VALIDATION: validation_episodes(episodes)}
    wanted = [(split, number) for split, n in splits.items() for number in range(n)]
    missing = [where for where in wanted if not parts.is_whole(folder, *where)]

    def kept() -> str:
        there = sum(parts.place(folder, *where).exists() for where in wanted)
        return f"Stopped. {there:,} of {len(wanted):,} episodes are kept: the same command goes on with them."

    title = f"Rebuilding {name.dataset}: {len(wanted):,} episodes of {rows:,} rows"
    if not quiet:
        there = f", {len(wanted) - len(missing):,} of them there" if len(missing) < len(wanted) else ""
        processes = min(jobs, max(len(missing), 1))
        console.print(f"{title}{there}, by {processes} process{'es' * (processes > 1)}, to {target}.", markup=False)
        minutes = len(missing) * rows / processes / _RATES[name.world.maze] / 60
        if instead and minutes > _LONG:
            console.print(f"That takes about {minutes:,.0f} minutes. {instead}", markup=False)
    with going_on(kept):
        if missing:
            with work(title, "rows", quiet) as on_rows:
                done = len(wanted) - len(missing)
                on_rows(done * rows, len(wanted) * rows)
                for _ in _finished(name, folder, rows, seed, missing, jobs):
                    done += 1
                    on_rows(done * rows, len(wanted) * rows)
        for split, n in splits.items():
            _join(folder, split, n, target if split == TRAIN else validation_path(target), about)
    shutil.rmtree(folder)


def episode_seed(seed: int, split: int, number: int) -> int:
    """The seed of an episode, made of that of the data set, its split and its number."""
    from diffrl.support.seeds import mix  # torch: the workers do without

    return mix((seed, split, number, _STREAM))


def _finished(
    name: Name, folder: Path, rows: int, seed: int, missing: list[tuple[int, int]], jobs: int
) -> Iterator[tuple[int, int]]:
    """Make the missing episodes by processes; yields each (split, number) when it is on the disk."""
    shares = [missing[k::jobs] for k in range(min(jobs, len(missing)))]
    with ExitStack() as held:
        selector = held.enter_context(selectors.DefaultSelector())
        for share in shares:
            seeds = [[split, number, episode_seed(seed, split, number)] for split, number in share]
            said = held.enter_context(tempfile.TemporaryFile())
            process = _start(Job(name.dataset, rows, str(folder), os.getpid(), seeds), said)
            held.callback(_end, process)
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, (process, said))
        while selector.get_map():
            for key, _ in selector.select(timeout=1.0):
                process, said = key.data
                line = process.stdout.readline()
                if line.startswith("error "):
                    raise UserError(line.removeprefix("error ").strip())
                if line:
                    split, number = map(int, line.split())
                    yield split, number
                    continue
                selector.unregister(process.stdout)
                if code := process.wait():
                    raise UserError(_died(code, said))


def _start(job: Job, said: IO[bytes]) -> subprocess.Popen[str]:
    """A process at its job; what it says on standard error goes to the file `said`."""
    # What can be imported here can be imported there; one thread a process, from the libraries' first moment.
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "envs.ogbench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
        bufsize=1,
        process_group=0,  # Ctrl-C on the terminal is the parent's to handle
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died: its exit code and last words are reported where it is waited for
        process.stdin.write(job.to_json() + "\n")
        process.stdin.close()
    return process


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _died(code: int, said: IO[bytes]) -> str:
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    said.seek(0)
    last = (said.read().decode(errors="replace").strip().splitlines() or [""])[-1][:300]
    text = f"A process that makes episodes has died ({how}). What is made is kept: the same command goes on with it."
    return f"{text} {last}".strip()


def _join(folder: Path, split: int, n: int, path: Path, about: Mapping[str, Any]) -> None:
    """Write the episodes of a split as one file."""
    fared = np.zeros((n, 3), np.int64)

    def blocks() -> Iterator[dict[str, NDArray[Any]]]:
        for start in range(0, n, _AT_ONCE):
            several = [parts.read(folder, split, number) for number in range(start, min(start + _AT_ONCE, n))]
            for number, one in enumerate(several, start):
                fared[number] = one.targets, one.reached, one.attempts
            yield {key: np.concatenate([one.columns[key] for one in several]) for key in several[0].columns}

    metadata = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in about.items()}
    metadata |= {"split": "validation" if split == VALIDATION else "training", "episodes": n}
    # Views: they are written after the blocks, which fill them.
    metadata |= {"targets": fared[:, 0], "reached": fared[:, 1], "attempts": fared[:, 2]}
    d4rl.write_blocks(path, blocks(), metadata)
