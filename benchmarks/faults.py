"""Damaged files, kill -9 and full disks: what becomes of commands, counted.

    python benchmarks/faults.py                        the campaign on this tree: 5,000 cases, 140 kills, 112 full disks
    python benchmarks/faults.py --before 480b12e       the same on another commit: the figures in brackets
    python benchmarks/faults.py --cases 200 --kills 10 --disks 10     a sample, which is printed and not recorded
    python benchmarks/faults.py --case "HDF5, links:12"               one case again: what was done, and what is said

`make campaign` makes the first. Under half an hour on two idle cores, as long again for another commit. What is made is
in `tests/faults/`; this starts it in processes, and writes `benchmarks/results/faults.json` and, from it, `faults.md`.
Exit code 1 where a goal is missed.

Every case is a command in a forked child, which may take 10 s and 1 GB. Cases are numbered within their kind, and all
random choices come from kind and number, so that both trees meet the same damages (to inputs that each wrote itself).
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import asked
from rich.console import Console
from tables import Lines, markdown, print_lines
from trees import ROOT, environment, git, machine, packages, processor

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path

FIGURES, PAGE = (ROOT / "benchmarks" / "results" / name for name in ("faults.json", "faults.md"))
CASES, KILLS, DISKS = 5_000, 140, 112
CLASSES = (
    "clear error",
    "equal load",
    "changed load",
    "unclear error",
    "traceback",
    "hang",
    "memory",
    "read outside",
    "silent change",
)
"""What may become of a case. A silent change is a changed load besides: of a file with our checksum, without a word."""
FAULTS = CLASSES[3:]
CHAINS = (("train", "online", "generate", "nft"), ("augment", "finetune", "distil"))
"""The commands that are killed, those of one process together."""
SHOWN = 40
"""Faults that the page lists, at most."""
NOT_POSSIBLE = 3

Figures = dict[str, Any]
"""Of one tree: about (commit, seconds, machine), cases (counts by kind and class), faults, kills, disks."""


@dataclass(frozen=True)
class Faults:
    """Count what becomes of commands on damaged files, under kill -9, and on full disks."""

    before: str | None = None
    """Make the campaign with the packages of this commit, for the figures in brackets."""
    cases: int = CASES
    """Damaged inputs; other than 5,000, nothing is recorded."""
    kills: int = KILLS
    """Kills in all; 0 for none."""
    disks: int = DISKS
    """Full disks; 0 for none."""
    only: tuple[str, ...] = ()
    """These kinds of inputs."""
    processes: int = 2
    """Processes at once."""
    case: str | None = None
    """Make this case alone, KIND:NUMBER, and print all of it."""
    work: Path | None = None
    """A folder for all that is made, to look at, and whose sound inputs are used again; by default it is deleted."""

    def run(self) -> int:
        """Do it. Gives 1 where a goal is missed."""
        of = nullcontext(ROOT) if self.before is None else packages(self.before)
        with tempfile.TemporaryDirectory(prefix="faults-") as temporary, of as tree:
            work = (self.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            if self.case is not None:
                return _one(tree, work, self.case)
            figures = self._campaign(tree, work)
        whole = (self.cases, self.kills, self.disks, self.only) == (CASES, KILLS, DISKS, ())
        recorded: dict[str, Figures] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        recorded["now" if self.before is None else "before"] = figures
        if whole:
            with atomic_path(FIGURES) as to:
                to.write_text(json.dumps(recorded, indent=1) + "\n")
            with atomic_path(PAGE) as to:
                to.write_text(page(recorded))
        print_lines(table({"now": figures}), f"{figures['about']['git']}: cases", Console(), left=1)
        for line in (*_of_kills(figures), *_of_disks(figures)):
            print(line)
        for fault in figures["faults"][:SHOWN]:
            print(f"- {_of_fault(fault)}")
        over = missed(figures) if self.before is None else tame(figures) if whole else []
        for sentence in over:
            print(f"faults: missed: {sentence}", file=sys.stderr)
        return int(bool(over))

    def _campaign(self, tree: Path, work: Path) -> Figures:
        began = time.monotonic()
        tasks = [
            ("campaign", f"{part}/{self.processes}", str(self.cases), *self.only) for part in range(self.processes)
        ]
        of = sum(map(len, CHAINS))
        tasks += [("kills", str(-(-self.kills * len(names) // of)), *names) for names in CHAINS if self.kills]
        tasks += [("disks", str(self.disks))] if self.disks else []
        with ThreadPoolExecutor(self.processes) as pool:
            made = list(pool.map(lambda task: _process(tree, work, *task), tasks))
        results: dict[str, list[dict[str, Any]]] = {"campaign": [], "kills": [], "disks": []}
        for task, lines in zip(tasks, made, strict=True):
            results[task[0]] += lines
        about = {**machine(), "git": git("rev-parse", "--short", self.before or "HEAD")}
        return summary(results) | {"about": about | {"seconds": round(time.monotonic() - began)}}


def _variables(tree: Path) -> dict[str, str]:
    """The environment of a process whose packages are the tree's, and whose tests are ours."""
    return environment(tree, ROOT, ROOT / "benchmarks")


