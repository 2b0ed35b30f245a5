"""Fine-tuning of a cloned diffusion policy: in its environment (DPPO, DiffusionNFT), and from preferences (DPO).

    python benchmarks/finetune_policies.py                          trains what is missing, then the table
    python benchmarks/finetune_policies.py --cells dppo dpo         some of the cells
    python benchmarks/finetune_policies.py --cells dppo nft         PPO and DiffusionNFT at equal environment steps
    python benchmarks/finetune_policies.py --data FILE.hdf5 --env Hopper-v4 --normalise     other data
    python benchmarks/finetune_policies.py --no-train               the table of what is there

One policy a seed is cloned from the data (diffusion_bc, 3 x 128, T = 5); every cell starts from it, with the defaults
of `diffrl finetune policy` but for what its name says. A run a cell under --out, its seeds one stack in one process and
one thread. Runs that were cut go on.

How to read it. "before" and "after" are the clone and the last step, scored over --episodes a seed from the same start
states, by the policy alone (no critic chooses); ± is the standard error over seeds. "changed" is after minus before,
seed by seed, so that its ± does not hold what the clones differ in. "CPU s" is one seed's share of the process's CPU
time for the whole run, evaluations included. The budget of DPPO and NFT is environment steps, the same for both; DPO
acts nowhere: it sees the data alone, whose segments are judged by their returns (`--preferences auto`).
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from asked import asked
from rich.console import Console
from tables import Lines, markdown, print_lines

import diffrl
from agents import DiffusionBC
from diffrl.runs.config import TrainConfig
from diffrl.runs.run import Run
from diffrl.runs.tune import finetune_policy
from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate
from diffrl.training import checkpoint
from diffrl.tuning.config import ActingConfig, DPOConfig, DPPOConfig, NFTConfig, TuningConfig

CELLS: dict[str, tuple[type[TuningConfig], dict[str, Any]]] = {
    "dppo": (DPPOConfig, {}),
    "dppo, last 3 steps": (DPPOConfig, {"tuned_steps": 3}),
    "dppo, lr 1e-4, clip .1": (DPPOConfig, {"learning_rate": 1e-4, "clip_nats": 0.1}),
    "nft": (NFTConfig, {}),
    "nft, beta 1": (NFTConfig, {"beta": 1.0}),
    "nft, no companions": (NFTConfig, {"companions": 0}),
    "dpo": (DPOConfig, {}),
    "dpo, a fifth of labels wrong": (DPOConfig, {"label_noise": 0.2}),
    "dpo, labels reversed": (DPOConfig, {"preferences": "reversed"}),
}
"""Name, and settings that are not the defaults."""


@dataclass(frozen=True)
class FinetunePolicies:
    """Fine-tune a cloned policy, and score it before and after."""

    cells: tuple[str, ...] = tuple(CELLS)
    """Which cells to run: see CELLS."""
    data: str = "maze2d-umaze-v1"
    """What is cloned, and what preferences are of; for other data than the maze give --env."""
    env: str | None = None
    """The environment, where the data do not name it."""
    normalise: bool = False
    """Standardise observations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, of cloning and of fine-tuning."""
    clone_steps: int = 10_000
    """Training steps of the clone."""
    dppo_steps: int = 200_000
    """Environment steps a seed of DPPO and NFT."""
    dpo_steps: int = 1_000
    """Updates of preference DPO."""
    segment: int = 32
    """Steps of a judged segment."""
    beta: float = DPOConfig.beta
    """Preference DPO's beta: how closely the policy is held to the pretrained one."""
    episodes: int = 100
    """Episodes a seed in each score."""
    train: bool = True
    """--no-train: score what is there."""
    out: Path = Path("runs/finetune_policies")
    """Where the runs go."""
    results: Path | None = None
    """Where to write the rows as JSON; by default results.json in --out."""


def clone(options: FinetunePolicies) -> Path:
    """The cloned policies, trained unless they are there."""
    path = options.out / "clone"
    if not (path / "run.json").exists():
        config = TrainConfig(
            options.data,
            DiffusionBC(width=128, normalise_observations=options.normalise),
            env=options.env,
            seeds=options.seeds,
            steps=options.clone_steps,
            eval_every=options.clone_steps,
            workers=1,
            out=path,
        )
        diffrl.train(config)
    return path


