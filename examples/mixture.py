"""The diffusion core in one picture: train on a mixture in the plane, and plot what every part of it does.

    python examples/mixture.py [--out mixture.png] [--steps 3000] [--samples 10000] [--seed 0]

Read it from top to bottom; each function is one row of the picture (two rows for the solvers):

    1  forward processes    four ways from data to noise
    2  SDE and ODE          two ways back, with the same trained denoiser
    3  solvers              what 4, 8 and 16 calls of the network give
    4  consistency          one call, by a function that jumps to the end of its path
    5  reflow               one call, by making the paths straight

The figures are sliced W2 distances between samples and data. Two samples of the data themselves are not 0 but a floor
apart, which is shown where the data are: nothing can be told apart below it. It takes about 80 seconds on an idle core.
"""

import math
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor, nn

from diffrl.diffusion import (
    VE,
    VP,
    Boundaries,
    Denoise,
    GaussianMixture,
    Prediction,
    Process,
    RectifiedFlow,
    TrigFlow,
    consistency_loss,
    consistency_sample,
    couple,
    curvature,
    denoising_loss,
    lognormal_times,
    sample,
    uniform_times,
)
from diffrl.diffusion.diagnostics import sliced_w2
from diffrl.nets import MLP, Adam, TimeEmbedding, seed_generator
from diffrl.support.console import console, work
from diffrl.support.errors import UserError
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE, save


@dataclass(frozen=True)
class Options:
    """Train on a two-dimensional mixture and plot the diffusion core in one picture."""

    out: Path = Path("mixture.png")
    """Where the picture goes, a .png; that of the documentation is docs/mixture.png."""
    seed: int = 0
    """Of networks, data and noise."""
    steps: int = 3000
    """Steps of each of the four trainings."""
    samples: int = 10_000
    """Points in a panel, and in the distances."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".png":
            raise UserError(f"--out is {self.out}; expected a path ending in .png.")
        for name in ("steps", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least 1.")


# --- The data, a network, a training loop ----------------------------------------------------------------------------

ROWS = 512
"""Points in a training batch."""
K_MIN, K_MAX = 0.02, 20.0
"""Noise-to-signal ratios k = sigma/alpha between which we sample: next to no noise, and next to no data."""


def mixture() -> GaussianMixture:
    """Five Gaussians on a pentagon, of different widths. About .8 is its standard deviation."""
    angle = 2 * math.pi * (torch.arange(5) / 5 + 0.05)
    return GaussianMixture(
        1.1 * torch.stack([angle.cos(), angle.sin()], 1), torch.linspace(0.06, 0.22, 5), torch.ones(5)
    )


class Network(nn.Module):
    """An MLP of x and the time: x (1, B, 2), t () or (1, B) -> (1, B, 2). The leading axis is diffrl's seeds axis."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generators = [seed_generator(seed)]
        self.embed = TimeEmbedding(1, 16, generators)
        self.mlp = MLP((1,), 2 + 16, 2, generators, width=96)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """What it predicts is up to `Prediction`, which also scales x and t."""
        embedding = self.embed(4 * t).expand(1, x.shape[1], -1)
        out: Tensor = self.mlp(torch.cat([x, embedding], -1))
        return out


def train(title: str, network: nn.Module, steps: int, loss: Callable[[], Tensor]) -> None:
    """Every method below is this loop; they differ in their loss, one value a row, alone."""
    adam = Adam(network, learning_rate=3e-3, decay_steps=steps)
    with work(title, "steps") as progress:
        for step in range(steps):
            adam.step(loss().mean(-1))
            progress(step + 1, steps)


class Tutorial:
    """The data, the noise's generator, what is plotted on, and the distances measured on the way."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.data = mixture()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.truth = self.data.sample(options.samples, self.generator)
        self.start = self.noise(options.samples)  # the same noise in every panel
        self.figures: dict[str, float] = {}

    def noise(self, n: int) -> Tensor:
        """Standard normal (1, n, 2)."""
        return torch.randn(1, n, 2, generator=self.generator)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Sliced W2 over 64 directions."""
        return sliced_w2(x, y, 64, self.generator)


