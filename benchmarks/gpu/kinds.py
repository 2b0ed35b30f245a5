"""The kinds of stages of a GPU run: the commands of each, and what it has to show so far. Standard library only."""

import json
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
Words = list[str]
"""A command."""


@dataclass(frozen=True)
class Place:
    """Where a stage works, and at what size."""

    name: str
    """The stage's."""
    digest: str
    """Of its code: work of other code is not gone on with."""
    work: Path
    """What stays on the machine: for a later call."""
    rehearse: bool = False
    """At toy size, on the CPU."""

    @property
    def folder(self) -> Path:
        """The stage's own."""
        return self.work / "stages" / f"{self.name}-{self.digest[:8]}"

    @property
    def run(self) -> Path:
        """The folder of a long run."""
        return self.work / "runs" / f"{self.name}-{self.digest[:8]}"


class Kind(Protocol):
    """What a stage does."""

    def words(self, place: Place) -> list[Words]:
        """The commands as they begin, none of which has been run: they belong to the digest, without their place."""

    def begin(self, place: Place) -> list[Words]:
        """Make ready; the commands to run now, one after the other."""

    def collect(self, place: Place, seconds: float, log: Path) -> dict[str, Any]:
        """What there is after so many seconds, as JSON; asked now and then, at any moment."""


# --- Tests ----------------------------------------------------------------------------------------------------------

OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (\S.*?)\s*$", re.MULTILINE)
"""A line of `pytest -v -n N`."""


@dataclass(frozen=True)
class Tests:
    """A selection of the test suite, in worker processes."""

    arguments: str
    workers: int

    def words(self, place: Place) -> list[Words]:
        """One command. pytest-benchmark, where it is installed, warns of the workers: it is left out."""
        n = str(2 if place.rehearse else self.workers)
        plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
        return [[sys.executable, "-m", "pytest", "-v", "-n", n, *plugins, *shlex.split(self.arguments)]]

    begin = words

    def collect(self, place: Place, seconds: float, log: Path) -> dict[str, Any]:
        """Numbers of outcomes, and the names of what failed."""
        found = OUTCOME.findall(log.read_text(errors="replace"))
        count = {outcome.lower(): sum(o == outcome for o, _ in found) for outcome in ("PASSED", "FAILED", "SKIPPED")}
        bad = [name for outcome, name in found if outcome in ("FAILED", "ERROR")]
        return count | {"failures": bad, "seconds": round(seconds, 1)}


# --- Scripts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A script of benchmarks/ that writes JSON, and Markdown perhaps, and goes on where it was cut if it can.

    In the words, {folder} is the stage's own, {work} what stays on the machine.
    """

    script: str
    arguments: str
    toy: str
    """The arguments of a rehearsal."""
    result: str
    """The JSON that it writes, below {folder}."""
    page: str | None = None
    """Markdown that it writes, likewise."""

    def words(self, place: Place) -> list[Words]:
        """One command."""
        arguments = (self.toy if place.rehearse else self.arguments).format(folder=place.folder, work=place.work)
        return [[sys.executable, f"benchmarks/{self.script}", *shlex.split(arguments)]]

    def begin(self, place: Place) -> list[Words]:
        """The command, in a folder that may hold something already."""
        place.folder.mkdir(parents=True, exist_ok=True)
        return self.words(place)

    def collect(self, place: Place, seconds: float, log: Path) -> dict[str, Any]:
        """What the script has written."""
        found: dict[str, Any] = {"seconds": round(seconds, 1)}
        path = place.folder / self.result
        if path.exists():
            found["content"] = json.loads(path.read_text())
        if self.page is not None and (place.folder / self.page).exists():
            found["page"] = (place.folder / self.page).read_text()
        return found


# --- Long runs ------------------------------------------------------------------------------------------------------

SESSIONS = ".sessions.json"
"""In a run's folder, and hidden: `diffrl train` takes no folder that holds other files than a run's."""


@dataclass(frozen=True)
class LongRun:
    """A training run of hours of one configuration, in as many sessions as it takes; stopped, it saves itself."""

    config: str
    toy: tuple[str, ...] = ()
    """More words for a rehearsal."""
    seeds: tuple[int, ...] = tuple(range(8))
    steps: int = 1_000_000
    toy_steps: int = 40
    published: str = ""
    """CORL's last score on D4RL's own file (arXiv 2210.07105): mean ± standard deviation over four seeds."""

    @property
    def dataset(self) -> str:
        """The configuration's: what stands behind the agent's name."""
        return self.config.split("/")[1]

    def target(self, place: Place) -> int:
        """The steps of the whole run."""
        return self.toy_steps if place.rehearse else self.steps

    def words(self, place: Place) -> list[Words]:
        """The command of the first session."""
        words = [sys.executable, "-m", "diffrl.cli", "train", self.config, "--steps", str(self.target(place))]
        if place.rehearse:
            words += ["--device", "cpu", "--seeds", "0", "1", "--rows", str(TOY_ROWS), *TOY_RUN, *self.toy]
        else:
            words += ["--device", "cuda", "--seeds", *map(str, self.seeds)]
        return [[*words, "--out", str(place.run)]]

    def begin(self, place: Place) -> list[Words]:
        """A new session of the run: its first, or one that goes on."""
        step = newest_step(place.run)
        if step is None:
            shutil.rmtree(place.run, ignore_errors=True)  # cut before there was anything to go on with
            place.run.mkdir(parents=True)
            words = self.words(place)[0]
        else:
            device = "cpu" if place.rehearse else "cuda"
            words = [sys.executable, "-m", "diffrl.cli", "resume", str(place.run), "--device", device]
        sessions = [*_sessions(place.run), {"from": step or 0, "to": step or 0, "seconds": 0.0, "seen": []}]
        _write(place.run / SESSIONS, sessions)
        scores = place.run / "scores.json"
        scored = [entry["step"] for entry in json.loads(scores.read_text())["evaluations"]] if scores.exists() else []
        return [] if self.target(place) in scored else [words]  # cut after the last step, its evaluation is due

    def collect(self, place: Place, seconds: float, log: Path) -> dict[str, Any]:
        """The steps reached, every evaluation's mean of each seed, and the sessions with their pace."""
        sessions = _sessions(place.run)
        step = newest_step(place.run) or 0
        if sessions:
            last = sessions[-1]
            last |= {"to": step, "seconds": round(seconds, 1)}
            if step > max([last["from"], *(seen for _, seen in last["seen"])]):
                written = (place.run / "checkpoints" / f"{step:09d}").stat().st_mtime
                last["seen"].append([round(written, 1), step])
            _write(place.run / SESSIONS, sessions)
        scores = place.run / "scores.json"
        evaluations = json.loads(scores.read_text())["evaluations"] if scores.exists() else []
        return {
            "config": self.config,
            "seeds": [0, 1] if place.rehearse else list(self.seeds),
            "target": self.target(place),
            "steps": step,
            "seconds": round(sum(session["seconds"] for session in sessions), 1),
            "steps_per_second": pace(sessions),
            "evaluations": [_means(entry) for entry in evaluations],
            "sessions": sessions,
        }


