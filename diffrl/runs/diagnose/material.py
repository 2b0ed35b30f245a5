"""What a diagnosis is made with: the run's agents, rows of data, noise levels, and where tuning started from."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.base import Agent
from diffrl.data.d4rl import fingerprint
from diffrl.data.observations import without_goal
from diffrl.data.transitions import Batch
from diffrl.diffusion import Denoise, Process
from diffrl.runs.policy import build_agent, load_agent
from diffrl.runs.run import Run
from diffrl.runs.train import taken_by
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.training import checkpoint
from envs.datasets import load_dataset, load_known, locate

PER_STATE = 32
"""Actions of a state where policies are compared state by state."""
MIN_ROWS = 2 * PER_STATE
"""Rows that a diagnosis needs."""
MAX_LEVELS = 10
"""Noise levels at most."""

Model = Callable[[Tensor], tuple[Process, Denoise]]
"""A policy as a generative model of actions: from observations (S, B, O), its process and its denoiser."""


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
        """The rows (B, O) and (B, A) of a data set, the same for all seeds, with noise from the generator."""
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        return cls(*(x.expand(n_seeds, *x.shape) for x in (observations, actions, noise)))

    def head(self, rows: int) -> "Material":
        """The first `rows` rows."""
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
        """The levels that the agent names, thinned to `MAX_LEVELS`. Raises UserError where it names only one."""
        ratios = agent.noise_levels()
        if len(ratios) < 2:
            raise UserError("The policy has one noise level; a diagnosis needs two or more (--agent.denoising-steps).")
        if len(ratios) > MAX_LEVELS:
            ratios = tuple(ratios[round(i * (len(ratios) - 1) / (MAX_LEVELS - 1))] for i in range(MAX_LEVELS))
        times = process.time(torch.tensor(ratios, dtype=torch.float64))
        return cls(process, ratios, times.to(agent.device, torch.float32))

    def grid(self, n: int, to_zero: bool = True) -> Tensor:
        """The times of n steps over these levels, uniform in log k; with `to_zero` the last step ends at k = 0."""
        return self.process.grid(n, self.ratios[0], self.ratios[-1], to_zero=to_zero)

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling starts: standard normal `noise` as N(0, s^2) at the largest level."""
        return self.process.sigma(self.times[-1]) * noise


def load_agents(run: Run, checkpoints: str, device: str) -> list[tuple[int, Agent]]:
    """The steps and agents of a run's checkpoints, all seeds as a stack, the newest last.

    checkpoints: "all" that are whole, or the "last" such one. Raises CheckpointError where none is.
    """
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


def choose_rows(
    run: Run, rows: int, held_out: str | None, generator: torch.Generator, agent: Agent, quiet: bool
) -> tuple[Material, Material | None, str | None]:
    """Rows that the run was trained on, rows that it was not, and where these are from (None where there are none).

    rows: of each, at most. held_out: the name of the data set to take the others from, without those of its rows that
    the run was trained on; by default the run's own, beyond these. Raises UserError for data that have changed, do not
    fit, or have too few rows, in `held_out` too few that are new.
    """
    config = run.config
    dataset = load_known(config.dataset, run.fingerprint, config.rows, progress=not quiet)
    whole = None
    if held_out is None and config.rows is not None and locate(config.dataset).exists:
        whole = load_dataset(dataset.metadata["dataset"], progress=not quiet, action_limit=None)
        whole = without_goal(whole, run.observation_size)
    dataset = without_goal(dataset, run.observation_size)
    if fingerprint(dataset) != run.fingerprint:
        raise UserError(
            f"The data set {config.dataset} is not the one that {run.path} was trained on: its contents have changed. "
            "Restore the data, or say what else to compare with by --held-out."
        )

    dataset, whole = taken_by(run, dataset), None if whole is None else taken_by(run, whole)

    def choose(columns: Any, n_seeds: int) -> Material:
        n = len(columns.actions)
        if n < MIN_ROWS:
            raise UserError(f"A diagnosis needs {MIN_ROWS} rows at least; there are {n}.")
        chosen = torch.randperm(n, generator=generator, device=generator.device)[:rows]
        return Material.of(columns.observations[chosen], columns.actions[chosen], n_seeds, generator)

    prepare = functools.partial(run.preprocessing.transitions, reward_tune="no", device=str(agent.device))
    seen = prepare(dataset)
    train = choose(seen.columns, agent.n_seeds)
    if held_out is not None:
        other = without_goal(load_dataset(held_out, progress=not quiet, action_limit=None), run.observation_size)
        sizes = (other.observation_size, other.action_size)
        if sizes != (run.observation_size, run.action_size):
            raise UserError(
                f"--held-out {held_out} has {sizes[0]} observations and {sizes[1]} actions; the run has "
                f"{run.observation_size} and {run.action_size}."
            )
        offered = prepare(taken_by(run, other))
        known = _among(offered.columns, seen.columns)
        n, new = len(known), int((~known).sum())
        if n > new < MIN_ROWS:
            raise UserError(
                f"--held-out {held_out}: {'all' if not new else f'{n - new:,}'} of its {n:,} rows are rows that "
                f"{run.path} was trained on. Name data with {MIN_ROWS} rows at least that it was not trained on."
            )
        without = f", without {n - new:,} rows that the run was trained on" if new < n else ""
        return train, choose(offered.view(offered.rows[~known]), agent.n_seeds), f"{held_out}{without}"
    if whole is not None and config.rows is not None and len(whole) - config.rows > MIN_ROWS:
        both = prepare(whole)
        columns = both.view(both.rows[len(seen) + 1 :])  # one more: the row that the cut left without a successor
        return train, choose(columns, agent.n_seeds), f"{config.dataset}, rows beyond {config.rows:,}"
    return train, None, None


def _among(columns: Batch, others: Batch) -> Tensor:
    """Which of some rows are also among others: observation and action, bit for bit; (N,) of bools.

    Rows are compared by sums of their words, each times an odd random number, modulo 2^64: those of two rows that
    differ are alike by chance once in 2^32 pairs at most, and of a row that differs in one word never.
    """
    both = [torch.cat([part.observations, part.actions], -1).cpu().numpy() for part in (columns, others)]
    words = [np.ascontiguousarray(rows, np.float32).view(np.uint32).astype(np.uint64) for rows in both]
    factors = np.random.default_rng(0).integers(2**64, size=both[0].shape[1], dtype=np.uint64) | np.uint64(1)
    found = np.isin(*((rows * factors).sum(-1, dtype=np.uint64) for rows in words))
    return torch.from_numpy(found).to(columns.actions.device)


def start_policy(
    run: Run, agents: Sequence[tuple[int, Agent]], observations: Tensor, reference: Path | None, device: str
) -> tuple[Model | None, str | None]:
    """The policy that fine-tuning is measured from, and its name; None where there is none.

    It is the last one of the run `reference`, by default that of the earliest of the `agents`' checkpoints. Raises
    UserError where the runs do not fit, or the reference's agent has no generative model.
    """
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
    return start, f"{reference} ({other.agent_name})"