def _process(tree: Path, work: Path, module: str, *words: str) -> list[dict[str, Any]]:
    """What `tests.faults.MODULE` writes, in a folder of its own."""
    name = "-".join((module, *words)).replace("/", "-of-").replace(" ", "-")
    folder, to = work / name, work / f"{name}.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", f"tests.faults.{module}", str(folder), str(to), *words]
    with (work / f"{name}.log").open("w") as log:
        code = subprocess.run(command, cwd=work, env=_variables(tree), stdout=log, stderr=log, check=False).returncode
    if code == NOT_POSSIBLE and module == "disks":
        return []
    if code:
        sys.exit(f"{module} {' '.join(words)}: exit code {code}\n" + (work / f"{name}.log").read_text()[-3000:])
    return [json.loads(line) for line in to.read_text().splitlines()]


def _one(tree: Path, work: Path, case: str) -> int:
    """Make one case and print it."""
    kind, _, number = case.rpartition(":")
    code = (
        "import dataclasses, json, pathlib, sys; from tests.faults.campaign import Campaign\n"
        "work, kind, number = sys.argv[1:]\n"
        "made = dataclasses.asdict(Campaign(pathlib.Path(work), [kind]).make(kind, int(number)))\n"
        "print('\\n'.join(f'{key}: {value}' for key, value in made.items()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(work / "one"), kind, number]
    return subprocess.run(command, cwd=work, env=_variables(tree), check=False).returncode


def summary(results: dict[str, list[dict[str, Any]]]) -> Figures:
    """The counts, and the faults, one for each place."""
    cases: dict[str, Counter[str]] = {}
    faults: dict[tuple[str, str], dict[str, Any]] = {}
    for one in results["campaign"]:
        became = "silent change" if one["silent"] else one["became"]
        cases.setdefault(one["kind"], Counter())[became] += 1
        if became in FAULTS:
            place = one["where"].split("@")[-1] or f"{one['kind']} {one['damage'].split(':')[0]}"
            kept = {key: one[key] for key in ("kind", "number", "damage", "command", "where", "grown")}
            faults.setdefault((became, place), {**kept, "became": became, "cases": 0})["cases"] += 1
    kills: dict[str, Counter[str]] = {}
    for one in results["kills"]:
        kills.setdefault(one["name"], Counter()).update({"kills": one["kills"], "chains": 1, one["became"]: 1})
        kills[one["name"]]["left over"] += len(one["left"])
    disks: dict[str, Counter[str]] = {}
    for one in results["disks"]:
        disks.setdefault(one["name"], Counter()).update([one["became"], f"then {one['then']}"])
    return {
        "cases": cases,
        "faults": sorted(faults.values(), key=lambda fault: (FAULTS.index(fault["became"]), -fault["cases"])),
        "kills": kills,
        "disks": disks,
    }


def total(figures: Figures, became: str) -> int:
    """Cases of a class."""
    return sum(counts.get(became, 0) for counts in figures["cases"].values())


def missed(figures: Figures) -> list[str]:
    """A sentence for each goal that is missed."""
    found = [f"{total(figures, name)} cases: {name}; the goal is 0" for name in FAULTS if total(figures, name)]
    for name, counts in figures["kills"].items():
        for became in ("unequal", "stuck"):
            if counts.get(became):
                found.append(f"{counts[became]} of {counts['chains']} chains of kills of {name}: {became}")
    for name, counts in figures["disks"].items():
        wrong = [key for key in counts if key not in ("clear error", "equal load", "then equal")]
        found += [f"{counts[key]} full disks of {name}: {key}" for key in wrong]
    return found


def tame(figures: Figures) -> list[str]:
    """What the generators should have found in the commit before, and did not."""
    least = {"traceback": 100, "hang": 1, "memory": 1, "silent change": 1, "read outside": 1}
    return [
        f"{total(figures, name)} cases: {name}; the commit before is to have {n} or more"
        for name, n in least.items()
        if total(figures, name) < n
    ]


def table(recorded: dict[str, Figures]) -> Lines:
    """The counts by kind and class; those of the commit before in brackets."""
    now, before = recorded["now"], recorded.get("before")

    def cell(kind: str | None, became: str) -> str:
        def count(figures: Figures) -> int:
            return total(figures, became) if kind is None else figures["cases"].get(kind, {}).get(became, 0)

        return f"{count(now)}" + (f" ({count(before)})" if before else "")

    lines = [["input", "cases", *CLASSES]]
    for kind, counts in now["cases"].items():
        lines.append([kind, str(sum(counts.values())), *(cell(kind, became) for became in CLASSES)])
    everything = sum(sum(counts.values()) for counts in now["cases"].values())
    return [*lines, ["all", str(everything), *(cell(None, became) for became in CLASSES)]]


def _of_kills(figures: Figures) -> list[str]:
    return [
        f"- {name}: {counts['kills']} kills in {counts['chains']} chains; {counts.get('equal', 0)} ended equal to an "
        f"uncut run, {counts.get('unequal', 0)} unequal, {counts.get('stuck', 0)} stuck; {counts['left over']} "
        "temporary files left over"
        for name, counts in figures["kills"].items()
    ]


def _of_disks(figures: Figures) -> list[str]:
    return [
        f"- {name}: {', '.join(f'{n} {key}' for key, n in sorted(counts.items()))}"
        for name, counts in figures["disks"].items()
    ] or ["- no disk was filled: --disks 0, or no file system can be mounted here"]


def _of_fault(fault: dict[str, Any]) -> str:
    where = f": {fault['where']}" if fault["where"] else ""
    return (
        f"{fault['became']}, {fault['cases']} cases, such as {fault['kind']} {fault['number']} "
        f"({fault['damage'][:120]}; `diffrl {' '.join(fault['command'].split()[:2])}`){where}"
    )


def page(recorded: dict[str, Figures]) -> str:
    """The whole of `faults.md`."""
    text = ["# Damaged files, kills and full disks", "", "Written by `make campaign` (`benchmarks/faults.py`).", ""]
    for key, figures in recorded.items():
        about = figures["about"]
        which = "this tree" if key == "now" else "the commit before, in brackets"
        cpu = processor(about)
        text.append(f"- {which}: {about['git']}, {about['seconds'] / 60:.0f} minutes with two processes on {cpu}")
    if "now" not in recorded:
        return "\n".join(text) + "\n"
    text += [
        "",
        "Each case is a command (`data info`, `data convert`, `train`, `evaluate`, `resume`, `online`, `augment`) on a "
        "damaged input, in a child process with a limit of 10 s and 1 GB of memory. A *clear error* is exit code 1 or "
        "2 with a message of at most 1,500 characters. Where the command ended well, what it loaded was compared with "
        "what the sound input gives: an *equal* or a *changed load*. A changed load is expected where a file has no "
        "checksum. A *silent change* is one of a file that diffrl wrote with a checksum, where no line of the output "
        "tells of damage. *Read outside*: a file that the command does not name was opened (told by inotify).",
        "",
        markdown(table(recorded)),
        "## kill -9",
        "",
    ]
    titles = {"now": "This tree:", "before": "The commit before:"}
    for part, lines in (("kills", _of_kills), ("disks", _of_disks)):
        if part == "disks":
            text += ["", "## Full disks", "", "A tmpfs that fills at one write after another, then gets room.", ""]
        for key, figures in recorded.items():
            text += [titles[key], "", *lines(figures), ""]
    for key, figures in recorded.items():
        text += [f"## Faults, one for each place: {titles[key].lower().rstrip(':')}", ""]
        text += [f"- {_of_fault(fault)}" for fault in figures["faults"][:SHOWN]] or ["None."]
        if len(figures["faults"]) > SHOWN:
            text.append(f"- and {len(figures['faults']) - SHOWN} more")
        text.append("")
    return "\n".join(text)


def main(options: Faults) -> int:
    """Run it; a mistake in the options is told in a sentence."""
    try:
        return options.run()
    except UserError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(asked(Faults, description=__doc__)))