# --- 1. Forward processes: x_t = alpha_t x_0 + sigma_t e -------------------------------------------------------------


def forward_processes(tutorial: Tutorial, axes: Sequence[Axes]) -> None:
    """A process is how fast the data fade (alpha) and the noise grows (sigma); all else follows from the two.

    Shaded: the density of x_t's first coordinate, known exactly for a mixture. Lines: ten points on their way to noise.
    """
    processes: list[tuple[str, Process, float]] = [
        ("variance preserving", VP(), K_MAX),
        ("variance exploding", VE(), 3.0),
        ("rectified flow", RectifiedFlow(), 1e3),
        ("TrigFlow", TrigFlow(), 1e3),
    ]
    x_0, e = tutorial.truth[:10], tutorial.start[0, :10]
    for ax, (name, process, k_max) in zip(axes, processes, strict=True):
        times = torch.linspace(1e-3, 1, 200) * process.time(torch.tensor(k_max))
        plot_density(ax, tutorial.data, process, times, times, 3.2)
        paths = torch.stack([process.perturb(x_0, t, e) for t in times])
        ax.plot(times, paths[..., 0], color=ORANGE, linewidth=0.7, alpha=0.8)
        ax.set(title=name, xlabel="t", xlim=(0, times[-1]), ylim=(-3.2, 3.2))


# --- 2. Two ways back: SDE and ODE -----------------------------------------------------------------------------------

PROCESS = VP()


def train_denoiser(tutorial: Tutorial) -> tuple[nn.Module, Prediction]:
    """D(x, t) = E[x_0 | x_t = x], by denoising score matching: guess the data in x_t, at noise levels of all sizes.

    What the network itself answers is a mixture of data and noise that is well scaled at every level (EDM's).
    """
    network, prediction = Network(tutorial.options.seed), Prediction("edm", PROCESS, data_std=0.8)

    def loss() -> Tensor:
        x_0 = tutorial.data.sample(ROWS, tutorial.generator)[None]
        t = lognormal_times(PROCESS, (1, ROWS), tutorial.generator, mean=-0.7, std=1.5)
        return denoising_loss(prediction, network, x_0, t, tutorial.noise(ROWS))

    train("denoiser", network, tutorial.options.steps, loss)
    return network, prediction


def sde_and_ode(tutorial: Tutorial, denoise: Denoise, axes: Sequence[Axes]) -> None:
    """From the same noise, the ODE draws smooth paths, the SDE rough ones (eta = 1). Their marginals are the same."""
    times = PROCESS.grid(100, K_MIN, K_MAX)
    x_T = PROCESS.sigma(times[0]) * tutorial.start[:, :12]
    log_k = PROCESS.ratio(times).log()
    for i, (name, eta, colour) in enumerate([("ODE", 0.0, BLUE), ("SDE", 1.0, ORANGE)]):
        chain = sample(PROCESS, denoise, x_T, times, eta=eta, generator=tutorial.generator, return_chain=True)[:, 0]
        plot_paths(axes[i], tutorial.data, chain if eta == 0 else chain[:, :3], colour)  # three fill the plane
        axes[i].set_title(f"{name}: paths in the plane")
        plot_density(axes[2 + i], tutorial.data, PROCESS, times, log_k, 2.6)
        axes[2 + i].plot(log_k, chain[..., 0], color=colour, linewidth=0.7)
        axes[2 + i].set(title=f"{name}: first coordinate", xlabel="log k, from noise to data")
        axes[2 + i].set(xlim=(log_k[0], log_k[-1]), ylim=(-2.6, 2.6))


# --- 3. Solvers: the same ODE or SDE in few steps --------------------------------------------------------------------


