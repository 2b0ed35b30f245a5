"""SynthER measured: do agents learn as well from synthetic data, what does generating cost, what do fewer calls lose.

    python benchmarks/synther.py                              all parts, what is there already is not done again
    python benchmarks/synther.py --parts agents --datasets hopper-small --agent-steps 50000
    python benchmarks/synther.py --parts solvers speed        quick, once there is a model
    python benchmarks/synther.py --parts agents --datasets hopper-small --critics stabilised --models 0 1 2

Parts, each goes on where it was cut:
  data     the model of each data set, synthetic rows of it, and a file of both (real rows first)
  agents   TD3+BC and IQL, CORL's settings, on real, synthetic, and both; 3 seeds in one stack; last evaluation
  solvers  sliced W2 to held-out rows and dynamics error by solver and number of network calls
  speed    rows a second against a plain implementation of the paper's sampler, both 128 Heun steps with churn

Data: hopper and hopper-small are ../shared's hopper medium-replay recording and one tenth of its transitions, drawn at
random (as the paper draws its subsets); maze2d is maze2d-umaze-v1. The network is 256 wide (published: 1024 or 2048)
and trained for --model-steps steps (published: 100,000) on batches of 256 (published for maze2d's million rows: 1,024):
what two CPU cores have time for.

--models: the seeds of several SynthER models, each with rows of its own. With one, ± is the standard error over the
agents' seeds, and the model's luck is not in it. With several, a model's score is the mean over the agents' seeds, and
± is the standard error over the models; real data are one, so their ± stays that over the agents' seeds.
--critics stabilised: what ended the collapses of the small Diffusion-QL on maze2d (benchmarks/results/stability.md), as
far as the two agents have the fields: five critics with layer normalisation and their minimum in every target, which
TD3+BC's actor climbs too, the target's rate .01, width and batch 128. All else is CORL's.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from asked import asked
from rich.console import Console
from synther_tables import VARIANTS, Variant, draw, identity, models_table, put_on_page, tables_of
from tables import markdown, print_lines

import diffrl
from agents import TD3BC, AgentConfig
from diffrl.augment.columns import as_columns, as_dataset
from diffrl.augment.fidelity.comparison import fidelity
from diffrl.augment.synther.augmenter import hold_out, load_model, synther
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.augment.synther.model import TransitionDiffusion
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.seeds import generator_at
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.logs import read_scores
from envs.datasets import load_dataset
from envs.dynamics import dynamics_for

RECORDING = Path(__file__).parents[1].parent / "shared" / "data" / "rollouts" / "hopper_medium-replay-v4.hdf5"
Name = Literal["hopper-small", "hopper", "maze2d"]
Part = Literal["data", "agents", "solvers", "speed"]
Critics = Literal["corl", "stabilised"]
CONFIGS = {"hopper-small": "hopper-medium-v2", "hopper": "hopper-medium-v2", "maze2d": "maze2d-umaze-v1"}
ENVS = {"hopper-small": "Hopper-v4", "hopper": "Hopper-v4", "maze2d": "maze2d-umaze-v1"}
CURVE: tuple[tuple[str, int, float], ...] = (
    ("heun", 128, 80.0),
    ("heun", 128, 0.0),
    ("heun", 32, 80.0),
    ("heun", 32, 0.0),
    ("heun", 16, 0.0),
    ("heun", 8, 0.0),
    ("dpmpp2m", 255, 0.0),
    ("dpmpp2m", 64, 0.0),
    ("dpmpp2m", 32, 0.0),
    ("dpmpp2m", 16, 0.0),
    ("dpmpp2m", 8, 0.0),
    ("ddim", 255, 0.0),
    ("ddim", 64, 0.0),
    ("ddim", 32, 0.0),
    ("ddim", 16, 0.0),
)
"""Solver, steps, S_churn."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Part, ...] = ("data", "agents", "solvers", "speed")
    """Which parts."""
    datasets: tuple[Name, ...] = ("hopper-small", "hopper", "maze2d")
    """On which data."""
    agents: tuple[str, ...] = ("td3_bc", "iql")
    """Which agents."""
    variants: tuple[Variant, ...] = VARIANTS
    """On which data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The agents' training seeds."""
    models: tuple[int, ...] = (0,)
    """The seeds of SynthER's models, each with rows of its own."""
    critics: Critics = "corl"
    """The agents' settings: CORL's, or with the critics that keep what was learned."""
    width: int = 256
    """The model's width."""
    learning_rate: float = 1e-3
    """The model's learning rate at the beginning (published, for wide ones: 3e-4)."""
    model_steps: int = 30_000
    """The model's training steps."""
    samples: int = 300_000
    """Synthetic rows."""
    agent_steps: int = 20_000
    """The agents' training steps."""
    eval_every: int = 4_000
    """Training steps between evaluations."""
    episodes: int = 20
    """Episodes a seed, in each evaluation."""
    curve_rows: int = 10_000
    """Rows for each point of the solvers' curve."""
    device: str = "cpu"
    """Of the models, and of the agents."""
    recording: Path = RECORDING
    """Hopper's."""
    out: Path = Path("runs/synther")
    """Folder of everything."""
    page: Path | None = None
    """Also put the table over models between the markers of its name in this page, and its numbers beside it."""


