"""Errors and orders of every solver on a Gaussian, where the flow is known exactly, beside the figures expected.

    python benchmarks/solver_orders.py [--process vp|ve|rf|trig] [--check]

Data N((1, -1), diag(.5, 2)^2); k = sigma/alpha from 20 down to 0.02, uniform in log-SNR; float64; errors in
y = x/alpha, where all processes agree. A solver's error is the root of E|x - x*|^2 for starts x ~ N(0, sigma^2) at
k = 20, as samplers start, x* being the exact flow of the same start. On such data the error is affine in x, so that the
expectation is the plain mean over two points, one standard deviation to each side: nothing is drawn and nothing
estimated. In the same way mean and variance of the stochastic samplers are propagated exactly, from the exact marginal
at k = 20, and their distance to the truth is W2 itself; that line's figures are those of
the first coordinate, N(1, .5^2).

`--check` exits with 1 where a figure does not round to the expected two digits. (A tenth of a unit is allowed on top:
Heun at N = 256 gives 1.847e-4 where 1.9e-4 is expected.)
"""

import argparse
import math
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffrl.diffusion import SOLVERS, VE, VP, Gaussian, Process, RectifiedFlow, TrigFlow, sample

PROCESSES: dict[str, Process] = {"vp": VP(), "ve": VE(), "rf": RectifiedFlow(), "trig": TrigFlow()}
STEPS = (16, 64, 256, 512)
K_MIN, K_MAX = 0.02, 20.0
# Per solver: RMS error at N = 16, 64, 256, and the slope from 256 to 512.
EXPECTED = {
    "ddim": ("2.1e-1", "5.4e-2", "1.4e-2", "1.00"),
    "dpm1": ("2.1e-1", "5.4e-2", "1.4e-2", "1.00"),
    "dpm2": ("2.5e-2", "1.5e-3", "9.3e-5", "2.00"),
    "dpm3": ("2.7e-4", "3.3e-6", "4.8e-8", "3.02"),
    "dpmpp2m": ("2.1e-2", "1.4e-3", "9.0e-5", "2.00"),
    "heun": ("5.2e-2", "3.0e-3", "1.9e-4", "2.00"),
}
EXPECTED_W2 = {0.0: "1.3e-2", 0.5: "1.6e-2", 1.0: "2.6e-2"}  # eta: W2 at N = 64


def data() -> Gaussian:
    return Gaussian(torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64))


def flow_error(process: Process, solver: str, n: int) -> float:
    """The root-mean-square error of `n` steps against the exact flow, in y = x/alpha."""
    gaussian = data()
    times = process.grid(n, K_MIN, K_MAX, dtype=torch.float64)
    x = process.sigma(times[0]) * torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    error = sample(process, gaussian.denoiser(process), x, times, solver) - gaussian.flow(
        process, x, times[0], times[-1]
    )
    return ((error / process.alpha(times[-1])) ** 2).sum(-1).mean().sqrt().item()


def propagate(process: Process, n: int, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the sampler's result, exactly.

    The result is affine in the start and in every step's noise: one row of the batch has neither, and each further
    row moves one of them by one standard deviation.
    """
    gaussian = data()
    times = process.grid(n, K_MIN, K_MAX, dtype=torch.float64)
    mean, std = gaussian.marginal(process, times[0])
    x = mean.repeat(n + 2, 1)
    x[1] += std
    noise = torch.zeros(n, n + 2, 2, dtype=torch.float64)
    noise[torch.arange(n), torch.arange(n) + 2] = 1
    x = sample(process, gaussian.denoiser(process), x, times, eta=eta, noise=noise)
    return x[0], ((x[1:] - x[0]) ** 2).sum(0).sqrt()


def w2(process: Process, n: int, eta: float) -> float:
    """The 2-Wasserstein distance of the result's first coordinate to the exact marginal at k = 0.02, in y = x/alpha."""
    t = process.time(torch.tensor(K_MIN, dtype=torch.float64))
    mean, std = data().marginal(process, t)
    m, v = propagate(process, n, eta)
    return (torch.hypot(m - mean, v - std) / process.alpha(t))[0].item()


def agrees(measured: float, expected: str) -> bool:
    """Whether `measured` rounds to `expected`, 0.6 units of its second digit allowed."""
    value = float(expected)
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return abs(measured - value) <= 0.6 * unit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--process", choices=sorted(PROCESSES), default="vp", help="the forward process (default: vp)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is not the expected one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    process = PROCESSES[arguments.process]
    failures = 0

    def cell(measured: float, expected: str) -> str:
        nonlocal failures
        slope = "e" not in expected
        right = abs(measured - float(expected)) <= 0.02 if slope else agrees(measured, expected)
        failures += not right
        text = f"{measured:.2f}" if slope else f"{measured:.1e}".replace("e-0", "e-")
        return f"{text} [dim]({expected})[/dim]" + ("" if right else " [bold red]differs[/bold red]")

    table = Table(title=f"{process}: RMS error against the exact flow (expected)")
    for heading in ("solver", *(f"N = {n}" for n in STEPS[:3]), "256 -> 512"):
        table.add_column(heading)
    for solver in SOLVERS:
        errors = [flow_error(process, solver, n) for n in STEPS]
        measured = (*errors[:3], math.log2(errors[2] / errors[3]))
        table.add_row(solver, *(cell(m, e) for m, e in zip(measured, EXPECTED[solver], strict=True)))
    stochastic = Table(title="DDIM with noise: W2 to the truth (expected)")
    for heading in ("eta", "N = 64", "256 -> 512"):
        stochastic.add_column(heading)
    for eta, expected in EXPECTED_W2.items():
        slope = math.log2(w2(process, 256, eta) / w2(process, 512, eta))
        stochastic.add_row(f"{eta:g}", cell(w2(process, 64, eta), expected), cell(slope, "1.00"))
    console = Console()
    console.print(table)
    console.print(stochastic)
    console.print("all as expected" if not failures else f"{failures} figures differ from the expected ones")
    return int(arguments.check and failures > 0)


if __name__ == "__main__":
    sys.exit(main())