def solvers(tutorial: Tutorial, denoise: Denoise, axes: Sequence[Sequence[Axes]]) -> None:
    """Each step is one call of the network. DDIM is of first order, DPM-Solver++(2M) of second: it remembers a step."""
    kinds = {"DDIM": ("ddim", 0.0, BLUE), "DPM-Solver++": ("dpmpp2m", 0.0, GREEN), "SDE (DDPM)": ("ddim", 1.0, ORANGE)}
    counts = [2, 4, 8, 16, 32, 64]
    for row, (name, (solver, eta, colour)) in enumerate(kinds.items()):
        distances = []
        for n in counts:
            times = PROCESS.grid(n, K_MIN, K_MAX)
            x_T = PROCESS.sigma(times[0]) * tutorial.start
            x = sample(PROCESS, denoise, x_T, times, solver, eta, tutorial.generator)[0]
            distances.append(tutorial.distance(x, tutorial.truth).item())
            if row < 2 and n in (4, 8, 16):
                panel(tutorial, axes[row][(4, 8, 16).index(n)], f"{name}, {n} steps", x, colour)
            elif n in (4, 8, 16):
                tutorial.figures[f"{name}, {n} steps"] = distances[-1]
        axes[1][3].loglog(counts, distances, color=colour, marker="o", markersize=3, label=name)
    floors = [tutorial.distance(*(tutorial.data.sample(len(x), tutorial.generator) for _ in "ab")) for _ in range(10)]
    mean, most = torch.stack(floors).mean().item(), torch.stack(floors).max().item()
    tutorial.figures |= {"floor: data against data": mean, "floor, worst of ten": most}
    plot_samples(axes[0][3], tutorial.data, tutorial.truth, GREY, f"floor {mean:.3f} (worst {most:.3f})")
    axes[0][3].set_title("data")
    axes[1][3].axhspan(mean / 2, most, color=GREY, alpha=0.2, linewidth=0, label="floor")
    axes[1][3].set(title="sliced W2 over network calls", xticks=counts, xticklabels=map(str, counts))
    axes[1][3].set(yticks=[0.03, 0.1, 0.3], yticklabels=["0.03", "0.1", "0.3"], ylim=(mean / 2, 1))
    axes[1][3].minorticks_off()
    axes[1][3].legend(frameon=False, fontsize=7)


# --- 4. Consistency: jump to the end of the path ---------------------------------------------------------------------


def train_consistency(tutorial: Tutorial, teacher: nn.Module, prediction: Prediction) -> nn.Module:
    """f(x_t, t) = f(x_r, r), the next point of the same path: a Heun step of the denoiser away (distillation).

    f starts as the denoiser itself; that f(x, 0) = x, from which all else is fixed, is built into the prediction.
    """
    network, boundaries = deepcopy(teacher), Boundaries(PROCESS, K_MIN, K_MAX)
    f, D = prediction.denoiser(network), prediction.denoiser(teacher)

    def loss() -> Tensor:
        x_0 = tutorial.data.sample(ROWS, tutorial.generator)[None]
        t, r = boundaries.draw_times(torch.rand(1, ROWS, generator=tutorial.generator), n=24)
        e = tutorial.noise(ROWS)
        return consistency_loss(PROCESS, f, x_0, t, r, e, teacher=D, solver="heun", weighting="gap", metric="huber")

    train("consistency", network, tutorial.options.steps, loss)
    return network


