"""Does this tree compute what another one does, to the byte? Fixed small runs of everything, compared by digests.

    python benchmarks/unchanged.py --against 7a5e561         both trees on this machine, now: the answer that counts
    python benchmarks/unchanged.py --against main --only bc dppo
    python benchmarks/unchanged.py --check                   this tree with benchmarks/results/unchanged.json
    python benchmarks/unchanged.py --record                  write that file

The runs (`unchanged_runs.py`) are command lines on small files (`unchanged_inputs.py`): every agent, offline and
online, evaluated, resumed, in several processes; SynthER and Flow-to-Better; every algorithm that fine-tunes policies;
students distilled; every algorithm for images. What they write is compared part by part (`unchanged_digests.py`): each
tensor of each checkpoint and model, each column of metrics.csv, each key of scores.json, evaluations.json and the like,
each array of generated HDF5 files, the pixels of sampled images. Left out is wall time, and what `LEFT_OUT` there
lists. A difference that is meant stands in `ACCEPTED`, with its reason, and is listed.

Another processor, or another version of PyTorch, rounds differently: a recorded file says on which it was made, and
--check refuses on another. --against is for every machine. About three minutes of CPU time a tree. Exit code 1 where
anything differs.
"""

import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import asked
from rich.console import Console
from rich.table import Table
from trees import ROOT, environment, git, machine, packages
from unchanged_digests import grouped
from unchanged_inputs import CACHE, DATA
from unchanged_runs import RUNS, chosen

RESULTS = ROOT / "benchmarks" / "results" / "unchanged.json"

_ROWS_2 = (
    "SynthER's seeds are hashed as all others are: other rows held out, other batches and noise (version 2 of rows)"
)
_FIDELITY = "useless rows are told by two more measures: of shuffled columns, and the distance of rows to one another"
_JUDGED = "the fidelity report judges dynamics without a simulator, and names all faults: of the file its words alone"
_WHOLE_ENVIRONMENT = (
    "an environment is recorded with its time limit, wrappers and origin, not by id and arguments alone"
)
_SILENT = "rounds without a signal are counted, and DPPO keeps which seeds have met one: new entries"
_ABSOLUTE = "the data's path is stored absolute"
_COMPANIONS = "of a sum of rewards the companions are held out, which an evaluation measures: one more entry"
_EVALUATED_IN = "an evaluation says which environment it was made in, with its arguments and time limit: new entries"
_COUNTS = "each seed of a policy that is fine-tuned counts its own steps: (S,) in place of one number"
_UNCHANGED = "scores say up to which step the policy has learned nothing, and no evaluation till then is the best"
_CRITICS = "critics are asked as the agent asks them, and the diagnosis says how: one more entry"
_AGENT = "scores name their agent: a new entry"
_LOSS = "an evaluation of a run on examples has their loss: a new entry"
_ALPHA = "what adapters give may be scaled by another number than their rank: a new entry"
_BASE = "adapters of a built-in model name it and the digest of the weights under them"
ACCEPTED: dict[str, str] = {
    "synther*/new-synther/fidelity.json:sliced_w2_of_shuffled_columns": _FIDELITY,
    "synther*/new-synther/fidelity.json:variety": _FIDELITY,
    "synther*/new-synther/fidelity.json:verdicts": _FIDELITY,
    "synther*/new-synther/fidelity.json:*": _ROWS_2,
    "synther*/new.hdf5:*": _ROWS_2,
    "flow-to-better/new-flow-to-better/fidelity.json:*": _JUDGED,
    "flow-to-better/new.hdf5:@sha256": _JUDGED,
    "flow-to-better/new.hdf5:metadata/fidelity*": _JUDGED,
    "synther*/new-synther/config.json:rows_version": _ROWS_2,
    "synther*/new-synther/codec.safetensors:*": _ROWS_2,
    "synther*/new-synther/checkpoints/000000000/state.json:*": _ROWS_2,
    "synther*/new-synther/checkpoints/000000000/state.safetensors:generator": _ROWS_2,
    "synther*/new-synther/checkpoints/000000060/*": _ROWS_2,
    "synther*/new-synther/metrics.csv:*": _ROWS_2,
    "online-synthetic/checkpoints/*": _ROWS_2,
    "online-synthetic/metrics.csv:*": _ROWS_2,
    "online-synthetic/scores.json:*": _ROWS_2,
    "*/scores.json:agent": _AGENT,
    "*/scores.json:unchanged_until": _UNCHANGED,
    "dtql/scores.json:best": _UNCHANGED,
    "online*/scores.json:best": _UNCHANGED,
    "dppo*/scores.json:best": _UNCHANGED,
    "policy-nft*/scores.json:best": _UNCHANGED,
    "dppo*/checkpoints/*/state.safetensors:finetune.optimiser.*.step": _COUNTS,
    "policy-nft*/checkpoints/*/state.safetensors:finetune.optimiser.*.step": _COUNTS,
    "policy-nft*/checkpoints/*/state.json:sha256": _COUNTS,
    "diagnose/diagnosis.json:fine_tuning": _CRITICS,
    "*/finetune.yaml:lora_alpha": _ALPHA,
    "supervised*/evaluations.json:__all__": _LOSS,
    "*/run.json:task": _WHOLE_ENVIRONMENT,
    "*/evaluation.json:env": _WHOLE_ENVIRONMENT,
    "*/evaluation.json:env_id": _EVALUATED_IN,
    "*/evaluation.json:env_kwargs": _EVALUATED_IN,
    "*/evaluation.json:max_episode_steps": _EVALUATED_IN,
    "*/checkpoints/*/state.json:silent": _SILENT,
    "dppo*/checkpoints/*/state.safetensors:finetune.met": _SILENT,
    "dppo*/checkpoints/*/state.json:sha256": _SILENT,
    "diagnose/diagnosis.json:about": _ABSOLUTE,
    "ddpo-is-resumed/evaluations.json:__all__": _COMPANIONS,
    "*/model/adapter_config.json:base_model_name_or_path": _BASE,
    "*/model/adapter_config.json:revision": _BASE,
}
"""Differences that are meant: a pattern of RUN/FILE:PART, as in "synther*/*.hdf5:*", and the reason."""

