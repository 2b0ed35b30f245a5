"""The theory's three questions, asked of a run: is its policy well trained, well sampled, and what did tuning change?

The answers are numbers by name, as JSON holds them; one a seed, (S,), or one a noise level and seed, (L, S). Losses and
score errors are means over the action's dimensions, as `bc_loss` in metrics.csv; actions lie in [-1, 1].
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.base import Agent
from agents.critic import CriticEnsemble, aggregate
from diffrl.data.d4rl import digest
from diffrl.diffusion import Denoise, Process, sample
from diffrl.diffusion import diagnostics as core
from diffrl.runs.policy import build_agent, load_agent
from diffrl.runs.run import Run
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, nearest
from diffrl.support.machine import resolve_device, settle
from diffrl.training import checkpoint
from envs.datasets import load_dataset, locate

CALLS = {"ddim": 1, "ddpm": 1, "dpm1": 1, "dpm2": 2, "dpm3": 3, "dpmpp2m": 1, "heun": 2}
"""The solvers to choose from, with their calls of the network a step. ddpm is ddim with eta = 1, fresh noise a step."""
DRAWS = 32
"""Actions a state where policies are compared state by state."""
FEW = 512
"""Rows at most, for what is dear: likelihoods, and acting by the best of many candidates."""
LEVELS = 10
"""Noise levels at most."""
EXACT = 8
"""Action dimensions up to which the likelihood's divergence is exact; beyond, by random probes."""


@dataclass(frozen=True)
class Material:
    """What the questions are asked with: rows of the data as the agent sees them, and the noise on them."""

    observations: Tensor
    """(S, B, O)"""
    actions: Tensor
    """(S, B, A)"""
    noise: Tensor
    """(S, B, A), the same for all seeds."""

    @classmethod
    def of(cls, observations: Tensor, actions: Tensor, n_seeds: int, generator: torch.Generator) -> "Material":
        """Of rows (B, O) and (B, A)."""
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        return cls(*(x.expand(n_seeds, *x.shape) for x in (observations, actions, noise)))

    def head(self, rows: int) -> "Material":
        """The first rows."""
        return Material(self.observations[:, :rows], self.actions[:, :rows], self.noise[:, :rows])


@dataclass(frozen=True)
class Levels:
    """The noise levels of a policy, from the least to the most."""

    process: Process
    ratios: tuple[float, ...]
    times: Tensor
    """(L,)"""

    @classmethod
    def of(cls, agent: Agent, process: Process) -> "Levels":
        """Those the agent names, thinned to `LEVELS`."""
        ratios = agent.noise_levels()
        if len(ratios) < 2:
            raise UserError("The policy has one noise level; a diagnosis needs two or more (--agent.denoising-steps).")
        if len(ratios) > LEVELS:
            ratios = tuple(ratios[round(i * (len(ratios) - 1) / (LEVELS - 1))] for i in range(LEVELS))
        times = process.time(torch.tensor(ratios, dtype=torch.float64))
        return cls(process, ratios, times.to(agent.device, torch.float32))

    def grid(self, n: int, to_zero: bool = True) -> Tensor:
        """The times of n steps over these levels, uniform in log k, the last of them to k = 0."""
        return self.process.grid(n, self.ratios[0], self.ratios[-1], to_zero=to_zero)

    def start(self, noise: Tensor) -> Tensor:
        """N(0, s^2) at the largest level."""
        return self.process.sigma(self.times[-1]) * noise


