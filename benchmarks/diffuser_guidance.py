"""Diffuser guided by predicted returns on a hopper recording: does a larger scale plan, and get, higher returns?

    python benchmarks/diffuser_guidance.py          trains what is missing, then scores each scale; twelve core-minutes
    python benchmarks/diffuser_guidance.py --no-page   leaves the committed page as it is

One run under --out, which goes on where it was cut: a small network (16 channels times 1, 2, 4, batch 32, learning rate
1e-3), windows of 32 rows, 20 denoising steps, discount .997. Every scale plans with the same trained networks, by
dpmpp2m in 5 steps, a plan a step, from the same start states.
"return" is the episodes', of the environment; "predicted" is what the network J says of plans from 256 states of the
data, the same for all scales: J is what guidance climbs, so that alone it would prove little. ± is the standard error,
over seeds if there are several, else over episodes, and for "predicted" over the states.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asked import asked
from rich.console import Console
from tables import Lines, fill, markdown, print_lines
from trees import machine, processor

import diffrl
from agents.diffuser import DiffuserAgent
from agents.planning_config import Diffuser
from diffrl.data import d4rl
from diffrl.runs.acting import Actor, Evaluator
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "results" / "diffuser_guidance.md"


@dataclass(frozen=True)
class Guidance:
    """Train a guided Diffuser, and plan with several scales."""

    scales: tuple[float, ...] = (0.0, 0.01, 0.1)
    """Guidance scales."""
    steps: int = 8_000
    """Training steps."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    episodes: int = 20
    """Episodes a seed and scale."""
    recording: Path = ROOT.parent / "shared" / "data" / "rollouts" / "hopper_medium-replay-v4.hdf5"
    """The data."""
    page: bool = True
    """Put the table on the committed page."""
    out: Path = Path("runs/diffuser_guidance")
    """Folder of the run and the table."""


def trained(bench: Guidance) -> Path:
    """The run: as it is there, gone on with, or new."""
    path = bench.out / "hopper"
    there = checkpoint.steps(path)
    if there and (seeds := tuple(Run.read(path).config.seeds)) != bench.seeds:
        words = " ".join(map(str, seeds))
        raise UserError(f"{path} is of the seeds {words}: ask for --seeds {words}, or choose another --out.")
    if there and there[-1] >= bench.steps:
        return path
    if there:
        return diffrl.resume(path, steps=bench.steps)
    agent = Diffuser(
        guidance="return",
        width=16,
        multipliers=(1, 2, 4),
        horizon=32,
        denoising_steps=20,
        solver="dpmpp2m",
        sampling_steps=5,
        batch_size=32,
        learning_rate=1e-3,
        discount=0.997,
        ema_every=2,
        ema_start=500,
    )
    config = TrainConfig(
        str(bench.recording),
        agent,
        env="Hopper-v4",
        steps=bench.steps,
        seeds=bench.seeds,
        eval_every=bench.steps,
        eval_episodes=1,
        workers=1,
        eval_workers=0,
        compile=False,
        out=path,
    )
    return diffrl.train(config)


def scored(bench: Guidance, path: Path, scale: float) -> dict[str, Any]:
    """Returns (S, E) of the last checkpoint with a scale, and the predicted returns (S, 256) of its plans."""
    cell = path / "scales" / f"{scale:g}-{bench.episodes}-{checkpoint.steps(path)[-1]}.json"
    if not cell.exists():
        run = Run.read(path)
        agent = dataclasses.replace(run.config.agent, guidance_scale=scale)  # type: ignore[call-arg]
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, agent=agent))
        evaluator = Evaluator.of(run.task)
        rows = d4rl.read(bench.recording).observations
        rows = rows[np.random.default_rng(0).choice(len(rows), 256, replace=False)]
        found: dict[str, list[list[float]]] = {"returns": [], "predicted": []}
        for seed in run.config.seeds:
            planner = load_agent(run, seed)
            assert isinstance(planner, DiffuserAgent)
            returns = evaluator(Actor(planner, run.preprocessing, 1), bench.episodes, (1, seed))[0]
            states = run.preprocessing.observations(torch.from_numpy(rows).float())[None]
            plans = planner.plan(states, torch.Generator().manual_seed(0))
            with torch.no_grad():
                predicted = planner.predicted_return(plans, planner.least_noise)
            found["returns"].append(returns[0].tolist())
            found["predicted"].append(predicted[0].tolist())
        evaluator.close()
        cell.parent.mkdir(exist_ok=True)
        with atomic_path(cell) as temporary:
            temporary.write_text(json.dumps(found) + "\n")
    loaded: dict[str, Any] = json.loads(cell.read_text())
    return loaded


def main(bench: Guidance) -> int:
    """Train, score, write the table; a mistake in the options is told in a sentence."""
    settle()
    lines: Lines = [["guidance scale", "return", "normalised score", "predicted", "training steps"]]
    try:
        path = trained(bench)
        task = Run.read(path).task
        for scale in bench.scales:
            found = scored(bench, path, scale)
            score = task.score(np.array(found["returns"])).tolist()
            figures = [str(estimate(values)) for values in (found["returns"], score, found["predicted"])]
            lines.append([f"{scale:g}", *figures, f"{checkpoint.steps(path)[-1]:,}"])
    except (UserError, Interrupted) as error:
        print(f"diffuser_guidance: {error}", file=sys.stderr)
        return error.exit_code
    print_lines(lines, "Diffuser guided by returns", Console(), left=0)
    seeds = ", ".join(map(str, bench.seeds))
    about = f"Seeds {seeds}, {bench.episodes} episodes each; {processor(machine())}.\n\n"
    for page in (bench.out / "table.md", *([PAGE] if bench.page else [])):
        fill(page, "scales", about + markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(asked(Guidance, description=__doc__)))