Results = dict[str, dict[str, Any]]
"""By run: seconds, cpu_seconds, error, and files, the digests by file and part."""


@dataclass(frozen=True)
class Unchanged:
    """Compare this tree with another one, or with what was recorded."""

    against: str | None = None
    """A commit, tag or branch to compare with: its packages make the same runs now."""
    record: bool = False
    """Write the digests of this tree to --file."""
    check: bool = False
    """Compare this tree with --file."""
    file: Path = RESULTS
    """What --record writes and --check reads."""
    only: tuple[str, ...] = ()
    """These runs, and those they start from; by default all."""
    keep: Path | None = None
    """A new folder for all that the runs write, to look at; by default it is deleted."""

    def run(self) -> int:
        """Make the runs and compare them. Gives 1 where something differs or a run failed."""
        if mistake := self._mistake():
            print(mistake, file=sys.stderr)
            return 2
        recorded = json.loads(self.file.read_text()) if self.check else {}
        if recorded and (other := _other_machine(recorded["machine"])):
            print(
                f"{self.file} was recorded with {other}; digests are comparable on the same kind of machine alone. "
                f"Compare with --against {recorded['machine']['git']}, which makes both here.",
                file=sys.stderr,
            )
            return 2
        names = [run.name for run in chosen(self.only)]
        with ExitStack() as held:
            work = self.keep or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="unchanged-")))
            trees = [ROOT]
            if self.against is not None:
                trees.append(held.enter_context(packages(self.against)))
            mine, *others = _make(trees, names, work)
        if self.record:
            return self._write(mine)
        if self.check:
            return report(small(mine), {name: recorded["runs"][name] for name in names if name in recorded["runs"]})
        return report(mine, others[0])

    def _mistake(self) -> str:
        """What is wrong with what was asked for; empty where nothing is."""
        unknown = [name for name in self.only if name not in RUNS]
        if unknown:
            return f"Unknown: {', '.join(unknown)}. Runs: {', '.join(RUNS)}."
        if [self.against is not None, self.record, self.check].count(True) != 1:
            return "Give one of --against REV, --record, --check."
        if self.record and self.only:
            return "--record records all runs: leave out --only."
        if self.check and not self.file.is_file():
            return f"{self.file} does not exist: --record writes it."
        if self.keep is not None and self.keep.exists():
            return f"--keep {self.keep} exists: expected a new folder."
        if self.against is not None and not git("rev-parse", "--verify", "--quiet", f"{self.against}^{{commit}}"):
            return f"--against {self.against} is no commit of {ROOT}."
        return ""

    def _write(self, mine: Results) -> int:
        failed = [f"{name}: {result['error']}" for name, result in mine.items() if result["error"]]
        if failed:
            print("\n".join(failed), file=sys.stderr)
            return 1
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"machine": machine(), "runs": small(mine)}, indent=1) + "\n")
        spent = sum(result["cpu_seconds"] for result in mine.values())
        print(f"{len(mine)} runs in {spent:.0f} s of CPU time. Written: {self.file}")
        return 0