def diagnose(
    path: Path | str,
    *,
    rows: int = 2000,
    held_out: str | None = None,
    reference: Path | None = None,
    checkpoints: str = "all",
    solvers: Sequence[str] = ("ddim", "dpmpp2m", "dpm2", "ddpm"),
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    deltas: Sequence[float] = (0.1, 0.03, 0.01),
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, Any]:
    """Diagnose a run: `{"about": ..., "training": ..., "sampling": ..., "fine_tuning": ..., "picture": ...}`.

    See `diffrl diagnose --help` for the arguments. Raises UserError for a run whose agent has no generative model.
    """
    steps, deltas = _check(rows, checkpoints, solvers, steps, deltas, seed)
    run = Run.read(path)
    device = resolve_device(device)
    settle()
    agents = _agents(run, checkpoints, device)
    agent = agents[-1][1]
    generator = torch.Generator(device=agent.device).manual_seed(seed)
    process, _ = agent.generative_model(torch.zeros(agent.n_seeds, 1, agent.observation_size, device=agent.device))
    levels = Levels.of(agent, process)
    train, new, source = _rows(run, rows, held_out, generator, agent, quiet)
    start, start_name = _start(run, agents, train.observations, reference, device)

    with work("Diagnosing", "parts", quiet) as on_progress:
        done, total = 0, len(agents) + len(solvers) + 6

        def tick() -> None:
            nonlocal done
            done += 1
            on_progress(done, total)

        training = _training(agents, levels, train, new, tick)
        sampling, likelihoods = _sampling(agent, levels, train, solvers, steps, deltas, seed, generator, tick)
        tuning, drawn = _fine_tuning(agent, levels, train, start, seed, generator, tick)
    n = likelihoods.shape[-1]
    if start is not None:
        before = _likelihood(levels, start(train.head(n).observations), train.head(n), seed)
        change = core.estimate((likelihoods - before).mean(0))  # of the same rows: their own spread is not in it
        tuning["log_likelihood_of_data"] = {
            "now": likelihoods.mean(-1).tolist(),
            "start": before.mean(-1).tolist(),
            "change": float(change.mean),
            "change_error": float(change.error),
        }
    about = {
        "run": str(run.path),
        "agent": run.config.agent.name,
        "dataset": run.config.dataset,
        "seeds": list(run.config.seeds),
        "step": agents[-1][0],
        "rows": train.actions.shape[1],
        "held_out": source,
        "held_out_rows": 0 if new is None else new.actions.shape[1],
        "start": start_name,
        "process": str(process),
        "noise_levels": list(levels.ratios),
        "actions": run.action_size,
        "seed": seed,
    }
    picture = {"likelihoods": likelihoods[0].tolist(), **drawn}
    return {"about": about, "training": training, "sampling": sampling, "fine_tuning": tuning, "picture": picture}


# --- what is diagnosed ---------------------------------------------------------------------------------------------


def _check(
    rows: int,
    checkpoints: str,
    solvers: Sequence[str],
    steps: Sequence[int],
    deltas: Sequence[float],
    seed: int,
) -> tuple[list[int], list[float]]:
    """The steps rising and the deltas falling. Raises UserError for what cannot be meant."""
    if rows < 2 * DRAWS:
        raise UserError(f"--rows is {rows}; expected at least {2 * DRAWS}.")
    if checkpoints not in ("all", "last"):
        raise UserError(f"--checkpoints is {checkpoints!r}; expected all or last.")
    for solver in solvers:
        if solver not in CALLS:
            raise UserError(f"Unknown solver {solver!r}: {nearest(solver, CALLS)}")
    if not solvers or not steps or min(steps) < 1:
        raise UserError("--solvers and --steps-list need one entry or more, steps of at least 1.")
    if not deltas or not all(0 < delta < math.inf for delta in deltas):
        raise UserError(f"--deltas is {list(deltas)}; expected distances above 0.")
    if seed < 0:
        raise UserError(f"--seed is {seed}; expected 0 or more.")
    return sorted(set(steps)), sorted(set(deltas), reverse=True)


def _agents(run: Run, checkpoints: str, device: str) -> list[tuple[int, Agent]]:
    """The steps and agents, all seeds as a stack, of the checkpoints that are whole, the newest last."""
    if checkpoints == "last":
        saved, complaints = checkpoint.load_latest(run.path)
        found = [saved]
    else:
        found, complaints = [], []
        for step in checkpoint.steps(run.path):
            try:
                found.append(checkpoint.load(run.path, step))
            except checkpoint.CheckpointError as error:
                complaints.append(f"{error} It is left out.")
        if not found:
            checkpoint.load_latest(run.path)  # raises, and says why
    for complaint in complaints:
        console.print(f"[yellow]{complaint}[/]")
    agents = []
    for saved in found:
        agent = build_agent(run, device)
        agent.load_state_dict(saved.learner)
        agents.append((saved.step, agent))
    return agents


