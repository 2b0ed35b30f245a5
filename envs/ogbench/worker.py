"""A process that makes episodes of a data set: `python -m envs.ogbench.worker`, for `envs.ogbench.generation`.

Standard input: one line of JSON, a `Job`. Standard output: a line for each episode that is on the disk, its split and
number; or `error` and a sentence. It leaves by itself when its parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from diffrl.support.errors import UserError, first_line
from envs.ogbench import names, oracles, parts, worlds


@dataclass(frozen=True)
class Job:
    """What a process is to make."""

    dataset: str
    rows: int
    """Of an episode."""
    folder: str
    """Of the parts."""
    parent: int
    """The process that must be alive."""
    episodes: list[list[int]]
    """(split, number, seed) of each."""

    def to_json(self) -> str:
        """The line of standard input."""
        return json.dumps(asdict(self))


def work(job: Job) -> None:
    """Make the episodes, one after the other, as long as the parent lives."""
    name = names.get(job.dataset)
    env = worlds.make_collector(name.world, job.rows)
    for split, number, seed in job.episodes:
        if os.getppid() != job.parent:
            return
        episode = oracles.collect(env, name, seed, job.rows)
        parts.write(Path(job.folder), split, number, episode)
        print(split, number, flush=True)


def main() -> int:
    """Do the job on standard input; give the exit code."""
    try:
        work(Job(**json.loads(sys.stdin.readline())))
    except UserError as error:
        print(f"error {error}", flush=True)
        return 1
    except BrokenPipeError:  # the parent is gone
        return 1
    except OSError as error:
        print(f"error An episode cannot be written: {error.strerror or first_line(error)}.", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
