"""Makes the fixed runs in one process, in the working folder it is started in, with the tree that PYTHONPATH names.

    python benchmarks/unchanged_worker.py TREE NAME ...

Started by `unchanged.py`. What was written and how long each took is left in `digests.json`.
"""

import json
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import unchanged_digests
import unchanged_inputs
import unchanged_runs
from unchanged_runs import FixedRun

_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def make(run: FixedRun) -> dict[str, Any]:
    """Make one run and digest what it wrote."""
    import torch

    from diffrl.cli import main

    began = time.monotonic(), _cpu()
    error = None
    for command in run.commands:
        # Nothing is to depend on the global generators, or a run would depend on those before it; if something does,
        # it is the same in every process.
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        print(f"\n=== {run.name}: diffrl {' '.join(command)}", file=sys.stderr, flush=True)
        try:
            code: object = main(list(command))
        except SystemExit as leave:
            code = leave.code
        except Exception:
            traceback.print_exc()
            code = "an exception"
        if code not in (0, None):
            error = f"diffrl {' '.join(command)} ended with {code}"
            break
    seconds, cpu = time.monotonic() - began[0], _cpu() - began[1]
    files = {} if error else unchanged_digests.of_folder(Path(run.name))
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "error": error, "files": files}


def _cpu() -> float:
    """Seconds of CPU time of this process and of those it started that have ended."""
    return sum(times.ru_utime + times.ru_stime for times in map(resource.getrusage, _WHO))


def main(tree: str, *names: str) -> None:
    """Make the runs; what is made so far is on disk after each."""
    import agents
    import diffrl
    import envs

    for module in (diffrl, agents, envs):
        if not Path(str(module.__file__)).resolve().is_relative_to(Path(tree).resolve()):
            sys.exit(f"{module.__name__} is imported from {module.__file__}, not from {tree}")
    unchanged_inputs.write_inputs(Path())
    results: dict[str, Any] = {}
    for name in names:
        results[name] = make(unchanged_runs.RUNS[name])
        Path("digests.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