def real_file(options: Options, name: Name) -> str:
    """The real data: by name or path, as every command takes them."""
    if name == "maze2d":
        return "maze2d-umaze-v1"
    if not options.recording.is_file():
        raise UserError(f"{options.recording} is not here: leave out hopper (--datasets maze2d).")
    if name == "hopper":
        return str(options.recording)
    path = options.out / f"{name}.hdf5"
    if not path.exists():
        dataset = d4rl.read(options.recording)
        columns, returns = dataset.with_successors().columns(), dataset.episode_returns()
        n = len(columns["rewards"])
        chosen = np.sort(np.random.default_rng(0).choice(n, n // 10, replace=False))
        columns = {key: values[chosen] for key, values in columns.items()}
        columns["timeouts"] = ~columns["terminals"]  # rows without their neighbours: each an episode of its own
        about = {"return_range": np.array([returns.min(), returns.max()]), **dataset.stand_ins()}
        d4rl.write_blocks(path, [columns], about)
    return str(path)


def suffix(model: int) -> str:
    """What the names of a model's files end with: nothing for the first."""
    return f"-m{model}" if model else ""


def files(options: Options, name: Name, model: int = 0) -> dict[str, str]:
    """The three data sets, made where they are missing. model: the seed of SynthER's model and its rows."""
    real = real_file(options, name)
    synthetic, both = (options.out / f"{name}-{variant}{suffix(model)}.hdf5" for variant in ("synthetic", "both"))
    if not synthetic.exists():
        synther(
            real,
            synthetic,
            env=ENVS[name],
            samples=options.samples,
            seed=model,
            model=SynthERConfig(
                steps=options.model_steps,
                width=options.width,
                batch_size=256 if name == "maze2d" else None,
                learning_rate=options.learning_rate,
            ),
            device=options.device,
        )
    if not both.exists():
        made = d4rl.read(synthetic)
        d4rl.write_blocks(both, [load_dataset(real).with_successors().columns(), made.columns()], made.metadata)
    return {"real": real, "synthetic": str(synthetic), "both": str(both)}


@dataclass(frozen=True)
class Cell:
    """One training run: a stack of all seeds."""

    agent: str
    variant: Variant
    model: int | None
    """None for real data, which are no model's."""

    def folder(self, options: Options, name: Name) -> Path:
        """Of the run."""
        critics = "" if options.critics == "corl" else f"-{options.critics}"
        return options.out / "agents" / f"{name}-{self.variant}-{self.agent}{critics}{suffix(self.model or 0)}"


def cells_of(options: Options) -> list[Cell]:
    """All runs, an agent's next to each other; real data come once."""
    return [
        Cell(agent, variant, model)
        for agent in options.agents
        for variant in options.variants
        for model in ((None,) if variant == "real" else options.models)
    ]


def agent_config(agent: str, name: Name, critics: Critics) -> TrainConfig:
    """CORL's settings of an agent, or those with stabilised critics: see the top of this file."""
    config = configuration.find(f"{agent}/{CONFIGS[name]}")
    if critics == "corl":
        return config
    fields = {"n_critics": 5, "q_agg": "min", "critic_layer_norm": True, "target_rate": 0.01}
    fields |= {"width": 128, "batch_size": 128}
    settings: AgentConfig = dataclasses.replace(config.agent, **fields)  # type: ignore[arg-type]
    if isinstance(settings, TD3BC):
        settings = dataclasses.replace(settings, actor_q="min")
    return dataclasses.replace(config, agent=settings)


def train_agents(options: Options, name: Name, console: Console) -> Iterator[dict[str, Any]]:
    """A run for each cell: its evaluations, one mean score a seed; row by row."""
    for cell in cells_of(options):
        path = real_file(options, name) if cell.model is None else files(options, name, cell.model)[cell.variant]
        folder = cell.folder(options, name)
        there = checkpoint.steps(folder)
        if not there:
            diffrl.train(
                dataclasses.replace(
                    agent_config(cell.agent, name, options.critics),
                    dataset=path,
                    env=ENVS[name],
                    steps=options.agent_steps,
                    seeds=options.seeds,
                    eval_every=options.eval_every,
                    eval_episodes=options.episodes,
                    workers=1,
                    compile=False,
                    device=options.device,
                    out=folder,
                )
            )
        elif there[-1] < options.agent_steps:
            diffrl.resume(folder, steps=options.agent_steps)
        evaluations = read_scores(folder)["evaluations"]
        curve = [(entry["step"], entry["score"]) for entry in evaluations]
        about: dict[str, Any] = {"data": name, "agent": cell.agent, "variant": cell.variant}
        about |= {"critics": options.critics, "model": cell.model}
        console.print(f"{' '.join(str(v) for v in about.values())}: {estimate([[s] for s in curve[-1][1]])}")
        yield about | {"steps": curve[-1][0], "curve": curve}


def measured(options: Options, name: Name) -> tuple[TransitionDiffusion, Any, OfflineDataset, OfflineDataset]:
    """The trained model, the simulator, and the rows it was trained on and those it was not."""
    folder = options.out / f"{name}-synthetic-synther"
    if not checkpoint.steps(folder):
        raise UserError(f"There is no model in {folder}: run --parts data first.")
    model = load_model(folder)
    dataset = load_dataset(real_file(options, name))
    train, held_out = (
        as_dataset(rows.transitions, dict(dataset.stand_ins()))
        for rows in hold_out(Transitions.from_dataset(dataset), 0.05, 0)
    )
    return model, dynamics_for(ENVS[name]), train, held_out


def solver_curve(options: Options, name: Name, console: Console) -> list[dict[str, Any]]:
    """Fidelity of rows drawn by each solver, and the CPU time a row took."""
    model, dynamics, train, held_out = measured(options, name)
    rows = []
    for solver, steps, churn in CURVE:
        sampling = Sampling(solver=solver, sampling_steps=steps, churn=churn)  # type: ignore[arg-type]
        start = time.process_time()
        parts = [model.sample(1024, generator_at(1, i), sampling)[0] for i in range(-(-options.curve_rows // 1024))]
        seconds = time.process_time() - start
        drawn = torch.cat(parts).numpy()
        columns: dict[str, Any] = as_columns(drawn, train.observation_size, train.action_size)
        synthetic = OfflineDataset(**columns)
        found = fidelity(train, synthetic, held_out, dynamics=dynamics, rows=options.curve_rows)
        row = {"data": name, "solver": solver, "churn": churn, "steps": steps, "calls": sampling.calls}
        rows.append(row | {"rows_per_second": len(drawn) / seconds} | summary(found))
        console.print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    return rows


def summary(found: Any) -> dict[str, float]:
    """The two measures of the curve, and their floors."""
    return {
        "w2": found.sliced_w2.synthetic,
        "w2_floor": found.sliced_w2.real,
        "ks_mean": found.ks_mean.synthetic,
        "dynamics": found.dynamics.median.synthetic,
        "dynamics_90": found.dynamics.high.synthetic,
        "standing_still": found.dynamics.standing_still,
    }


class PlainDenoiser(torch.nn.Module):
    """The network as the paper describes it, in PyTorch's own layers, the noise level embedded for every row."""

    def __init__(self, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.frequencies = torch.nn.Parameter(torch.randn(8), requires_grad=False)
        self.embed_row = torch.nn.Linear(size, 128)
        self.embed_time = torch.nn.Sequential(torch.nn.Linear(17, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128))
        self.first = torch.nn.Linear(128, width)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(blocks))
        self.last = torch.nn.Linear(width, size)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """EDM's denoiser, sigma (B,)."""
        k = sigma[:, None]
        label = k.log() / 4
        angles = 2 * np.pi * label * self.frequencies
        h = self.embed_row(x / (k**2 + 1).sqrt()) + self.embed_time(torch.cat([label, angles.sin(), angles.cos()], -1))
        h = self.first(h)
        for block in self.blocks:
            h = h + block(torch.relu(h))
        return x / (k**2 + 1) + k / (k**2 + 1).sqrt() * self.last(torch.relu(h))


@torch.no_grad()
def plain_sample(network: PlainDenoiser, n: int, size: int, steps: int = 128) -> torch.Tensor:
    """Algorithm 2 of EDM (arXiv 2206.00364), line by line, in one batch of n rows."""
    S_churn, S_tmin, S_tmax, S_noise = 80, 0.05, 50, 1.003
    i = torch.arange(steps)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    x = sigmas[0] * torch.randn(n, size)
    for k, k_next in itertools.pairwise(sigmas):
        gamma = min(S_churn / steps, 2**0.5 - 1) if S_tmin <= float(k) <= S_tmax else 0.0
        k_hat = k + gamma * k
        x_hat = x + (k_hat**2 - k**2).sqrt() * S_noise * torch.randn_like(x)
        d = (x_hat - network(x_hat, k_hat.expand(n))) / k_hat
        x = x_hat + (k_next - k_hat) * d
        if k_next > 0:
            d_next = (x - network(x, k_next.expand(n))) / k_next
            x = x_hat + (k_next - k_hat) * (d + d_next) / 2
    return x


def speed(options: Options, console: Console) -> dict[str, Any]:
    """Rows a CPU second, in rounds that take turns: the median of three."""
    transitions = torch.randn(1000, 26)
    rows = Transitions(torch.cat([transitions, torch.rand(1000, 3)], 1), 11, 3)
    codec = RowCodec.fit(rows)
    model = TransitionDiffusion(SynthERConfig(width=options.width), codec)
    plain = PlainDenoiser(codec.size, options.width, 6)
    published, fast = Sampling("heun", 128), Sampling()
    makers = {
        "plain, one batch of 10,000 rows": lambda: plain_sample(plain, 10_000, codec.size),
        "plain, batches of 1,024": lambda: plain_sample(plain, 1024, codec.size),
        "ours, the same sampler (255 calls)": lambda: model.sample(1024, generator_at(0, 0), published)[0],
        "ours, dpmpp2m (32 calls)": lambda: model.sample(1024, generator_at(0, 0), fast)[0],
    }
    rates: dict[str, list[float]] = {title: [] for title in makers}
    for _ in range(3):
        for title, make in makers.items():
            start = time.process_time()
            n = len(make())
            rates[title].append(n / (time.process_time() - start))
    medians = {title: sorted(values)[1] for title, values in rates.items()}
    for title, value in medians.items():
        console.print(f"{title}: {value:,.0f} rows/s, {value / medians['plain, one batch of 10,000 rows']:.2f} x plain")
    return {"width": options.width, "row": codec.size, "rows_per_cpu_second": medians}


def main(options: Options) -> int:
    """Do the parts, merge them into what is there, print, draw."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    settle()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "synther.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(part: str, rows: Any, replaced: Any = None) -> None:
        if path.exists():  # another process may have added its part
            results.update(json.loads(path.read_text()))
        old = [] if replaced is None else [row for row in results.get(part, []) if not replaced(row)]
        results[part] = rows if replaced is None else old + rows
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1))
        with atomic_path(path.with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(markdown(lines) for lines, *_ in tables_of(results)))

    for name in options.datasets:
        if "data" in options.parts:
            for model in options.models:
                files(options, name, model)
        if "solvers" in options.parts:
            keep("solvers", solver_curve(options, name, console), lambda row, name=name: row["data"] == name)
        if "agents" in options.parts:
            for made in train_agents(options, name, console):
                keep("agents", [made], lambda row, made=made: identity(row) == identity(made))
    if "speed" in options.parts:
        keep("speed", speed(options, console))
    for lines, title, left in tables_of(results):
        print_lines(lines, title, console, left)
    if results.get("solvers"):
        draw(results, options.out / "synther.png")
    if options.page is not None and len(models_table(results.get("agents", []))) > 1:
        put_on_page(options.page, results["agents"])
    console.print(f"Numbers: {path}, .md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(Options, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"synther: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
