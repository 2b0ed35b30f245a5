"""The runs of a sweep as an array job of Slurm: each task trains its run, or goes on with it, as on this machine."""

import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffrl.runs.sweep.queue import COMMAND
from diffrl.support.errors import UserError, first_line
from diffrl.support.files import atomic_path

SCRIPT = "sweep.sbatch"
"""The script's file in the sweep's folder."""
WARNING = 120
"""Seconds before its time limit in which a task saves."""
KEPT = (
    *("PYTHONPATH", "DIFFRL_DATA", "DIFFRL_CACHE"),
    *("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"),
)
"""Variables of the environment that the script hands on: they say what is imported and where data are."""

TEXT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --output={logs}/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
{options}
# Each task trains the run of its place in the list of {folder}, or goes on from its newest checkpoint.
# Preempted (SIGTERM), it saves, and Slurm queues it again; {warning} s before its time limit (USR1) it saves, and
# queues itself again.
run="" stopped=0 again=0
stop() {{ stopped=1; [ -z "$run" ] || kill -TERM "$run" 2>/dev/null; }}
trap stop TERM INT
trap 'again=1; stop' USR1
cd {here} || exit 1
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}"
{variables}{command} --task "$SLURM_ARRAY_TASK_ID" --out {folder} &
run=$!
[ "$stopped" = 0 ] || stop
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do
  wait "$run"
  code=$?
done
if [ "$again" = 1 ] && [ "$code" != 0 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def script(folder: Path, places: Sequence[int], jobs: int | None, options: Sequence[str]) -> str:
    """The text of the job script.

    places: of the runs that are to be run. jobs: tasks at a time at most; None: as many as Slurm grants. options:
    further ones of sbatch, such as --partition=gpu, a line each. Raises UserError for one that is none.
    """
    for option in options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(
                f"--slurm-options {option!r}: expected options of sbatch, such as --slurm-options=--time=24:00:00."
            )
    folder = folder.absolute()
    if "\n" in str(folder) or "%" in str(folder):
        raise UserError(f"Slurm takes no folder of this name: {folder}. Choose another --out.")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return TEXT.format(
        name=shlex.quote(f"diffrl-{folder.name}"),
        array=",".join(_ranges(places)) + ("" if jobs is None else f"%{jobs}"),
        logs=_escaped(folder),
        warning=WARNING,
        options="".join(f"#SBATCH {option}\n" for option in options),
        folder=shlex.quote(str(folder)),
        here=shlex.quote(str(Path.cwd())),
        variables="".join(f"export {name}={shlex.quote(value)}\n" for name, value in kept.items()),
        command=shlex.join(COMMAND),
    )


def _escaped(folder: Path) -> str:
    """A folder as an #SBATCH line takes it."""
    return str(folder).replace("\\", "\\\\").replace(" ", "\\ ")


def _ranges(places: Iterable[int]) -> Iterator[str]:
    """The numbers as Slurm writes them: 0-3, 5."""
    for _, group in itertools.groupby(enumerate(sorted(places)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def require_sbatch() -> None:
    """Raise UserError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise UserError("There is no sbatch here: submit from a machine of the cluster, or copy what --slurm prints.")


def submit(folder: Path, text: str) -> str:
    """Write the script into the sweep's folder and give it to sbatch; what that says. Raises UserError on failure."""
    require_sbatch()
    with atomic_path(folder / SCRIPT) as temporary:
        temporary.write_text(text)
    done = subprocess.run(["sbatch", str(folder / SCRIPT)], capture_output=True, text=True)
    if done.returncode != 0:
        said = first_line(RuntimeError(done.stderr)) or f"exit code {done.returncode}"
        raise UserError(f"sbatch has refused {folder / SCRIPT}: {said}")
    return done.stdout.strip()
