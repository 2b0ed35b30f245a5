"""Merge what came back from a GPU machine into benchmarks/results/gpu/, and write benchmarks/results/gpu.md from that.

    python benchmarks/gpu/report.py [results.tar.gz | results.json | FOLDER ...]      without any: only the page

A result replaces the one that is there unless it is less. A whole result is replaced only by a whole one. Of a run that
was cut, the result that is further stays, if both are of the same code. Results of a rehearsal are refused.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tables

from kinds import ROOT, LongRun, Script, Stage, Tests
from stages import STAGES
from tables import Lines, markdown

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate

RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]
ABSENT = "not yet run"
HEAD = """# On a GPU

Written by `python benchmarks/gpu/report.py` from the JSON files in [gpu/](gpu), which `benchmarks/gpu/run.sh` makes on
a machine with a GPU ([how](../gpu/README.md)). A stage that has not been run says "{absent}". *cut*: the stage was
stopped when its time was up, so its figures are of a part of it. *code*: a hash of the commands and sources that decide
the result; *older*: these had changed when this page was written.
"""
OLDER = ", older"


# --- Merging --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Result]:
    """Results by stage, of an archive, of results.json, of a folder with either, or of a folder with a file a stage."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Expected results.tar.gz or results.json of run.sh, or their folder.")
    if path.is_dir():
        for name in ("results.tar.gz", "results.json"):
            if (path / name).exists():
                return read(path / name)
        found = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
    elif path.suffix == ".json":
        found = list(json.loads(path.read_text()).values())
    else:
        try:
            with tarfile.open(path) as archive:
                members = [archive.extractfile(m) for m in archive if m.isfile() and m.name.startswith("results/")]
                found = [json.load(member) for member in members if member is not None]
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path} is no archive of results: {error}. Expected results.tar.gz of run.sh.") from error
    return {result["stage"]: result for result in found}


def replaces(new: Result, old: Result | None) -> bool:
    """Whether a result is to take the other's place."""
    if old is None or new["state"] == "whole":
        return True
    if old["state"] == "whole":
        return False
    return new["digest"] != old["digest"] or _steps(new) >= _steps(old)


def _steps(result: Result) -> int:
    steps: int = result.get("result", {}).get("steps", 0)
    return steps


def merge(found: Mapping[str, Result], folder: Path) -> list[str]:
    """Write results where they replace what is there; a line on each."""
    lines = []
    for name, result in found.items():
        if result["rehearsal"]:
            raise UserError(f"{name} was rehearsed: toy figures on a CPU are no results.")
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if replaces(result, old):
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
        lines.append(f"{name}: {result['state']}" + ("" if replaces(result, old) else "; what is there is more: kept"))
    return lines


# --- The page -------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Result], stages: Sequence[Stage] = STAGES, older: Collection[str] = ()) -> str:
    """gpu.md: an overview of all stages, then the figures of each that has some.

    older: the names of stages whose results are of code that has changed since.
    """
    lines: Lines = [["stage", "", "state", "card", "date (UTC)", "minutes", "code"]]
    for stage in stages:
        result = results.get(stage.name)
        if result is None:
            lines.append([f"`{stage.name}`", stage.title, ABSENT, "", "", "", ""])
            continue
        seconds = result.get("result", {}).get("seconds")
        minutes = "" if seconds is None else f"{seconds / 60:.1f}"
        date, card = result["date"][:10], result["machine"]["card"]
        code = result["digest"][:8] + (OLDER if stage.name in older else "")
        lines.append([f"`{stage.name}`", stage.title, result["state"], card, date, minutes, code])
    parts = [HEAD.format(absent=ABSENT), markdown(lines)]
    runs = [stage for stage in stages if isinstance(stage.kind, LongRun)]
    if runs:
        parts += ["## Runs of full length\n", markdown(run_lines(runs, results))]
        parts += [_about(results[stage.name]) for stage in runs if stage.name in results]
    for stage in stages:
        if not isinstance(stage.kind, LongRun) and stage.name in results:
            result = results[stage.name]
            parts += [f"## {stage.title}\n", *FIGURES[type(stage.kind)](result), _about(result)]
    return "\n".join(parts)


