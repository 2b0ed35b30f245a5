"""Diffusion-QL's bandit: why the policy should be able to have more than one mode (arXiv 2208.06193, figure 1).

    python examples/bandit.py [--out bandit.png] [--steps 1000] [--samples 1000] [--seed 0]

There is no state; actions lie in the plane, the data's in four narrow clouds, equally often, one of which earns most.
Above, four kinds of policies clone the data; below, the same four are weighted by a Q learnt from the rewards:

    MLP             one action a state. Cloning, it answers with the mean of the clouds, where there are no data;
                    with Q (TD3+BC) it is torn between that mean and the good cloud
    diffusion       keeps all four clouds; with Q (Diffusion-QL) moves to the good one
    consistency     the same in two steps of sampling (Consistency-AC)
    flow            clones in ten steps; a one-step policy distilled from it climbs Q (FQL)

The figures are the shares of actions in the good cloud, and in none. Agents act by one candidate, so that the policy
itself is seen and not the critics' choice among many. It takes one to two minutes on an idle core.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from agents import BC, FQL, TD3BC, ConsistencyAC, DiffusionBC, DiffusionQL
from agents.base import Agent
from agents.base_config import AgentConfig
from agents.diffusion_ql import DiffusionQLAgent
from diffrl.data.transitions import Batch
from diffrl.support.console import console, work
from diffrl.support.errors import UserError
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE, save


@dataclass(frozen=True)
class Options:
    """Behaviour cloning against Q-weighting on a two-dimensional bandit, by four kinds of policies."""

    out: Path = Path("bandit.png")
    """Where the picture goes, a .png; that of the documentation is docs/bandit.png."""
    seed: int = 0
    """Of networks, data and noise."""
    steps: int = 1000
    """Training steps of each agent."""
    samples: int = 1000
    """Actions sampled from each policy."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".png":
            raise UserError(f"--out is {self.out}; expected a path ending in .png.")
        for name in ("steps", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least 1.")


# --- The bandit ------------------------------------------------------------------------------------------------------

CENTRES = torch.tensor([[-0.8, 0.8], [0.8, 0.8], [0.8, -0.8], [-0.8, -0.8]])
STD = 0.05
REWARDS = torch.tensor([0.5, 2.0, 1.0, 0.0])
"""Mean reward of each cloud; that of a single action is noisier than the clouds are apart."""
REWARD_STD = 0.5
GOOD = int(REWARDS.argmax())
NEAR = 4 * STD
"""An action this far from a centre is still of its cloud."""


def batches(generator: torch.Generator, rows: int, n: int = 10_000) -> Iterator[Batch]:
    """Batches (1, rows, ...) of a data set of n actions, without end. Every episode is one step long."""
    labels = torch.randint(len(CENTRES), (n,), generator=generator)
    actions = CENTRES[labels] + STD * torch.randn(n, 2, generator=generator)
    rewards = REWARDS[labels] + REWARD_STD * torch.randn(n, generator=generator)
    nothing, zeros = torch.zeros(1, rows, 1), torch.zeros(1, rows)
    while True:
        i = torch.randint(n, (1, rows), generator=generator)
        yield Batch(
            observations=nothing,
            actions=actions[i],
            rewards=rewards[i],
            next_observations=nothing,
            terminals=torch.ones(1, rows),
            episodes=zeros,
            steps=zeros,
        )


def shares(actions: Tensor) -> tuple[float, float]:
    """The shares of actions (n, 2) in the good cloud and in none."""
    near = torch.cdist(actions, CENTRES) < NEAR
    return near[:, GOOD].float().mean().item(), (~near.any(1)).float().mean().item()


# --- The agents ------------------------------------------------------------------------------------------------------


def configurations(steps: int) -> dict[str, AgentConfig]:
    """By name; all of one size, and as quick to learn as a problem this small allows.

    Layer normalisation keeps the critics from promising ever more beyond the clouds. The weights of Q are no match for
    each other: each stands beside a cloning loss of its own scale.
    """
    size: dict[str, Any] = {"width": 64, "layers": 3}
    weighted: dict[str, Any] = {"actor_lr": 1e-3, "critic_lr": 3e-3, "critic_layer_norm": True}
    consistency = ConsistencyAC(
        **size, **weighted, act_candidates=1, form="improved", boundaries_end=41, boundaries_steps=steps, q_weight=0.2
    )
    return {
        "MLP": BC(**size, learning_rate=1e-3),
        "diffusion": DiffusionBC(**size, learning_rate=1e-3, denoising_steps=10),
        "consistency": replace(consistency, q_weight=0.0),
        "TD3+BC": TD3BC(**size, **weighted, normalise_observations=False),
        "Diffusion-QL": DiffusionQL(**size, **weighted, act_candidates=1),
        "Consistency-AC": consistency,
        "FQL": FQL(**size, learning_rate=1e-3, alpha=0.3, normalise_q=True),
    }


def train(name: str, config: AgentConfig, options: Options) -> Agent:
    """What `diffrl train` does, on batches of our own."""
    agent = config.build(observation_size=1, action_size=2, seeds=(options.seed,))
    generator = torch.Generator().manual_seed(options.seed)
    data = batches(generator, config.batch_size)
    steps = options.steps * (3 if isinstance(config, DiffusionBC) else 1)  # without critics they are short
    with work(name, "steps") as progress:
        for step in range(steps):
            agent.update(next(data), generator, phase=step % agent.period)
            progress(step + 1, steps)
    return agent


# --- Drawing ---------------------------------------------------------------------------------------------------------


def plot_plane(ax: Axes, title: str) -> None:
    """The clouds as circles, the good one's bold."""
    for i, (x, y) in enumerate(CENTRES.tolist()):
        colour, width = (GREEN, 1.6) if i == GOOD else (GREY, 0.8)
        ax.add_patch(Circle((x, y), NEAR, fill=False, color=colour, linewidth=width))
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    ax.spines[:].set_color("#c8c8c8")


def plot_policy(ax: Axes, name: str, actions: Tensor, colour: str) -> None:
    """Actions (n, 2), and their shares, which are printed too."""
    good, off = shares(actions)
    print(f"{name:26} good {good:.3f}   off {off:.3f}")
    plot_plane(ax, f"{name}\ngood {good:.0%}, off {off:.0%}")
    ax.scatter(actions[:, 0], actions[:, 1], s=5, color=colour, alpha=0.6, linewidths=0)


def plot_data(ax: Axes, actions: Tensor) -> None:
    """The data's actions, and what each cloud earns."""
    plot_plane(ax, "data\nmean rewards")
    ax.scatter(actions[:, 0], actions[:, 1], s=5, color=GREY, alpha=0.6, linewidths=0)
    for (x, y), reward in zip(CENTRES.tolist(), REWARDS.tolist(), strict=True):
        ax.text(0.6 * x, 0.55 * y, f"{reward:g}", ha="center", va="center", fontsize=9)


@torch.no_grad()
def plot_q(ax: Axes, agent: DiffusionQLAgent) -> None:
    """The smaller of the two critics over the plane: right at the clouds, a guess elsewhere."""
    plot_plane(ax, "the Q that is learnt\n(Diffusion-QL's)")
    line = torch.linspace(-1.15, 1.15, 93)
    points = torch.cartesian_prod(line, line)[None]
    q = agent.critic(torch.zeros(1, points.shape[1], 1), points)[0].amin(0).reshape(93, 93).T
    ax.pcolormesh(line, line, q, cmap="Blues", zorder=0)


def main(words: Sequence[str] | None = None) -> None:
    """Train seven agents, plot eight policies, print their shares."""
    options = tyro.cli(Options, args=words)
    torch.set_num_threads(1)
    agents = {name: train(name, c, options) for name, c in configurations(options.steps).items()}
    generator = torch.Generator().manual_seed(options.seed + 1)
    states = torch.zeros(1, options.samples, 1)

    def act(name: str) -> Tensor:
        return agents[name].act(states, generator)[0]

    figure = Figure(figsize=(10, 4.7), layout="constrained")
    axes = figure.subplots(2, 5)
    plot_data(axes[0, 0], next(batches(generator, options.samples)).actions[0])
    ql = agents["Diffusion-QL"]
    assert isinstance(ql, DiffusionQLAgent)
    plot_q(axes[1, 0], ql)
    with torch.no_grad():
        flow = agents["FQL"].policy  # never sees Q: it is what the one-step policy that acts is distilled from
        cloned = flow.sample(states, flow.sampling_noise(states, generator))[0]
    above = {"MLP": act("MLP"), "diffusion": act("diffusion"), "consistency": act("consistency"), "flow": cloned}
    for ax, (name, actions) in zip(axes[0, 1:], above.items(), strict=True):
        plot_policy(ax, f"cloning: {name}", actions, ORANGE)
    for ax, name in zip(axes[1, 1:], ("TD3+BC", "Diffusion-QL", "Consistency-AC", "FQL"), strict=True):
        plot_policy(ax, f"with Q: {name}", act(name), BLUE)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"picture: {save(figure, options.out)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