def _rows(
    run: Run, rows: int, held_out: str | None, generator: torch.Generator, agent: Agent, quiet: bool
) -> tuple[Material, Material | None, str | None]:
    """Rows the run was trained on, rows it was not, and where those are from: None where there are none."""
    config = run.config
    whole = None
    if held_out is None and config.rows is not None and locate(config.dataset).exists:
        whole = load_dataset(config.dataset, progress=not quiet, action_limit=None)
        dataset = whole.head(config.rows)
    else:
        dataset = load_dataset(config.dataset, rows=config.rows, progress=not quiet, action_limit=None)
    if digest(dataset.columns()) != run.fingerprint:
        raise UserError(
            f"The data set {config.dataset} is not the one that {run.path} was trained on: its contents have changed. "
            "Restore the data, or say what else to compare with by --held-out."
        )

    def choose(columns: Any, n_seeds: int) -> Material:
        n = len(columns.actions)
        if n < 2 * DRAWS:
            raise UserError(f"A diagnosis needs {2 * DRAWS} rows at least; there are {n}.")
        chosen = torch.randperm(n, generator=generator, device=generator.device)[:rows]
        return Material.of(columns.observations[chosen], columns.actions[chosen], n_seeds, generator)

    prepare = functools.partial(run.preprocessing.transitions, reward_tune="no", device=str(agent.device))
    seen = prepare(dataset)
    train = choose(seen.columns, agent.n_seeds)
    if held_out is not None:
        other = load_dataset(held_out, progress=not quiet, action_limit=None)
        sizes = (other.observation_size, other.action_size)
        if sizes != (run.observation_size, run.action_size):
            raise UserError(
                f"--held-out {held_out} has {sizes[0]} observations and {sizes[1]} actions; the run has "
                f"{run.observation_size} and {run.action_size}."
            )
        return train, choose(prepare(other).columns, agent.n_seeds), held_out
    if whole is not None and config.rows is not None and len(whole) - config.rows > 2 * DRAWS:
        both = prepare(whole)
        columns = both.view(both.rows[len(seen) + 1 :])  # one more: the row that the cut left without a successor
        return train, choose(columns, agent.n_seeds), f"{config.dataset}, rows beyond {config.rows:,}"
    return train, None, None


Start = Callable[[Tensor], tuple[Process, Denoise]]
"""The policy that fine-tuning is measured from: given the observations, its generative model."""


def _start(
    run: Run, agents: Sequence[tuple[int, Agent]], observations: Tensor, reference: Path | None, device: str
) -> tuple[Start | None, str | None]:
    """That policy and its name: the last one of the run `reference`, else the earliest checkpoint's, else none."""
    if reference is None:
        if len(agents) < 2:
            return None, None
        step, first = agents[0]
        return first.generative_model, f"step {step:,} of this run"
    other = Run.read(reference)
    ours, theirs = run.preprocessing, other.preprocessing
    if (other.observation_size, other.action_size) != (run.observation_size, run.action_size) or not (
        torch.allclose(ours.actions.shift, theirs.actions.shift)
        and torch.allclose(ours.actions.scale, theirs.actions.scale)
    ):
        raise UserError(f"--reference {reference} is a run with other observations or actions than {run.path}.")
    seeds = [s if s in other.config.seeds else other.config.seeds[0] for s in run.config.seeds]
    singles = [load_agent(other, s, "last", device) for s in seeds]
    ours, theirs = ours.to(observations.device), theirs.to(observations.device)

    def start(observations: Tensor) -> tuple[Process, Denoise]:
        x = theirs.observations(ours.observations.inverse(observations))
        models = [agent.generative_model(x[i : i + 1]) for i, agent in enumerate(singles)]

        def denoise(a: Tensor, t: Tensor) -> Tensor:
            return torch.cat([model[1](a[i : i + 1], t) for i, model in enumerate(models)])

        return models[0][0], denoise

    start(observations[:, :1])  # an agent without a model says so now
    return start, f"{reference} ({other.config.agent.name})"


# --- the questions -------------------------------------------------------------------------------------------------


def _training(
    agents: Sequence[tuple[int, Agent]], levels: Levels, train: Material, new: Material | None, tick: Callable[[], None]
) -> dict[str, Any]:
    """Losses by noise level at each checkpoint, score errors between models, the gap to rows not seen."""
    d = train.actions.shape[-1]
    ask = (levels.process, levels.times)

    def model(agent: Agent, material: Material) -> Denoise:
        tick()
        return agent.generative_model(material.observations)[1]

    losses = core.learning_dynamics(
        ask[0], (model(agent, train) for _, agent in agents), train.actions, ask[1], train.noise
    )
    losses = losses / d  # (M, L, S, B)
    result: dict[str, Any] = {
        "checkpoints": [step for step, _ in agents],
        "loss": losses.mean(-1).tolist(),
        "loss_error": core.estimate(losses).error.tolist(),
    }
    last = agents[-1][1].generative_model(train.observations)[1]

    def against(other: Denoise) -> list[float]:
        errors = core.score_errors(ask[0], last, other, train.actions, ask[1], train.noise, "eps")
        levelled: list[float] = (errors / d).mean((-1, -2)).tolist()
        return levelled

    if agents[-1][1].n_seeds > 1:  # all seeds see the same noised actions
        result["score_error_between_seeds"] = against(lambda x, t: last(x, t).roll(1, 0))
    if len(agents) > 1:
        result["score_error_to_previous"] = against(agents[-2][1].generative_model(train.observations)[1])
    tick()
    if new is not None:
        denoise = agents[-1][1].generative_model(new.observations)[1]
        unseen = core.denoising_losses(ask[0], denoise, new.actions, ask[1], new.noise) / d
        # The seeds saw the same rows: they are averaged first, and the error is over rows.
        gap = core.generalisation_gap(losses[-1].mean(1), unseen.mean(1))
        result["held_out_loss"] = unseen.mean(-1).tolist()
        result["generalisation_gap"] = {"mean": gap.mean.tolist(), "error": gap.error.tolist()}
    tick()
    return result


