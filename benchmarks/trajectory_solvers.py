"""Solvers on a model of trajectories: DDIM and DPM-Solver++ with 10 to 50 steps beside the papers' 64 to 1,000.

    OMP_NUM_THREADS=1 python benchmarks/trajectory_solvers.py [--minutes 3] [--rows 100000] [--batch 64]

One small temporal U-Net learns segments of 64 rows of maze2d-umaze, first and last observation known and shown clean,
as in Diffuser, for `--minutes` of CPU time. Then every solver fills in the same `--batch` segments, whose ends are
those of real ones, from the same noise. Two figures a solver, each ± its standard error over the segments:

    distance    the root mean square difference to the ODE's own solution (DPM-Solver++(2M), 1,000 steps), of data
                normalised to [-1, 1]: what a deterministic solver of few steps loses
    dynamics    the root mean square error of s' given (s, a), by a linear regression on the data, over that of the
                data themselves: 1 is as true to the dynamics as real rows are

It writes benchmarks/results/trajectory_solvers.json, and the table in trajectory_solvers.md beside it.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from tables import Lines, fill, markdown, print_lines
from torch import Tensor

from diffrl.data.segments import SegmentSource
from diffrl.diffusion import VP, Denoise, Known, Prediction, Sampler, edm_weight, expand
from diffrl.nets import seed_generator
from diffrl.nets.temporal import TemporalUNet
from diffrl.support.files import atomic_path
from envs.datasets import load_dataset

RESULTS = Path(__file__).parent / "results"
HORIZON, WIDTH, MULTIPLIERS = 64, 16, (1, 2, 4)
K_MIN, K_MAX = 0.005, 100.0
RUNS = [
    *(("ddim", 0.0, n) for n in (10, 20, 50)),
    *(("dpmpp2m", 0.0, n) for n in (10, 20, 50)),
    *(("ddim", 1.0, n) for n in (64, 256, 1000)),
]
PROCESS = VP()
PREDICTION = Prediction("edm", PROCESS, data_std=0.5)


def known(x0: Tensor, action_size: int) -> Known:
    """The first and the last observation of x0 (S, B, H, A + O), shown clean."""
    mask = torch.zeros(x0.shape[2:])
    mask[[0, -1], action_size:] = 1
    return Known(mask, x0, "clean")


def train(network: TemporalUNet, source: SegmentSource, scale: tuple[Tensor, Tensor], minutes: float) -> int:
    """Train for so many minutes of CPU time, the learning rate falling to 0 as they pass; returns the steps."""
    g = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters())
    start, steps = time.process_time(), 0
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 1e-3 * math.cos(math.pi / 2 * done)
        x0 = rows(source, scale, 32, g)
        u = torch.rand(x0.shape[:2], generator=g)
        k = K_MIN * (K_MAX / K_MIN) ** u
        t = PROCESS.time(k)
        inpaint = known(x0, source.rows.shape[1] - source.observation_size)
        D = inpaint.denoiser(PREDICTION.denoiser(network))(
            PROCESS.perturb(x0, t, torch.randn(x0.shape, generator=g)), t
        )
        loss = (expand(edm_weight(k, PREDICTION.data_std), x0) * (D - x0) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    return steps


def rows(source: SegmentSource, scale: tuple[Tensor, Tensor], n: int, g: torch.Generator) -> Tensor:
    """n segments (1, n, H, A + O) of actions and observations, each column from -1 to 1."""
    segments = source.draw(n, 1, g)
    low, high = scale
    return 2 * (torch.cat([segments.actions, segments.observations], -1) - low) / (high - low) - 1


class Dynamics:
    """s' = [a, s, 1] W, fitted to segments; errors (B,) are root mean squares over a segment, the fit's own being 1."""

    def __init__(self, x: Tensor, action_size: int) -> None:
        self.action_size = action_size
        inputs, following = self._pairs(x)
        self.weight = torch.linalg.lstsq(inputs.flatten(0, 2), following.flatten(0, 2)).solution
        self.unit = 1.0
        self.unit = self(x).square().mean().sqrt().item()

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double()
        return torch.cat([x[:, :, :-1], torch.ones_like(x[:, :, :-1, :1])], -1), x[:, :, 1:, self.action_size :]

    def __call__(self, x: Tensor) -> Tensor:
        """The errors (B,) of segments x (1, B, H, A + O)."""
        inputs, following = self._pairs(x)
        return (inputs @ self.weight - following).square().mean((-1, -2)).sqrt().flatten() / self.unit


def solve(denoise: Denoise, x: Tensor, inpaint: Known, solver: str, eta: float, n: int) -> Tensor:
    times = PROCESS.grid(n - 1, K_MIN, K_MAX, to_zero=True)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        return Sampler(PROCESS, times, solver, eta)(denoise, x, g, inpaint=inpaint)


def figure(values: Tensor) -> list[float]:
    """The root mean square of values (B,), and its standard error over them."""
    squares = values.square()
    root = squares.mean().sqrt().item()
    return [root, (squares.std() / math.sqrt(len(values))).item() / (2 * root) if root else 0.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    source = SegmentSource.from_dataset(load_dataset("maze2d-umaze-v1", rows=options.rows), HORIZON)
    a = source.rows.shape[1] - source.observation_size
    columns = torch.cat([source.rows[:, source.observation_size :], source.rows[:, : source.observation_size]], 1)
    scale = columns.amin(0), columns.amax(0)
    network = TemporalUNet(columns.shape[1], [seed_generator(0)], width=WIDTH, multipliers=MULTIPLIERS)
    steps = train(network, source, scale, options.minutes)

    g = torch.Generator().manual_seed(2)
    dynamics = Dynamics(rows(source, scale, 512, g), a)
    real = rows(source, scale, options.batch, g)
    inpaint = known(real, a)
    denoise = PREDICTION.denoiser(network)
    x = PROCESS.sigma(PROCESS.time(torch.tensor(K_MAX))) * torch.randn(real.shape, generator=g)
    solution = solve(denoise, x, inpaint, "dpmpp2m", 0.0, 1000)
    found = {"real rows": {"dynamics": figure(dynamics(real))}}
    found["the ODE, 1,000 steps"] = {"dynamics": figure(dynamics(solution))}
    names = {("ddim", 0.0): "DDIM", ("ddim", 1.0): "DDPM", ("dpmpp2m", 0.0): "DPM-Solver++(2M)"}
    for solver, eta, n in RUNS:
        sample = solve(denoise, x, inpaint, solver, eta, n)
        entry = found[f"{names[solver, eta]}, {n:,} steps"] = {"dynamics": figure(dynamics(sample))}
        if eta == 0:
            entry["distance"] = figure((sample - solution).square().mean((-1, -2)).sqrt().flatten())

    head = ["solver", "distance to the ODE's solution", "dynamics error, real = 1"]
    cells = [
        [f"{v[k][0]:.3f} ± {v[k][1]:.3f}" if k in v else "" for k in ("distance", "dynamics")] for v in found.values()
    ]
    lines: Lines = [head, *([name, *row] for name, row in zip(found, cells, strict=True))]
    print_lines(lines, f"trajectories, {steps:,} steps of training", Console(), left=1)
    about = {"minutes": options.minutes, "steps": steps, "rows": options.rows, "batch": options.batch, "model_seed": 0}
    with atomic_path(RESULTS / "trajectory_solvers.json") as temporary:
        temporary.write_text(json.dumps({"about": about, "cpus": os.cpu_count(), "figures": found}, indent=1) + "\n")
    sentence = (
        f"`python benchmarks/trajectory_solvers.py --minutes {options.minutes:g} --batch {options.batch}`: {steps:,} "
        f"steps of training, one model (seed 0), {options.batch} segments of {HORIZON} rows, ± the standard error over "
        "segments, one CPU thread.\n\n"
    )
    fill(RESULTS / "trajectory_solvers.md", "table", sentence + markdown(lines))


if __name__ == "__main__":
    main()