TOY_ROWS = 5_000
TOY_RUN = ("--eval-every", "20", "--eval-episodes", "1", "--agent.width", "16", "--agent.batch-size", "16")
TOY_RUN = (*TOY_RUN, "--no-compile", "--workers", "1")


def newest_step(run: Path) -> int | None:
    """The step of a run's newest checkpoint; a checkpoint of step 0 is none."""
    steps = [int(path.name) for path in (run / "checkpoints").glob("[0-9]*")]
    return max(steps, default=0) or None


def pace(sessions: list[dict[str, Any]]) -> float | None:
    """Steps a second between the first checkpoint seen in a session and the last, over all sessions.

    So evaluations and checkpoints are in it, imports and compiling are not.
    """
    steps = sum(s["seen"][-1][1] - s["seen"][0][1] for s in sessions if s["seen"])
    seconds = sum(s["seen"][-1][0] - s["seen"][0][0] for s in sessions if s["seen"])
    return round(steps / seconds, 2) if seconds > 0 else None


def _means(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An entry of scores.json without its episodes: a mean a seed."""
    rounded = {name: [round(v, 2) for v in evaluation[name]] for name in ("score", "mean_return") if name in evaluation}
    return {"step": evaluation["step"]} | rounded


def _sessions(run: Path) -> list[dict[str, Any]]:
    path = run / SESSIONS
    return json.loads(path.read_text()) if path.exists() else []


def _write(path: Path, content: Any) -> None:
    """Write a JSON file whole, or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


# --- Stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """An entry of the table: what is done, for how long at most, and the code that its result is of."""

    name: str
    title: str
    box: float
    """Seconds."""
    kind: Kind
    sources: tuple[str, ...]
    """Patterns of the files, from the repository's root, that decide the result."""
    needs: tuple[str, ...] = ()
    """What `stages.PREPARATIONS` makes beforehand, beside other stages."""
    toy_box: float = 360.0
    """Seconds, in a rehearsal."""

    def digest(self, rehearse: bool = False) -> str:
        """SHA-256 of its commands and of the sources' names and bytes."""
        words = self.kind.words(Place(self.name, "", Path("WORK"), rehearse))
        total = sha256(json.dumps([line[1:] for line in words]).encode())
        for path in sorted({path for pattern in self.sources for path in ROOT.glob(pattern)}):
            total.update(f"\n{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
        return total.hexdigest()


@dataclass
class Clock:
    """The time that is left of the whole call."""

    budget: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - (time.monotonic() - self.began)
