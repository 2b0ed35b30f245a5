"""The campaign: cases of every kind, what became of each, and the counts.

    python -m tests.faults.campaign WORK RESULTS.jsonl NUMBER/OF SCALE [KIND ...]

is one of OF processes, started by `benchmarks/faults.py`: it makes its part of the cases with the packages that
PYTHONPATH finds first, and writes a line for each. SCALE is the number of cases, of 5,000.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults import forked, sound
from tests.faults.kinds import KINDS


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    kind: str
    number: int
    damage: str
    command: str
    became: str
    """One of `forked.CLASSES`."""
    silent: bool
    """Whether what was loaded differs, in a file with our checksum, and nothing told of it."""
    where: str
    output: str
    seconds: float
    grown: int


class Campaign:
    """Makes cases in a working folder, in which the sound inputs lie."""

    def __init__(self, work: Path, kinds: Iterable[str] = KINDS) -> None:
        self._kinds = {name: KINDS[name] for name in kinds}
        self.work = work.resolve()
        sound.preload("run, images" in self._kinds)
        runs = {name.removeprefix("run, ") for name in self._kinds if name.startswith("run, ")}
        if "online" in runs or "configuration" in self._kinds:
            runs.add("train")
        if {"dppo", "dpo", "nft", "distil"} & runs or "labels" in self._kinds:
            runs.add("diffusion")
        minari = any(name.startswith("Minari") for name in self._kinds)
        self.sound = sound.build(self.work / "sound", tuple(kind for kind in sound.RUNS if kind in runs), minari)
        self.outside = sound.write_outside(self.work / "outside")
        self._watch = forked.Watch(self.outside)
        self._references: dict[tuple[str, str], Any] = {}

    def make(self, name: str, number: int) -> Result:
        """Make one case."""
        kind = self._kinds[name]
        folder = self.work / "case"
        case = self._placed(name, number, folder)
        if (name, case.words) not in self._references:
            whole = forked.run(case.words.split(), folder, look=case.look, seconds=60)
            if whole.ended != "0":
                raise RuntimeError(f"undamaged, diffrl {case.words}: {whole.ended}\n{whole.output}\n{whole.where}")
            self._references[name, case.words] = whole.loaded
            case = self._placed(name, number, folder)
        try:
            damage = kind.damage(folder, kind.rng(number, 1), self.outside, self.sound)
        except Exception as error:
            error.add_note(f"in damaging {name}:{number}")
            raise
        outcome = forked.run(case.words.split(), folder, look=case.look, watch=self._watch)
        became = outcome.classify(self._references[name, case.words])
        return Result(
            name,
            number,
            damage,
            case.words,
            became,
            case.sealed and became == forked.CHANGED and not outcome.told,
            outcome.where,
            outcome.output[-2000:],
            round(outcome.seconds, 3),
            outcome.grown,
        )

    def _placed(self, name: str, number: int, folder: Path) -> Any:
        """An undamaged copy for a case in an empty folder; its command."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return self._kinds[name].place(self.sound, folder, self._kinds[name].rng(number, 0))


def numbers(scale: int, part: int, of: int, kinds: Iterable[str] = KINDS) -> Iterator[tuple[str, int]]:
    """The cases of one of several processes: kinds in turn, so that an early stop has some of each."""
    counts = {name: max(round(KINDS[name].share * scale / 5_000), 1) for name in kinds}
    every = [(number / counts[name], name, number) for name in counts for number in range(counts[name])]
    for i, (_, name, number) in enumerate(sorted(every)):
        if i % of == part:
            yield name, number


def main(work: str, to: str, part: str, scale: str, *kinds: str) -> None:
    """Make one process's part of the cases."""
    number, of = map(int, part.split("/"))
    chosen = kinds or tuple(KINDS)
    campaign = Campaign(Path(work), chosen)
    with Path(to).open("w") as file:
        for name, case in numbers(int(scale), number, of, chosen):
            file.write(json.dumps(asdict(campaign.make(name, case))) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