def _other_machine(recorded: Mapping[str, str]) -> str:
    """What of a recorded machine is not this one's, as text; empty where digests are comparable."""
    here = machine()
    return ", ".join(f"{k} {v} (here {here.get(k)})" for k, v in recorded.items() if k != "git" and here.get(k) != v)


def _make(trees: Sequence[Path], names: Sequence[str], work: Path) -> list[Results]:
    """Make the runs with each tree, the trees side by side, each in a process of one thread."""
    worker = Path(__file__).with_name("unchanged_worker.py")
    started = []
    for i, tree in enumerate(trees):
        folder = (work / ("this" if i == 0 else "other")).resolve()
        folder.mkdir(parents=True)
        variables = environment(tree) | {"DIFFRL_DATA": DATA, "DIFFRL_CACHE": CACHE}
        command = [sys.executable, str(worker), str(tree), *names]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
        started.append((folder, process))
    results = []
    for folder, process in started:
        if process.wait() != 0:
            sys.exit((folder / "log").read_text()[-3000:])
        results.append(json.loads((folder / "digests.json").read_text()))
    return results


def small(results: Results) -> Results:
    """The results with one digest for all tensors of a group."""
    files = {
        name: {file: grouped(parts) for file, parts in result["files"].items()} for name, result in results.items()
    }
    return {name: {**result, "files": files[name]} for name, result in results.items()}


def differences(name: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts of a run that are not equal, or that one of the two lacks, as RUN/FILE:PART."""
    found = []
    for file in sorted({*mine["files"], *other["files"]}):
        a, b = mine["files"].get(file, {}), other["files"].get(file, {})
        found += [f"{name}/{file}:{part}" for part in sorted({*a, *b}) if a.get(part) != b.get(part)]
    return found


def report(mine: Results, others: Results) -> int:
    """Print the table; 1 where something differs that is not accepted."""
    table = Table("run", "files", "parts", "seconds", "result")
    accepted: dict[str, list[str]] = {}
    bad = 0
    for name, result in mine.items():
        other = others.get(name)
        files = result["files"]
        counts = (str(len(files)), str(sum(map(len, files.values()))), f"{result['cpu_seconds']:g}")
        errors = [f"failed: {r['error']}" for r in (result, other or {"error": "not recorded"}) if r["error"]]
        if errors or other is None:
            bad += 1
            table.add_row(name, *counts, "\n".join(errors))
            continue
        unequal = []
        for part in differences(name, result, other):
            reason = next((why for pattern, why in ACCEPTED.items() if fnmatch.fnmatch(part, pattern)), None)
            if reason is None:
                unequal.append(part.removeprefix(f"{name}/"))
            else:
                accepted.setdefault(reason, []).append(part)
        bad += bool(unequal)
        more = f"\nand {len(unequal) - 8} more" if len(unequal) > 8 else ""
        table.add_row(name, *counts, "DIFFERENT: " + "\n".join(unequal[:8]) + more if unequal else "equal")
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    console.print(table)
    for reason, parts in accepted.items():
        console.print(f"accepted: {reason}\n  " + "\n  ".join(parts))
    console.print(f"{len(mine) - bad} of {len(mine)} runs equal." if bad else f"All {len(mine)} runs are equal.")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(asked(Unchanged, description=__doc__).run())
