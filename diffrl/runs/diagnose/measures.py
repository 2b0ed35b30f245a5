"""The theory's three questions, asked of a run: is its policy well trained, well sampled, and what did tuning change?

The answers are numbers by name, as JSON holds them; one a seed, (S,), or one a noise level and seed, (L, S). Losses and
score errors are means over the action's dimensions, as `bc_loss` in metrics.csv; actions lie in [-1, 1].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from agents.base import Agent
from agents.base_config import CriticConfig
from agents.critic import CriticEnsemble, aggregate
from diffrl.diffusion import Denoise, Process, sample
from diffrl.diffusion import diagnostics as core
from diffrl.runs.diagnose.material import (
    MIN_ROWS,
    PER_STATE,
    Levels,
    Material,
    Model,
    choose_rows,
    load_agents,
    start_policy,
)
from diffrl.runs.diverged import diverged
from diffrl.runs.policy import tell_remarks
from diffrl.runs.run import Run
from diffrl.support.console import console, work
from diffrl.support.machine import resolve_device, settle, usual_torch
from diffrl.support.schema import Positive, Range, SamplingSteps, Seed, held

Solver = Literal["ddim", "ddpm", "dpm1", "dpm2", "dpm3", "dpmpp2m", "heun"]
CALLS = {"ddim": 1, "ddpm": 1, "dpm1": 1, "dpm2": 2, "dpm3": 3, "dpmpp2m": 1, "heun": 2}
"""The solvers to choose from, with their calls of the network a step. ddpm is ddim with eta = 1, fresh noise a step."""
FEW = 512
"""Rows at most, for what is dear: likelihoods, and acting by the best of many candidates."""
EXACT = 8
"""Action dimensions up to which the likelihood's divergence is exact; beyond, by random probes."""


