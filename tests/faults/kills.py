"""Chains of kill -9: a command is killed at random moments, goes on as its user would, and ends equal to an uncut one.

    python -m tests.faults.kills WORK RESULTS.jsonl KILLS [NAME ...]

A quarter of the kills comes at a moment of time, the others at an operation on files (an open, a renaming, a removal),
where they do most harm; all are drawn from fixed seeds, and the latter are the same on every machine.
"""

import json
import shutil
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import unchanged_digests

from tests.faults import forked, sound

IN_A_ROW = 5
"""Kills of one chain, at most; then it is left to end."""
_SECONDS = 120.0
_DONE = ("steps already", "steps are done", "what wrote it is finished")
"""What a command says where nothing is left to do: the kill came after the last write."""


@dataclass(frozen=True)
class Chain:
    """A command that is killed."""

    name: str
    begin: str
    """What stands after `diffrl`."""
    resume: str | None
    """How it goes on; None: by the same words."""
    out: str
    """The run's folder, or the file that is written."""
    needs: tuple[str, ...] = ()
    """What of the sound inputs it starts from."""


CHAINS: dict[str, Chain] = {
    chain.name: chain
    for chain in (
        Chain(
            "train",
            sound.RUNS["train"].replace("--steps 4 --eval-every 2", "--steps 60 --eval-every 20"),
            "resume train",
            "train",
            (sound.WIDE,),
        ),
        Chain(
            "online",
            "online train --steps 600 --warm-up 100 --eval-every 200 --eval-episodes 1 --log-every 50 --out online",
            "resume online",
            "online",
            (sound.WIDE, "train"),
        ),
        Chain(
            "nft",
            sound.RUNS["nft"].replace("--steps 20 --eval-every 10", "--steps 60 --eval-every 20"),
            "resume nft",
            "nft",
            (sound.WIDE, "diffusion"),
        ),
        Chain(
            "distil",
            sound.RUNS["distil"].replace("--steps 4 --eval-every 2", "--steps 60 --eval-every 20"),
            "resume distil",
            "distil",
            (sound.WIDE, "diffusion"),
        ),
        Chain(
            "augment",
            sound.AUGMENT.replace("--steps 4", "--steps 300").replace("--no-report ", "") + " --samples 3000",
            None,
            "new.hdf5",
            (sound.WIDE,),
        ),
        Chain("generate", "data generate maze2d-umaze-v1 --rows 20000 --output maze.hdf5", None, "maze.hdf5"),
        Chain(
            "finetune",
            sound.RUNS["images"].replace("--queries 8", "--queries 16"),
            "resume images",
            "images",
        ),
    )
}
"""The commands by name."""


@dataclass(frozen=True)
class Ended:
    """How a chain of kills ended."""

    name: str
    number: int
    kills: int
    became: str
    """"equal", "unequal", or "stuck", where neither resuming nor beginning anew worked."""
    said: str
    left: tuple[str, ...]
    """Temporary files and folders that are left over."""


class Killer:
    """Kills chains in a working folder, in which the sound inputs lie."""

    def __init__(self, work: Path, names: tuple[str, ...] = tuple(CHAINS)) -> None:
        self._folder = work.resolve() / "chain"
        sound.preload()
        kinds = {"train", "images", *(need for name in names for need in CHAINS[name].needs)} & set(sound.RUNS)
        self._sound = sound.build(work.resolve() / "sound", tuple(kind for kind in sound.RUNS if kind in kinds))
        self._uncut: dict[str, tuple[Any, int, float]] = {}
        for name in names:
            chain = CHAINS[name]
            self._place(chain)
            whole = forked.run(chain.begin.split(), self._folder, seconds=_SECONDS)
            if whole.ended != "0":
                raise RuntimeError(f"diffrl {chain.begin}: {whole.ended}\n{whole.output[-2000:]}")
            self._uncut[name] = (self._digests(chain), whole.events, whole.seconds)

    def chain(self, name: str, number: int, most: int = IN_A_ROW) -> Ended:
        """Kill a command `most` times at most, and let it end."""
        chain, rng = CHAINS[name], np.random.default_rng([zlib.crc32(name.encode()), number])
        uncut, events, seconds = self._uncut[name]
        self._place(chain)
        kills = 0
        while True:
            last = kills == most
            moment: dict[str, Any] = {}
            if not last and rng.random() < 0.75:
                moment = {"kill_at": int(rng.integers(1, events + 1))}
            elif not last:
                moment = {"kill_after": float(rng.uniform(0.02, seconds / 2))}
            outcome = self._go_on(chain, moment)
            if outcome.ended == "0" or _done(outcome):
                became = "equal" if self._digests(chain) == uncut else "unequal"
                break
            if outcome.ended != "killed":
                became = "stuck"
                break
            kills += 1
        left = tuple(sorted(path.name for path in self._folder.rglob(".*")))
        said = "" if became == "equal" else f"{outcome.where} {outcome.output[-600:]}"
        return Ended(name, number, kills, became, said, left)

    def _go_on(self, chain: Chain, moment: dict[str, Any]) -> forked.Outcome:
        """As a user does: resume where there is a run's folder; where that is refused, give the first words again."""
        limit = {"seconds": _SECONDS, "memory": 4 * forked.MEMORY}
        if chain.resume is not None and (self._folder / chain.out).exists():
            outcome = forked.run(chain.resume.split(), self._folder, **limit, **moment)  # type: ignore[arg-type]
            if outcome.ended in ("0", "killed") or _done(outcome):
                return outcome
        return forked.run(chain.begin.split(), self._folder, **limit, **moment)  # type: ignore[arg-type]

    def _place(self, chain: Chain) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for name in chain.needs:
            source = self._sound / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, self._folder / name)

    def _digests(self, chain: Chain) -> Any:
        path = self._folder / chain.out
        return unchanged_digests.of_folder(path) if path.is_dir() else unchanged_digests.of_file(path)


def _done(outcome: forked.Outcome) -> bool:
    return any(words in outcome.output for words in _DONE)


def main(work: str, to: str, kills: str, *names: str) -> None:
    """Chains of each command in turn, until there are so many kills."""
    killer, done, number = Killer(Path(work), names or tuple(CHAINS)), 0, 0
    with Path(to).open("w") as file:
        while done < int(kills):
            for name in names or CHAINS:
                ended = killer.chain(name, number)
                done += ended.kills
                file.write(json.dumps(asdict(ended)) + "\n")
                file.flush()
            number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