def consistency(tutorial: Tutorial, denoise: Denoise, f: Denoise, axes: Sequence[Axes]) -> None:
    """In one step the denoiser answers with the mean of all data; the consistency function with a point of it."""
    for ax, name, function, ratios in (
        (axes[0], "denoiser, 1 step", denoise, [K_MAX]),
        (axes[1], "consistency, 1 step", f, [K_MAX]),
        (axes[2], "consistency, 2 steps", f, [K_MAX, 0.8]),
    ):
        times = PROCESS.time(torch.tensor(ratios))
        x_T = PROCESS.sigma(times[0]) * tutorial.start
        x = consistency_sample(function, PROCESS, x_T, times, tutorial.generator)[0]
        panel(tutorial, ax, name, x, BLUE if function is denoise else GREEN)
    times = PROCESS.grid(100, K_MIN, K_MAX)
    x_T = PROCESS.sigma(times[0]) * tutorial.start[:, :8]
    chain = sample(PROCESS, denoise, x_T, times, return_chain=True)
    log_k = PROCESS.ratio(times).log()
    for function, colour, label in ((denoise, BLUE, "denoiser"), (f, GREEN, "consistency")):
        answers = torch.stack([function(x, t) for x, t in zip(chain, times, strict=True)])[:, 0, :, 0]
        lines = axes[3].plot(log_k, answers, color=colour, linewidth=0.9)
        lines[0].set_label(label)
    axes[3].set(title="their answers along ODE paths", xlabel="log k, from noise to data", xlim=(log_k[0], log_k[-1]))
    axes[3].set(ylim=(-2.0, 2.4), yticks=[-1, 0, 1])
    axes[3].legend(frameon=False, fontsize=7, ncols=2, loc="upper center", handlelength=1, columnspacing=1)


# --- 5. Reflow: make the paths straight ------------------------------------------------------------------------------

FLOW = RectifiedFlow()
VELOCITY = Prediction("velocity", FLOW)


def train_flow(tutorial: Tutorial) -> nn.Module:
    """1-RF: the velocity E[x_1 - x_0 | x_t] on straight lines between data and independent noise.

    These lines cross, so the flow's own paths bend. The loss is the same as the denoiser's, for another prediction.
    """
    network = Network(tutorial.options.seed)

    def loss() -> Tensor:
        x_0 = tutorial.data.sample(ROWS, tutorial.generator)[None]
        t = uniform_times((1, ROWS), tutorial.generator)
        return denoising_loss(VELOCITY, network, x_0, t, tutorial.noise(ROWS))

    train("rectified flow", network, tutorial.options.steps, loss)
    return network


def train_reflow(tutorial: Tutorial, first: nn.Module) -> nn.Module:
    """2-RF: the same on pairs of noise and where 1-RF carries it. Their lines hardly cross: the flow follows them."""
    network = deepcopy(first)
    noise = tutorial.noise(4 * tutorial.options.samples)
    x_0, x_1 = couple(FLOW, VELOCITY.denoiser(first), noise, torch.linspace(1, 0, 33), "heun")

    def loss() -> Tensor:
        i = torch.randint(x_0.shape[1], (ROWS,), generator=tutorial.generator)
        t = uniform_times((1, ROWS), tutorial.generator)
        return denoising_loss(VELOCITY, network, x_0[:, i], t, noise=x_1[:, i])

    train("reflow", network, tutorial.options.steps, loss)
    return network


def reflow(tutorial: Tutorial, networks: Sequence[nn.Module], axes: Sequence[Axes]) -> None:
    """Along a straight path one Euler step is exact."""
    times = torch.linspace(1, 0, 33)
    for i, (network, colour) in enumerate(zip(networks, (BLUE, GREEN), strict=True)):
        v = VELOCITY.denoiser(network)
        chain = sample(FLOW, v, tutorial.start, times, "heun", return_chain=True)
        bend = curvature(chain, times).mean().item()
        tutorial.figures[f"{i + 1}-rectified flow, curvature"] = bend
        plot_paths(axes[2 * i], tutorial.data, chain[:, 0, :30], colour)
        axes[2 * i].set_title(f"{i + 1}-rectified flow: paths")
        note(axes[2 * i], f"curvature {bend:.2g}")
        x = sample(FLOW, v, tutorial.start, times[[0, -1]])[0]
        panel(tutorial, axes[2 * i + 1], f"{i + 1}-rectified flow, 1 step", x, colour)


# --- Drawing ---------------------------------------------------------------------------------------------------------


def plot_density(
    ax: Axes, data: GaussianMixture, process: Process, times: Tensor, abscissa: Tensor, reach: float
) -> None:
    """The density of x_t's first coordinate, from its largest at each time (dark) to 0 (white)."""
    first = GaussianMixture(data.means[:, :1], data.stds, data.weights)
    x = torch.linspace(-reach, reach, 160)
    density = torch.stack([first.log_prob(process, x[:, None], t).exp() for t in times], 1)
    shades = LinearSegmentedColormap.from_list("shades", ["white", "#9fb9d8"])
    ax.pcolormesh(abscissa, x, (density / density.amax(0)).sqrt(), cmap=shades, rasterized=True)
    ax.set_yticks([-2, 0, 2])