def settings_of(options: FinetunePolicies, cell: str, start: Path) -> TuningConfig:
    """The settings of a cell; reversed preferences are those of the cell dpo, written the other way round."""
    schema, fields = CELLS[cell]
    if schema is not DPOConfig:
        return schema(start_run=start, **fields)
    values: dict[str, Any] = {"segment": options.segment, "beta": options.beta, **fields}
    if values.get("preferences") == "reversed":
        from diffrl.data.preferences import Preferences

        made = options.out / "dpo" / "preferences.safetensors"
        file = options.out / "reversed.safetensors"
        values["preferences"] = str(Preferences.read(made).flipped().write(file))
        del values["segment"]  # that of the file's pairs
    return DPOConfig(start_run=start, **values)


def tune(options: FinetunePolicies, cell: str, start: Path) -> Path:
    """The run of a cell, trained to its end unless it is; its CPU seconds are kept beside it."""
    path = options.out / cell.replace(" ", "_").replace(",", "")
    settings = settings_of(options, cell, start)
    steps = options.dppo_steps if isinstance(settings, ActingConfig) else options.dpo_steps
    timing = path / "cpu_seconds.json"
    spent = json.loads(timing.read_text()) if timing.exists() else 0.0
    began = time.process_time()
    if not (path / "run.json").exists():
        finetune_policy(settings, steps=steps, out=path, eval_every=max(steps // 8, 1), eval_episodes=20, log_every=100)
    elif checkpoint.steps(path)[-1] < steps:
        diffrl.resume(path, steps=steps)
    else:
        return path
    timing.write_text(json.dumps(spent + time.process_time() - began))
    return path


def score(options: FinetunePolicies, path: Path, which: str) -> list[float]:
    """The score of each seed, x100 where there are references, else its mean return."""
    entry = diffrl.evaluate(path, episodes=options.episodes, which=[which], seed=1, quiet=True)[which]
    return [float(np.mean(values)) for values in entry.get("scores", entry["returns"])]


def row(options: FinetunePolicies, cell: str, path: Path, before: list[float]) -> dict[str, Any]:
    """A cell's line of the table."""
    run = Run.read(path)
    timing = path / "cpu_seconds.json"
    return {
        "cell": cell,
        "steps": checkpoint.steps(path)[-1],
        "unit": "environment steps" if run.kind != DPOConfig.algo else "updates",
        "before": before,
        "after": score(options, path, "last"),
        "cpu": json.loads(timing.read_text()) / len(run.config.seeds) if timing.exists() else None,
    }


def table(rows: list[dict[str, Any]]) -> Lines:
    """The table, one line for each cell."""
    lines: Lines = [["cell", "budget a seed", "before", "after", "changed", "CPU s a seed"]]
    for r in rows:
        changed = [b - a for a, b in zip(r["before"], r["after"], strict=True)]
        values = [str(estimate([[x] for x in r[name]])) for name in ("before", "after")]
        seconds = "" if r["cpu"] is None else f"{r['cpu']:.0f}"
        budget = f"{r['steps']:,} {r['unit']}"
        lines.append([r["cell"], budget, *values, str(estimate([[x] for x in changed])), seconds])
    return lines


def main(options: FinetunePolicies) -> int:
    """Train what is missing, score, print, write."""
    console = Console()
    start = clone(options)
    rows = []
    before = score(options, start, "last")
    for cell in options.cells:
        path = options.out / cell.replace(" ", "_").replace(",", "")
        if options.train:
            path = tune(options, cell, start)
        elif not (path / "run.json").exists():
            console.print(f"{path} is not there yet")
            continue
        rows.append(row(options, cell, path, before))
        lines = table(rows)
        with atomic_path(options.results or options.out / "results.json") as temporary:
            temporary.write_text(
                json.dumps({"data": options.data, "seeds": list(options.seeds), "rows": rows}, indent=1)
            )
    print_lines(lines, f"{options.data}, {len(options.seeds)} seeds", console, left=1)
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(asked(FinetunePolicies, description=__doc__)))