def _sampling(
    agent: Agent,
    levels: Levels,
    train: Material,
    solvers: Sequence[str],
    steps: Sequence[int],
    deltas: Sequence[float],
    seed: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> tuple[dict[str, Any], Tensor]:
    """W2 to a fine grid's actions by solver and steps, the start's error, likelihoods of data actions (S, B)."""
    process, d = levels.process, train.actions.shape[-1]
    states = train.head(train.actions.shape[1] // DRAWS).observations
    observations = states.repeat_interleave(DRAWS, 1)
    denoise = agent.generative_model(observations)[1]

    def by_state(x: Tensor) -> Tensor:
        """(S, states DRAWS, A) -> (S, states, DRAWS, A)."""
        return x.view(len(x), -1, DRAWS, d)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        """The root of the mean over states of W2^2, (S,): the same directions every time."""
        return core.sliced_w2(by_state(x), by_state(y), 64, torch.Generator().manual_seed(seed)).square().mean(1).sqrt()

    def noise() -> Tensor:
        shape = (*observations.shape[:-1], d)
        return levels.start(torch.randn(shape, generator=generator, device=observations.device))

    fine = 4 * max(steps)
    with torch.no_grad():
        x = noise()
        reference = sample(process, denoise, x, levels.grid(fine), "dpm2")
        coarser = sample(process, denoise, x, levels.grid(fine // 2), "dpm2")
        other = sample(process, denoise, noise(), levels.grid(fine), "dpm2")
        own = agent.sample_actions(observations, generator)
    tick()
    result: dict[str, Any] = {
        "states": states.shape[1],
        "actions_a_state": DRAWS,
        "reference": {"solver": "dpm2", "steps": fine, "to_half_the_steps": distance(coarser, reference).tolist()},
        "sampling_floor": distance(other, reference).tolist(),
        "as_the_agent_samples": distance(own, reference).tolist(),
        "spread": by_state(reference).std(2).mean((1, 2)).tolist(),
        "w2": {},
        "complexity": {},
    }
    for solver in solvers:
        name, eta = ("ddim", 1.0) if solver == "ddpm" else (solver, 0.0)
        errors = [
            core.discretisation_error(process, denoise, x, reference, levels.grid(n), distance, name, eta, generator)
            for n in steps
        ]
        # The last step, to k = 0, is of first order: it has no trial points.
        calls = [n * CALLS[solver] - (CALLS[solver] - 1) for n in steps]
        result["w2"][solver] = {"steps": list(steps), "calls": calls, "w2": [e.tolist() for e in errors]}
        means = [float(e.mean()) for e in errors]
        within = {f"{delta:g}": [i for i, mean in enumerate(means) if mean <= delta] for delta in deltas}
        result["complexity"][solver] = {
            delta: {"steps": steps[i[0]], "calls": calls[i[0]]} if i else None for delta, i in within.items()
        }
        tick()

    lower, upper = core.start_kl_bounds(process, train.actions[0], levels.times[-1])
    right, wrong = core.from_both_starts(
        process,
        agent.generative_model(train.observations)[1],
        train.actions,
        train.noise,
        levels.grid(max(steps)),
        "dpmpp2m",
    )
    result["start"] = {
        "k": levels.ratios[-1],
        "kl_at_least": max(float(lower), 0.0),
        "kl_at_most": float(upper),
        "w2_of_gaussian_data": float(
            core.start_error(process, core.moments(train.actions[0]), levels.times[-1]).w2_data
        ),
        "rms_of_actions": (right - wrong).square().sum(-1).mean(-1).sqrt().tolist(),
    }
    tick()
    few = train.head(FEW)
    likelihoods = _likelihood(levels, agent.generative_model(few.observations), few, seed)
    mean, error = core.estimate(likelihoods)
    result["log_likelihood"] = {
        "k": levels.ratios[0],
        "nats": mean.tolist(),
        "error": error.tolist(),
        "bits_per_dim": core.bits_per_dim(mean, d).tolist(),
        "uniform": float(_uniform(levels, few).mean()),
    }
    tick()
    return result, likelihoods


def _noised(levels: Levels, material: Material) -> Tensor:
    """The actions with the least noise, x_t (S, B, A)."""
    return levels.process.perturb(material.actions, levels.times[0], material.noise)


def _likelihood(levels: Levels, model: tuple[Process, Denoise], material: Material, seed: int) -> Tensor:
    """log p(a + k e | s) in nats, (S, B), of data actions with the least noise k, under the probability-flow ODE."""
    process, denoise = model
    x, d = _noised(levels, material), material.actions.shape[-1]
    generator = torch.Generator(device=x.device).manual_seed(seed)
    probes = None if d <= EXACT else core.rademacher((4, *x.shape), generator)
    denoise = core.on_process(denoise, process, levels.process)
    log_p = core.log_likelihood(levels.process, denoise, x, levels.grid(24, to_zero=False), probes=probes)
    return log_p + d * levels.process.alpha(levels.times[0]).log()


def _uniform(levels: Levels, material: Material) -> Tensor:
    """The same of a policy that is uniform on [-1, 1]^A: (S, B)."""
    k = levels.ratios[0]
    y = (_noised(levels, material) / levels.process.alpha(levels.times[0])).double()
    inside = torch.special.ndtr((1 - y) / k) - torch.special.ndtr((-1 - y) / k)
    density: Tensor = inside / 2
    return density.clamp_min(1e-300).log().sum(-1)


def _fine_tuning(
    agent: Agent,
    levels: Levels,
    train: Material,
    start: Start | None,
    seed: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far the policy is from the data and from its start, what its critics think of it; and points to draw."""
    few = train.head(FEW)
    with torch.no_grad():
        drawn, again = (agent.sample_actions(train.observations, generator) for _ in range(2))
        acted = agent.act(few.observations, generator)

    def w2(x: Tensor, y: Tensor) -> list[float]:
        found: list[float] = core.sliced_w2(x, y, 64, torch.Generator().manual_seed(seed)).tolist()
        return found

    near = _neighbourhoods(train.observations[0])

    def nearby(x: Tensor, y: Tensor) -> list[float]:
        """The root of the mean over neighbourhoods of W2^2: (S,)."""
        by_state = core.sliced_w2(x[:, near], y[:, near], 64, torch.Generator().manual_seed(seed))
        found: list[float] = by_state.square().mean(1).sqrt().tolist()
        return found

    result: dict[str, Any] = {
        "w2_to_data": w2(drawn, train.actions),
        "w2_floor": w2(drawn, again),
        "w2_to_data_nearby": nearby(drawn, train.actions),
        "w2_floor_nearby": nearby(drawn, again),
        "w2_acting_to_data": w2(acted, few.actions),
    }
    tick()
    if start is not None:
        process, denoise = start(train.observations)
        errors = core.score_errors(
            levels.process,
            agent.generative_model(train.observations)[1],
            core.on_process(denoise, process, levels.process),
            drawn,
            levels.times,
            train.noise,
            "eps",
        )
        result["kl_to_start_at_most"] = core.girsanov_kl(levels.process, errors.mean(-1), levels.times).tolist()
    picture: dict[str, Any] = {"data": few.actions[0, :, :2].tolist(), "policy": drawn[0, :FEW, :2].tolist()}
    critic = getattr(agent, "target_critic", getattr(agent, "critic", None))
    if isinstance(critic, CriticEnsemble):
        random = torch.rand(few.actions.shape, generator=generator, device=agent.device) * 2 - 1
        choices = {"data": few.actions, "policy": drawn[:, : few.actions.shape[1]], "acting": acted, "random": random}
        with torch.no_grad():
            q = {name: aggregate(critic(few.observations, actions), "min") for name, actions in choices.items()}
        result["q"] = {name: values.mean(-1).tolist() for name, values in q.items()}
        picture["q"] = {name: (values[0] - q["data"][0]).tolist() for name, values in q.items() if name != "data"}
    tick()
    return result, picture


def _neighbourhoods(observations: Tensor) -> Tensor:
    """The rows (C, DRAWS) of the states nearest to each of C among the observations (B, O), in units of deviations."""
    x = observations / observations.std(0).clamp_min(1e-6)
    centres = x[: max(2, len(x) // DRAWS)]
    return torch.cdist(centres, x).topk(DRAWS, largest=False).indices