def plot_paths(ax: Axes, data: GaussianMixture, chain: Tensor, colour: str) -> None:
    """Paths (T + 1, n, 2) in the plane, from noise (open dots) to data (full ones)."""
    plane(ax, data)
    ax.plot(chain[..., 0], chain[..., 1], color=colour, linewidth=0.7, alpha=0.8)
    ax.plot(chain[0, :, 0], chain[0, :, 1], "o", markersize=3, markerfacecolor="white", color=GREY, markeredgewidth=0.7)
    ax.plot(chain[-1, :, 0], chain[-1, :, 1], "o", markersize=3, color="black", markeredgewidth=0)


def panel(tutorial: Tutorial, ax: Axes, name: str, x: Tensor, colour: str) -> None:
    """Samples (n, 2), and how far they are from the data."""
    distance = tutorial.figures[name] = tutorial.distance(x, tutorial.truth).item()
    plot_samples(ax, tutorial.data, x, colour, f"W2 {distance:.3f}")
    ax.set_title(name)


def plot_samples(ax: Axes, data: GaussianMixture, x: Tensor, colour: str, text: str) -> None:
    """2,500 of the samples (n, 2), and a line of text below them."""
    plane(ax, data)
    ax.scatter(x[:2500, 0], x[:2500, 1], s=1.2, color=colour, alpha=0.45, linewidths=0)
    note(ax, text)


def note(ax: Axes, text: str) -> None:
    """A line at the bottom of a panel."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    ax.text(0.5, 0.03, text, transform=ax.transAxes, ha="center", fontsize=7.5, zorder=5, bbox=white)


def plane(ax: Axes, data: GaussianMixture) -> None:
    """Axes of the plane, a circle at two deviations around each of the Gaussians."""
    for mean, std in zip(data.means.tolist(), data.stds.tolist(), strict=True):
        ax.add_patch(Circle((mean[0], mean[1]), 2 * std, fill=False, color=GREY, linewidth=0.6, zorder=2))
    ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])


def canvas() -> tuple[Figure, list[list[Axes]]]:
    """Six rows of four axes, with the rows' names at their left."""
    figure = Figure(figsize=(8.4, 12.8), layout="constrained")
    axes = figure.subplots(6, 4).tolist()
    names = (
        "forward processes",
        "SDE and ODE",
        "solvers, first order",
        "solvers, second order",
        "consistency",
        "reflow",
    )
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name, fontweight="bold", fontsize=8.5)
        for ax in row:
            ax.tick_params(labelsize=7, length=2)
            ax.xaxis.label.set_size(7)
            ax.spines[:].set_color("#c8c8c8")
    return figure, axes


def main(words: Sequence[str] | None = None) -> None:
    """Train, plot row by row, print the figures."""
    options = tyro.cli(Options, args=words)
    torch.set_num_threads(1)
    matplotlib.rcParams["axes.titlesize"] = 8
    tutorial = Tutorial(options)
    figure, axes = canvas()

    forward_processes(tutorial, axes[0])
    denoiser, prediction = train_denoiser(tutorial)
    consistent = train_consistency(tutorial, denoiser, prediction)
    first = train_flow(tutorial)
    second = train_reflow(tutorial, first)
    with torch.no_grad():
        D, f = prediction.denoiser(denoiser), prediction.denoiser(consistent)
        sde_and_ode(tutorial, D, axes[1])
        solvers(tutorial, D, axes[2:4])
        consistency(tutorial, D, f, axes[4])
        reflow(tutorial, (first, second), axes[5])

    for name, value in tutorial.figures.items():
        print(f"{name:35} {value:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"picture: {save(figure, options.out, colours=128)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