@usual_torch()
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

    The arguments are the options that `diffrl diagnose --help` explains. Raises UserError for values that cannot be
    meant, for data that have changed, and for a run whose agent has no generative model.
    """
    steps, deltas = _check(rows, checkpoints, solvers, steps, deltas, seed)
    run = Run.read(path)
    device = resolve_device(device)
    settle()
    agents = load_agents(run, checkpoints, device)
    step, agent = agents[-1]
    tell_remarks(run, "last", [step], quiet)
    if (said := diverged(run)) and not quiet:
        console.print(f"{run.path}: {said}", style="yellow", markup=False, highlight=False)
    generator = torch.Generator(device=agent.device).manual_seed(seed)
    process, _ = agent.generative_model(torch.zeros(agent.n_seeds, 1, agent.observation_size, device=agent.device))
    levels = Levels.of(agent, process)
    train, new, source = choose_rows(run, rows, held_out, generator, agent, quiet)
    start, start_name = start_policy(run, agents, train.observations, reference, device)

    with work("Diagnosing", "parts", quiet) as on_progress:
        done, total = 0, len(agents) + len(solvers) + 6

        def tick() -> None:
            nonlocal done
            done += 1
            on_progress(done, total)

        training = _training(agents, levels, train, new, tick)
        sampling, likelihoods = _sampling(agent, levels, train, solvers, steps, deltas, seed, generator, tick)
        tuning, points = _fine_tuning(agent, levels, train, start, seed, generator, tick)
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
        "called": run.agent_name,
        "dataset": run.config.dataset,
        "seeds": list(run.config.seeds),
        "step": step,
        "diverged": said,
        "rows": train.actions.shape[1],
        "trained_rows": run.config.rows,
        "held_out": source,
        "held_out_rows": 0 if new is None else new.actions.shape[1],
        "start": start_name,
        "process": str(process),
        "noise_levels": list(levels.ratios),
        "actions": run.action_size,
        "seed": seed,
    }
    picture = {"likelihoods": likelihoods.flatten().tolist(), **points}
    return {"about": about, "training": training, "sampling": sampling, "fine_tuning": tuning, "picture": picture}


def _check(
    rows: int,
    checkpoints: str,
    solvers: Sequence[str],
    steps: Sequence[int],
    deltas: Sequence[float],
    seed: int,
) -> tuple[list[int], list[float]]:
    """The steps, rising, and the deltas, falling. Raises UserError for a value that cannot be meant."""
    held(rows, Annotated[int, Range(MIN_ROWS, 10**7)], "--rows")
    held(checkpoints, Literal["all", "last"], "--checkpoints")
    held(seed, Seed, "--seed")
    few = Range(1, 1000)
    held(solvers, Annotated[tuple[Solver, ...], few], "--solvers")
    steps = held(steps, Annotated[tuple[SamplingSteps, ...], few], "--steps-list")
    deltas = held(deltas, Annotated[tuple[Positive, ...], few], "--deltas")
    return sorted(set(steps)), sorted(set(deltas), reverse=True)


# --- the questions -------------------------------------------------------------------------------------------------


def _training(
    agents: Sequence[tuple[int, Agent]], levels: Levels, train: Material, new: Material | None, tick: Callable[[], None]
) -> dict[str, Any]:
    """Well trained? Losses by noise level and checkpoint, score errors between models, the gap to rows not seen."""
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
    """Well sampled? W2 to a fine grid's actions by solver and steps, the start's error; likelihoods of data, (S, B)."""
    process, d = levels.process, train.actions.shape[-1]
    states = train.head(train.actions.shape[1] // PER_STATE).observations
    observations = states.repeat_interleave(PER_STATE, 1)
    denoise = agent.generative_model(observations)[1]

    def by_state(x: Tensor) -> Tensor:
        """(S, states PER_STATE, A) -> (S, states, PER_STATE, A)."""
        return x.view(len(x), -1, PER_STATE, d)

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
        "actions_a_state": PER_STATE,
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
    """log p(a + k e) in nats, (S, B), of data actions with the least noise k, under a policy uniform on [-1, 1]^A."""
    k = levels.ratios[0]
    y = (_noised(levels, material) / levels.process.alpha(levels.times[0])).double()
    inside = torch.special.ndtr((1 - y) / k) - torch.special.ndtr((-1 - y) / k)
    density: Tensor = inside / 2
    return density.clamp_min(1e-300).log().sum(-1)


def _fine_tuning(
    agent: Agent,
    levels: Levels,
    train: Material,
    start: Model | None,
    seed: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Well tuned? How far the policy is from the data and from its start, what the critics think; points to plot."""
    few = train.head(FEW)
    with torch.no_grad():
        sampled, again = (agent.sample_actions(train.observations, generator) for _ in range(2))
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
        "w2_to_data": w2(sampled, train.actions),
        "w2_floor": w2(sampled, again),
        "w2_to_data_nearby": nearby(sampled, train.actions),
        "w2_floor_nearby": nearby(sampled, again),
        "w2_acting_to_data": w2(acted, few.actions),
    }
    tick()
    if start is not None:
        process, denoise = start(train.observations)
        errors = core.score_errors(
            levels.process,
            agent.generative_model(train.observations)[1],
            core.on_process(denoise, process, levels.process),
            sampled,
            levels.times,
            train.noise,
            "eps",
        )
        result["kl_to_start_at_most"] = core.girsanov_kl(levels.process, errors.mean(-1), levels.times).tolist()
    picture: dict[str, Any] = {"data": few.actions[0, :, :2].tolist(), "policy": sampled[0, :FEW, :2].tolist()}
    critic = getattr(agent, "target_critic", getattr(agent, "critic", None))
    if isinstance(critic, CriticEnsemble):
        random = torch.rand(few.actions.shape, generator=generator, device=agent.device) * 2 - 1
        choices = {"data": few.actions, "policy": sampled[:, : few.actions.shape[1]], "acting": acted, "random": random}
        how = (agent.config.q_agg, agent.config.q_spread) if isinstance(agent.config, CriticConfig) else ("min", 1.0)
        with torch.no_grad():
            q = {name: aggregate(critic(few.observations, actions), *how) for name, actions in choices.items()}
        result["q_aggregate"] = how[0]
        result["q"] = {name: values.mean(-1).tolist() for name, values in q.items()}
        picture["q"] = {name: (values - q["data"]).flatten().tolist() for name, values in q.items() if name != "data"}
    tick()
    return result, picture


def _neighbourhoods(observations: Tensor) -> Tensor:
    """For C of the observations (B, O) the rows of the nearest ones, (C, PER_STATE), in units of deviations."""
    x = observations / observations.std(0).clamp_min(1e-6)
    centres = x[: max(2, len(x) // PER_STATE)]
    return torch.cdist(centres, x).topk(PER_STATE, largest=False).indices
