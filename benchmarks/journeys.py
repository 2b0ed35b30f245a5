"""How far a reader walks to follow one run: the files of ours that it touches, and how often it crosses between them.

    python benchmarks/journeys.py                 the three journeys: files and crossings, beside their goals
    python benchmarks/journeys.py --check         the same; exits with 1 where a goal is missed
    python benchmarks/journeys.py --list train    every crossing of a journey in the order of its first visit: a story
    python benchmarks/journeys.py --json FILE     the same, for programs

The journeys, each recorded with `sys.setprofile` in a process of its own, on one thread:

- `train`: Diffusion-QL, 2 steps on a small HDF5 file of maze2d, an evaluation and a checkpoint after each;
- `ddpo`: one round of DDPO (8 images, 2 denoising steps, JPEG reward) on the built-in image model;
- `step`: the last training step within `train`, from drawing the batch to the moving averages.

Both runs are started by `diffrl.cli.main`. A journey begins where the verb has read its words and hands over: at the
call out of `cli.py` or `commands/` that has the most calls below it. The line `whole command` counts from `main` on.

What is counted. A *file* is one of `diffrl/`, `agents/`, `envs/` in which a function ran. A *crossing* is an ordered
pair of files, (calling, called), that occurs at least once; the calling file is that of the nearest function of ours
further up the stack, so a call back through torch, rich or `contextlib` is a crossing too. Not counted: what runs while
a module of ours is imported (class bodies and decorators with it), generated code (a dataclass's `__init__`; but the
`__post_init__` that it calls counts), and calls of lambdas, comprehensions and generator expressions, which are read
where they stand, in the function around them. What these call counts, and so does a named function in a function.

Beside the figures of shared/house.md, which set the goals, this gives at commit 7a5e561 (files, crossings):

    train 41, 91 (house.md: 41, 87)     ddpo 45, 93 (44, 91)     step 14, 19 (14, 19)

Other definitions come less near on the whole. Train, ddpo, step, in crossings: lambdas counted too, 93, 95, 20; only
direct calls, 80, 81, 17; pairs without direction, 86, 90, 18. From `main` on, reading the command line included, the
runs touch 43 and 47 files. The raw changes of file, in the order in which functions first run, are 160 and 141.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

from asked import asked
from rich.console import Console
from tables import print_lines

import diffrl
from diffrl.cli import main as command

ROOT = Path(diffrl.__file__).parents[1]
OURS = ("diffrl", "agents", "envs")
"""The folders below ROOT whose files count."""
COMMAND_LINE = ("diffrl/cli.py", "diffrl/commands/")
"""What reads the command line: a journey begins where it hands over."""
INNER = "advance"
"""The trainer's function that makes steps: a step is the largest call within it."""
EXPRESSIONS = ("<lambda>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
"""Not counted as called."""

GOALS = {"train": (30, 55), "ddpo": (32, 60)}
"""At most so many files and crossings."""
REACHED = {"train": (47, 106), "ddpo": (38, 76)}
"""What there was when last somebody walked them: tests/benchmarks/test_journeys.py lets them grow by two at most."""
TASK = "maze2d-umaze-v1"
ROWS = "2000"
ONE_PROCESS = ("--workers", "1", "--eval-workers", "0", "--no-compile")
SHORT = ("--steps", "2", "--eval-every", "1", "--eval-episodes", "1", "--log-every", "1")
TRAIN = ("train", "--agent", "diffusion_ql", *SHORT, *ONE_PROCESS)
SMALL = ("--queries", "8", "--batch", "8", "--updates", "1", "--steps", "2", "--eval-samples", "2")
DDPO = ("finetune", "--model", "tiny-digits", *SMALL)


@dataclass(frozen=True)
class Journeys:
    """Count the files and the crossings of a training run, a DDPO run and a training step."""

    list: Literal["train", "ddpo", "step"] | None = None
    """Print this journey's crossings in the order of their first visits."""
    check: bool = False
    """Exit with 1, naming it, where a goal is missed."""
    json: Path | None = None
    """Where figures and crossings are written."""


@dataclass
class Call:
    """A call of a function of ours, and the calls within it: the next `inside` of the record."""

    caller: tuple[str, str] | None
    """File and name of the nearest function of ours that it was called from; None at the bottom."""
    file: str
    name: str
    inside: int = 0


@dataclass
class Journey:
    """The calls of a run in their order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The files touched, in the order of their first visits."""
        return list(dict.fromkeys(call.file for call in self.calls))

    @property
    def crossings(self) -> dict[tuple[str, str], Call]:
        """The first call of each (calling file, called file), in the order of first visits.

        Where the journey begins is no crossing: its first call has no caller within it.
        """
        first: dict[tuple[str, str], Call] = {}
        for call in self.calls[1:]:
            if call.caller is not None and call.caller[0] != call.file:
                first.setdefault((call.caller[0], call.file), call)
        return first

    def below(self, position: int) -> "Journey":
        """The call at that position with all that is within it."""
        return Journey(self.calls[position : position + 1 + self.calls[position].inside])


class Recorder:
    """Records the calls of functions of ours while its block runs.

    root: the folder that holds the folders `ours`.
    """

    def __init__(self, root: Path = ROOT, ours: Sequence[str] = OURS) -> None:
        self.journey = Journey()
        self._root = str(root) + os.sep
        self._ours = tuple(f"{self._root}{name}{os.sep}" for name in ours)
        self._files: dict[CodeType, str] = {}
        self._stack: list[tuple[FrameType, Call | None, int]] = []
        self._importing = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread calls in the block."""
        sys.setprofile(self._notice)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _file(self, code: CodeType) -> str:
        """The path of a code's file below the root; "" for code that is not ours."""
        if code not in self._files:
            name = code.co_filename
            self._files[code] = Path(name[len(self._root) :]).as_posix() if name.startswith(self._ours) else ""
        return self._files[code]

    def _notice(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            file = self._file(frame.f_code)
            if file:
                self._enter(frame, file, frame.f_code.co_name)
        elif event == "return" and self._stack and self._stack[-1][0] is frame:
            self._leave()

    def _enter(self, frame: FrameType, file: str, name: str) -> None:
        self._importing += name == "<module>"
        call = None
        if not self._importing and name not in EXPRESSIONS:
            above = self._stack[-1][0].f_code if self._stack else None
            caller = None if above is None else (self._file(above), above.co_name)
            call = Call(caller, file, name)
            self.journey.calls.append(call)
        self._stack.append((frame, call, len(self.journey.calls)))

    def _leave(self) -> None:
        frame, call, begun = self._stack.pop()
        self._importing -= frame.f_code.co_name == "<module>"
        if call is not None:
            call.inside = len(self.journey.calls) - begun


def handed_over(whole: Journey) -> Journey:
    """What a verb starts: the largest call out of the command line's files."""

    def out_of_it(call: Call) -> bool:
        return call.caller is not None and call.caller[0].startswith(COMMAND_LINE)

    starts = [i for i, c in enumerate(whole.calls) if out_of_it(c) and not c.file.startswith(COMMAND_LINE)]
    if not starts:
        raise RuntimeError(
            f"Nothing was called from {' or '.join(COMMAND_LINE)}: COMMAND_LINE must say where verbs are."
        )
    return whole.below(max(starts, key=lambda i: whole.calls[i].inside))


def last_step(whole: Journey) -> Journey:
    """The last training step: the largest call within the trainer's last `advance`."""
    advances = [i for i, c in enumerate(whole.calls) if c.name == INNER and c.inside]
    if not advances:
        raise RuntimeError(f"No function {INNER!r} was called: what the trainer's is called now, INNER must say.")
    largest = max(whole.calls[i].inside for i in advances)
    last = max(i for i in advances if whole.calls[i].inside > largest / 2)  # a simulator's of this name are small
    inside = range(last + 1, last + 1 + whole.calls[last].inside)
    return whole.below(max(inside, key=lambda i: whole.calls[i].inside))


# --- The runs, each in a process of its own -----------------------------------------------------------------------


def run(words: Sequence[str], log: Path, recorder: Recorder | None = None) -> Journey:
    """Run a command, what it prints going to `log`; give what was recorded. Raises RuntimeError where it fails."""
    import torch

    torch.set_num_threads(1)
    with log.open("w") as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.nullcontext() if recorder is None else recorder.recording():
                code = command(words)
        finally:
            for stream, descriptor, number in zip((sys.stdout, sys.stderr), kept, (1, 2), strict=True):
                stream.flush()
                os.dup2(descriptor, number)
                os.close(descriptor)
    if code:
        raise RuntimeError(f"`diffrl {' '.join(words)}` ended with {code}:\n{log.read_text()[-2000:]}")
    return Journey() if recorder is None else recorder.journey


def recorded(words: Sequence[str], log: Path) -> Journey:
    """Run a command and give its journey."""
    return run(words, log, Recorder())


def journeys(folder: Path) -> dict[str, Journey]:
    """All journeys by name; the runs' files go to `folder`."""
    os.environ["DIFFRL_DATA"] = str(folder / "data")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as alone:

        def do(what: Any, name: str, *words: str) -> Any:
            return alone.submit(what, words, folder / f"{name}.log").result()

        do(run, "data", "data", "generate", TASK, "--rows", ROWS)
        (data,) = (folder / "data").rglob("*.hdf5")
        train = do(recorded, "train", *TRAIN, "--dataset", str(data), "--out", str(folder / "train"))
        # The first run trains the built-in model and its classifier where the cache lacks them.
        do(run, "first", *DDPO, "--out", str(folder / "first"))
        ddpo = do(recorded, "ddpo", *DDPO, "--out", str(folder / "ddpo"))
    return {
        "train": handed_over(train),
        "train, whole command": train,
        "ddpo": handed_over(ddpo),
        "ddpo, whole command": ddpo,
        "step": last_step(train),
    }


# --- Output -------------------------------------------------------------------------------------------------------


def print_figures(found: dict[str, Journey], console: Console) -> None:
    """Files and crossings beside their goals."""
    lines = [["journey", "files", "goal", "crossings", "goal"]]
    for name, journey in found.items():
        files, crossings = GOALS.get(name, ("", ""))
        lines.append([name, str(len(journey.files)), str(files), str(len(journey.crossings)), str(crossings)])
    print_lines(lines, "Files touched, crossings between files", console, left=1)


def print_story(journey: Journey, console: Console) -> None:
    """Each crossing once, where it first happens."""
    lines = [["", "from", "function", "to", "function"]]
    begin = journey.calls[0]
    lines.append(["", "", "", begin.file, begin.name])
    for i, call in enumerate(journey.crossings.values(), start=1):
        assert call.caller is not None
        lines.append([str(i), *call.caller, call.file, call.name])
    print_lines(lines, "Crossings in the order of their first visits", console, left=5)


def missed(found: Mapping[str, Journey], limits: Mapping[str, tuple[int, int]] = GOALS) -> list[str]:
    """A sentence for each goal, of `limits`, that is missed."""
    sentences = []
    for name, goals in limits.items():
        counts = len(found[name].files), len(found[name].crossings)
        for what, count, goal in zip(("files", "crossings"), counts, goals, strict=True):
            if count > goal:
                sentences.append(f"{name}: {count} {what}; the goal is at most {goal}")
    return sentences


def as_json(found: dict[str, Journey]) -> str:
    """Figures, files and crossings."""
    content = {
        name: {
            "files": journey.files,
            "crossings": [asdict(call) for call in journey.crossings.values()],
            "n_files": len(journey.files),
            "n_crossings": len(journey.crossings),
            "goals": GOALS.get(name),
        }
        for name, journey in found.items()
    }
    return json.dumps(content, indent=1) + "\n"


def main(options: Journeys) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        found = journeys(Path(folder))
    if options.list is not None:
        print_story(found[options.list], console)
    print_figures(found, console)
    if options.json is not None:
        options.json.write_text(as_json(found))
    over = missed(found)
    for sentence in over if options.check else ():
        print(f"journeys: missed: {sentence}", file=sys.stderr)
    return int(options.check and bool(over))


if __name__ == "__main__":
    sys.exit(main(asked(Journeys, description=__doc__)))