def _about(result: Result) -> str:
    """The command, and what it ran on."""
    commands = "".join(f"    {command}\n" for command in result["commands"])
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if name != "card")
    wrong = "".join(f"    {line}\n" for line in result.get("wrong", "").splitlines())
    wrong = f"\n{result['stage']} {result['state']}:\n\n{wrong}" if wrong else ""
    return f"{commands}\n{result['machine']['card']}; {facts}; {result['date']} UTC.\n{wrong}"


def run_lines(stages: Sequence[Stage], results: Mapping[str, Result]) -> Lines:
    """A line a long run: the scores of its last evaluation, and the mean of the last three, ± over seeds."""
    head = ["run", "seeds", "steps", "last evaluation", "mean of the last three", "best", "steps/s", "hours"]
    lines: Lines = [[*head, "CORL's last, 4 seeds"]]
    for stage in stages:
        assert isinstance(stage.kind, LongRun)
        result = results.get(stage.name)
        if result is None or "result" not in result:
            state = ABSENT if result is None else result["state"]
            lines.append([f"`{stage.name}`", "", state, *[""] * 5, stage.kind.published])
            continue
        found = result["result"]
        scores = [entry.get("score", entry["mean_return"]) for entry in found["evaluations"]]
        last = mean = best = ""
        if scores:
            last = f"{_estimate(scores[-1])} (step {found['evaluations'][-1]['step']:,})"
            mean = _estimate([sum(of_seed) / len(of_seed) for of_seed in zip(*scores[-3:], strict=True)])
            best = _estimate([max(of_seed) for of_seed in zip(*scores, strict=True)])
        pace = "" if found["steps_per_second"] is None else f"{found['steps_per_second']:,.0f}"
        steps = f"{found['steps']:,} of {found['target']:,}"
        hours = f"{found['seconds'] / 3600:.2f}"
        figures = [str(len(found["seeds"])), steps, last, mean, best, pace, hours]
        lines.append([f"`{stage.name}`", *figures, stage.kind.published])
    return lines


def _estimate(scores: Sequence[float]) -> str:
    return str(estimate([[score] for score in scores]))


def outcomes(result: Result) -> list[str]:
    """How many tests passed, and which failed."""
    found = result.get("result")
    if found is None:
        return []
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))
    failures = "".join(f"- `{name}`\n" for name in found["failures"])
    return [f"{counts}, in {found['seconds']:.0f} s.\n", *([failures] if failures else [])]


def measured(result: Result) -> list[str]:
    """The page that the script wrote, else the rows that it measured on the GPU."""
    found = result.get("result", {})
    if "page" in found:
        text = "\n".join(line for line in found["page"].splitlines() if not line.startswith(("<!--", "# ")))
        return [text.strip() + "\n"]
    rows = found.get("content", {}).get("gpu", [])
    return [markdown(row_lines(rows))] if rows else []


def row_lines(rows: Sequence[Mapping[str, Any]]) -> Lines:
    """Measurements as a table: of several values the median, three digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [names, *([_cell(row.get(name)) for name in names] for row in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        value = float(median(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


FIGURES: dict[type, Callable[[Result], list[str]]] = {Tests: outcomes, Script: measured}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="what came back; without any, only the page is written")
    return parser.parse_args()


def main(paths: Sequence[Path]) -> int:
    folder = RESULTS / "gpu"
    for path in paths:
        print("\n".join(merge(read(path), folder)))
    results = read(folder) if folder.is_dir() else {}
    older = [s.name for s in STAGES if s.name in results and results[s.name]["digest"] != s.digest()]
    if older:
        print(f"Of code that has changed since: {', '.join(older)}")
    with atomic_path(RESULTS / "gpu.md") as temporary:
        temporary.write_text(page(results, older=older))
    print(f"Page: {RESULTS / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(arguments().results))
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
