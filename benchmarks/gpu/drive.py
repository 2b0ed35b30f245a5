"""Run the stages of `stages.py` one after the other, each within its time, all within the budget.

Called by run.sh, which see. What there is to show is written every few seconds: a call that is cut loses little, and a
stage that is killed at its box keeps what it has. A stage whose result is whole for the code at hand is left out.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import parts
from kinds import ROOT, Clock, LongRun, Place, Stage, Words
from stages import STAGES, greedy, preparation

GRACE = 25.0
"""Seconds that a command has to save itself after SIGTERM."""
RESERVE = 15.0
"""Seconds kept for packing, at the end."""
EVERY = 15.0
"""Seconds between looks at what a stage has so far."""
FILES, BYTES = 8, 64 * 2**20
"""What comes back from the machine at most."""
LOG = 200_000
"""Bytes of each log's end that come back."""
VERSIONS = ("torch", "triton", "jax", "numpy", "gymnasium", "mujoco", "diffusers", "peft", "transformers", "torchao")


class Stopped(Exception):
    """The driver itself has been told to stop."""


def machine() -> dict[str, str]:
    """The card, its driver, the processor and the versions."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = answer.stdout.splitlines() if answer.returncode == 0 else []
        if lines:
            card, memory, driver = (word.strip() for word in lines[0].split(","))
            return {"card": card, "memory": memory, "driver": driver} | _around()
    return {"card": "none"} | _around()


def _around() -> dict[str, str]:
    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Driver:
    """A call: its budget, its folders, the results so far."""

    def __init__(self, out: Path, work: Path, clock: Clock, rehearse: bool) -> None:
        self.out, self.work, self.clock, self.rehearse = out, work, clock, rehearse
        for folder in (out, work / "results", work / "logs", work / "runs", work / "prepared"):
            folder.mkdir(parents=True, exist_ok=True)
        self.machine = machine()
        self.stopped = False
        folders = {
            "DIFFRL_DATA": "data",
            "DIFFRL_CACHE": "cache",
            "TORCHINDUCTOR_CACHE_DIR": "compiled",
            "TRITON_CACHE_DIR": "triton",
            "MPLCONFIGDIR": "matplotlib",
        }
        self.environment = os.environ | {name: str(work / folder) for name, folder in folders.items()}
        self.environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
        self._preparing: dict[str, subprocess.Popen[bytes]] = {}

    # --- What there is -------------------------------------------------------------------------------------------

    def results(self) -> dict[str, dict[str, Any]]:
        """The results of calls on this machine, by stage."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.work / "results").glob("*.json"))}

    def is_whole(self, stage: Stage) -> bool:
        """Whether a stage's whole result for this code is there: from this machine, or in the repository."""
        found = [self.results().get(stage.name)]
        path = ROOT / "benchmarks" / "results" / "gpu" / f"{stage.name}.json"
        if not self.rehearse and path.exists():
            found.append(json.loads(path.read_text()))
        digest = stage.digest(self.rehearse)
        return any(result and result["state"] == "whole" and result["digest"] == digest for result in found)

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write a stage's result, and everything so far to where it comes back from."""
        path = self.work / "results" / f"{name}.json"
        path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".new").replace(path)
        self.publish()

    def publish(self) -> None:
        """results.json, and results.tar.gz with logs and scores beside it."""
        everything = self.results()
        (self.out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
        temporary = self.out / ".results.tar.gz"
        with tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
            for name, result in everything.items():
                _add(archive, f"results/{name}.json", (json.dumps(result, indent=1) + "\n").encode())
            for path in sorted((self.work / "logs").glob("*.log")):
                _add(archive, f"logs/{path.name}", path.read_bytes()[-LOG:])
            for path in sorted((self.work / "runs").glob("*/scores.json")):
                _add(archive, f"scores/{path.parent.name}.json", path.read_bytes())
        temporary.replace(self.out / "results.tar.gz")

    # --- Preparations --------------------------------------------------------------------------------------------

    def prepare(self, stages: Sequence[Stage]) -> None:
        """Start making what the stages need and what is not there; of what takes most cores, the first alone."""
        for name in dict.fromkeys(need for stage in stages for need in stage.needs):
            if not (greedy(name) and any(map(greedy, self._preparing))):
                self._prepare(name)

    def _prepare(self, name: str) -> None:
        """Start making what is not there and not being made."""
        words = preparation(name, Place(name, "", self.work, self.rehearse))
        if words is not None and name not in self._preparing and not (self.work / "prepared" / name).exists():
            environment = self.environment | {"OMP_NUM_THREADS": "1"}
            self._preparing[name] = self._start(words, self.work / "logs" / f"make-{name}.log", environment)

    def await_needs(self, stage: Stage, clock: Clock) -> str | None:
        """Wait for what the stage needs; what is wrong, or None."""
        for name in stage.needs:
            self._prepare(name)
            process = self._preparing.get(name)
            if process is None:
                continue
            while process.poll() is None and clock.left > 0 and not self.stopped:
                time.sleep(0.1)
            if process.poll() is None:
                return f"{name} was not ready in time"
            if process.returncode:
                return f"making {name} failed: {_tail(self.work / 'logs' / f'make-{name}.log')}"
            (self.work / "prepared" / name).touch()
        return None

    def close(self) -> None:
        """End the preparations; note those that are done."""
        for name, process in self._preparing.items():
            if process.poll() == 0:
                (self.work / "prepared" / name).touch()
            _end(process)

    # --- Stages --------------------------------------------------------------------------------------------------

    def run(self, stage: Stage) -> dict[str, Any]:
        """Run a stage within its box; keep its result as it goes, and give it."""
        digest = stage.digest(self.rehearse)
        place = Place(stage.name, digest, self.work, self.rehearse)
        box = min(stage.toy_box if self.rehearse else stage.box, self.clock.left - GRACE - RESERVE)
        clock = Clock(box)
        log = self.work / "logs" / f"{stage.name}.log"
        log.write_text("")
        result: dict[str, Any] = {
            "stage": stage.name,
            "title": stage.title,
            "state": "cut",
            "digest": digest,
            "rehearsal": self.rehearse,
            "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "machine": self.machine,
            "commands": [shlex.join(["python", *words[1:]]) for words in stage.kind.words(place)],
            "box": round(box, 1),
        }

        def look() -> None:
            with contextlib.suppress(OSError, ValueError):  # a file that is being written
                result["result"] = stage.kind.collect(place, box - clock.left, log)
            self.keep(stage.name, result)

        wrong = self.await_needs(stage, clock)
        if wrong is None:
            state = "whole"
            for words in stage.kind.begin(place):
                state, wrong = self._command(words, log, clock, look)
                if state != "whole":
                    break
            result["state"] = state
        elif "failed" in wrong:
            result["state"] = "failed"
        if wrong is not None:
            result["wrong"] = wrong
        look()
        return result

    def _command(self, words: Words, log: Path, clock: Clock, look: Any) -> tuple[str, str | None]:
        """Run a command to its end or its time's; the state, and what went wrong."""
        process, seen = self._start(words, log, self.environment), time.monotonic()
        told = False
        try:
            while process.poll() is None:
                if not told and (clock.left <= 0 or self.stopped):
                    process.terminate()
                    told, until = True, time.monotonic() + GRACE
                if told and time.monotonic() > until:
                    break
                if time.monotonic() - seen > EVERY:
                    look()
                    seen = time.monotonic()
                time.sleep(0.1)
        finally:
            _end(process)
        if process.returncode == 0:
            return "whole", None
        if told:
            return "cut", None
        return "failed", f"exit code {process.returncode}: {_tail(log)}"

    def _start(self, words: Words, log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        with log.open("ab") as file:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def pack(self, stages: Sequence[Stage]) -> Iterator[str]:
        """Write the newest checkpoints of unfinished long runs to where they come back from, while they fit."""
        for path in self.out.glob("checkpoints-*.tar.*"):
            path.unlink()
        files, size = 2, sum(path.stat().st_size for path in self.out.glob("results.*"))
        size += 2**16  # what packing adds to the results
        for stage in stages:
            place = Place(stage.name, stage.digest(self.rehearse), self.work, self.rehearse)
            result = self.results().get(stage.name)
            if not isinstance(stage.kind, LongRun) or result is None or result["digest"] != place.digest:
                continue
            step = parts.newest_step(place.run)
            if result["state"] == "whole" or step is None:
                continue
            needed = parts.size_of(place.run)
            n = -(-needed // parts.PART)
            fits = files + n <= FILES and size + needed <= BYTES
            if fits:
                parts.pack(place.run, self.out)
                files, size = files + n, size + needed
            where = f"in {n} files" if fits else "not packed: more than comes back from the machine"
            result["checkpoint"] = f"step {step:,}, {needed / 2**20:.1f} MiB, {where}"
            self.keep(stage.name, result)
            yield f"{stage.name}: checkpoint of {result['checkpoint']}"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a command and of the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=570, help="seconds for the whole call (a call has 600)")
    parser.add_argument("--only", default="", help="stages, separated by commas, in this order")
    parser.add_argument("--again", action="store_true", help="also stages whose result is there")
    parser.add_argument("--restore", type=Path, help="a folder with checkpoints of an earlier call")
    parser.add_argument("--rehearse", action="store_true", help="every stage at toy size, on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--work", type=Path, required=True, help="what stays on the machine")
    parser.add_argument("--spent", type=float, default=0, help="seconds of the budget that are gone")
    given = parser.parse_args()
    names = [stage.name for stage in STAGES]
    unknown = [name for name in given.only.split(",") if name and name not in names]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; known: {', '.join(names)}")
    if given.restore is not None and not any(given.restore.glob("checkpoints-*.tar.00")):
        parser.error(f"--restore {given.restore} holds no checkpoints-*.tar.00")
    return given


def main() -> int:
    given = arguments()
    work = given.work.resolve() / ("rehearsal" if given.rehearse else "")
    driver = Driver(given.out.resolve(), work, Clock(given.budget - given.spent), given.rehearse)
    if driver.machine["card"] == "none" and not given.rehearse:
        print("run.sh: nvidia-smi shows no GPU here. --rehearse runs every stage at toy size on the CPU.")
        return 2

    def stop(*_: Any) -> None:
        driver.stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if given.restore is not None:
        for name in parts.restore(given.restore, driver.work / "runs"):
            print(f"restored: {name}")
    chosen = [name for name in given.only.split(",") if name]
    stages = sorted(
        (s for s in STAGES if not chosen or s.name in chosen), key=lambda s: (chosen or [s.name]).index(s.name)
    )
    due = [stage for stage in stages if given.again or not driver.is_whole(stage)]
    print(f"{driver.machine['card']}; {len(due)} of {len(stages)} stages are due, {driver.clock.left:.0f} s.")
    driver.prepare(due)
    failed = False
    try:
        for stage in due:
            if driver.stopped or driver.clock.left < GRACE + 2 * RESERVE:
                print(f"{stage.name}: no time is left for it")
                continue
            began = time.monotonic()
            result = driver.run(stage)
            failed |= result["state"] == "failed"
            print(f"{stage.name}: {result['state']}, {time.monotonic() - began:.0f} s")
            if "wrong" in result:
                print("  " + result["wrong"].replace("\n", "\n  "))
    finally:
        driver.close()
        driver.publish()
        for line in driver.pack(STAGES):  # those of earlier calls on this machine too: all that came back is replaced
            print(line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
