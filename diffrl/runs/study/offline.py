"""What policies are worth without an environment: fitted Q evaluation, their own critics, and their cloning loss.

Each estimate is to be compared only among policies of one task; the cloning loss only among those of one algorithm.
- fqe: `fqe.fitted_values` on the run's data, with its discount and the policy's own actions;
- critics: (1 - gamma) E Q(s_0, pi(s_0)) by the run's own critics, aggregated as in their target, at the data's initial
  states; rewards that training tuned, (r - shift) / scale, are turned back, which is exact where episodes do not end;
  of critics whose targets are normalised there is none, as their Q is in no unit;
- bc loss: minus the policy's cloning loss, the mean of `bc_loss` in metrics.csv since the evaluation before: what
  Diffusion-QL's "offline" selection ranks checkpoints by (Wang, Hunt & Zhou 2023, arXiv 2208.06193, appendix).
"""

import csv
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.base import Agent
from agents.base_config import CriticConfig
from agents.critic import aggregate
from agents.planning import Planner
from diffrl.data.offline import Ints, OfflineDataset
from diffrl.data.preprocessing import Preprocessing, reward_tuning
from diffrl.data.transitions import Transitions
from diffrl.runs.acting import source_of_randomness
from diffrl.runs.kind import OFFLINE
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run
from diffrl.runs.study.config import FQEConfig
from diffrl.runs.study.fqe import ENOUGH, LONGEST, Experience, fitted_values, settled
from diffrl.runs.study.policies import Policy
from diffrl.runs.train import same_data
from diffrl.support.console import work
from diffrl.support.errors import UserError
from diffrl.support.files import plain_file
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import check
from diffrl.training.logs import read_scores

FQE, CRITICS, BC_LOSS = "fqe", "critics", "bc loss"
CRITERIA = (FQE, CRITICS, BC_LOSS)
"""The estimates by name."""
MOST_STARTS = 1000
"""Initial states of the data that values are means over."""
_AT_ONCE = 1024
"""States that a policy is asked at at once."""

Estimates = dict[str, NDArray[np.float64]]
"""By criterion, an estimate a policy, higher is better: (P,); nan where there is none."""


def estimates(policies: Sequence[Policy], config: FQEConfig, quiet: bool = False) -> tuple[Estimates, list[str]]:
    """The estimates of the policies of one task, and sentences on those that have none."""
    found = {name: np.full(len(policies), math.nan) for name in CRITERIA}
    left_out: dict[str, None] = {}
    acting: list[tuple[int, Run, Agent]] = []
    for i, policy in enumerate(policies):
        if policy.run is None:
            left_out["Scores from a file have no policies to be evaluated by the data."] = None
            continue
        run = Run.read(policy.run)
        try:
            _require_offline(run)
            found[BC_LOSS][i] = -cloning_loss(policy)
            acting.append((i, run, _agent(run, policy)))
        except UserError as error:
            left_out[f"Not evaluated by the data: {error}"] = None
    try:
        material = _material(acting, config, quiet) if acting else None
    except UserError as error:  # of runs that were trained elsewhere
        left_out[f"Neither fqe nor critics without the data: {error}"] = None
        material = None
    if material is not None:
        data, tuned = material
        for i, run, agent in acting:
            if isinstance(agent.config, CriticConfig) and not agent.config.q_in_rewards:
                left_out[f"Not evaluated by critics: {run.path} normalises their targets, and their Q has no unit."] = (
                    None
                )
            found[CRITICS][i] = critics_value(
                agent, run.preprocessing, data.starts, *tuned[run.config.agent.reward_tune]
            )
        if config.steps:
            index = [i for i, *_ in acting]
            found[FQE][index] = _fitted(acting, data, config, quiet)
            left_out |= dict.fromkeys(_unsettled(_discounts(acting), config))
    return found, list(left_out)


def cloning_loss(policy: Policy) -> float:
    """The mean of `bc_loss` in the run's metrics.csv since the evaluation before this one; nan where it has none."""
    assert policy.run is not None
    path = policy.run / "metrics.csv"
    if not path.exists():
        return math.nan
    before = max((e["step"] for e in read_scores(policy.run)["evaluations"] if e["step"] < policy.step), default=-1)
    values = []
    with plain_file(path).open(newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step, seed, loss = int(row["step"]), int(row["seed"]), float(row["bc_loss"])
            except (KeyError, TypeError, ValueError):  # no such column, or a row that was torn
                continue
            if seed == policy.seed and before < step <= policy.step:
                values.append(loss)
    return float(np.mean(values)) if values else math.nan


def critics_value(agent: Agent, preprocessing: Preprocessing, starts: Tensor, shift: float, scale: float) -> float:
    """(1 - gamma) E Q(s_0, pi(s_0)) in the data's rewards, by the agent's own critics.

    nan where it has none, or where their Q is in no unit.

    agent: of one seed. starts: (B, O), as the environment has them. shift, scale: rewards were (r - shift) / scale.
    """
    config, critic = agent.config, agent.networks.get("critic")
    if not isinstance(config, CriticConfig) or not config.q_in_rewards or critic is None:
        return math.nan
    z = preprocessing.observations(starts)[None]
    with torch.no_grad():
        actions = _asked(agent, z[0], 1)[None]
        q = aggregate(critic(z, actions), config.q_agg, config.q_spread).mean()
    return float((1 - config.discount) * q * scale + shift)


def _require_offline(run: Run) -> None:
    """Raise UserError where a run has learned from more than its data: no criterion then compares it with others."""
    if run.kind != OFFLINE:
        raise UserError(f"{run.path} is a run of kind {run.kind}, whose policy has learned from other data too.")


def _agent(run: Run, policy: Policy) -> Agent:
    """The agent of a policy. Raises UserError where its actions cannot be asked for state by state."""
    agent = load_agent(run, policy.seed, str(policy.step))
    if isinstance(agent, Planner):
        raise UserError(f"{run.path}: {policy.agent} plans, and its actions are not of a state alone.")
    return agent


def initial_rows(dataset: OfflineDataset) -> Ints:
    """The rows (n,) in whose states recordings begin: those of episodes, but for ones that go on behind a terminal row.

    On OGBench a row that solves the task is terminal, and the recording goes on in its successor.
    """
    first: Ints = dataset.episodes()[:, 0]
    before = np.maximum(first - 1, 0)
    if dataset.next_observations is None or not dataset.has_terminal_next:
        return first
    followed = (dataset.next_observations[before] == dataset.observations[first]).all(-1)
    begins: Ints = first[(first == 0) | dataset.timeouts[before] | ~followed]
    return begins


def _material(
    acting: Sequence[tuple[int, Run, Agent]], config: FQEConfig, quiet: bool
) -> tuple[Experience, dict[str, tuple[float, float]]]:
    """The data of the runs, all of one task and so of one data set; and shift and scale of each reward tuning."""
    run = acting[0][1]
    dataset = same_data(run, quiet=True)
    transitions = Transitions.from_dataset(dataset)
    columns = transitions.columns
    tunings: set[str] = {one.config.agent.reward_tune for _, one, _ in acting}
    tuned = {name: reward_tuning(name, columns.rewards, columns.episodes, dataset.return_range()) for name in tunings}
    generator = generator_at(config.seed, 2)
    rows = torch.randperm(len(transitions), generator=generator)[: config.rows]
    chosen = transitions.gather(rows)
    first = torch.from_numpy(dataset.observations[initial_rows(dataset)].astype(np.float32))
    starts = first[torch.randperm(len(first), generator=generator)[:MOST_STARTS]]
    actions = run.preprocessing.actions(chosen.actions).clamp(-1, 1)
    data = Experience(
        *(chosen.observations, actions, chosen.rewards, chosen.terminals, chosen.next_observations, starts)
    )
    return data, tuned


def _asked(agent: Agent, z: Tensor, salt: int) -> Tensor:
    """The actions (B, A) in [-1, 1] of an agent of one seed at its observations z (B, O); the same each time."""
    generator = source_of_randomness(agent, salt)
    found = []
    for part in torch.split(z, _AT_ONCE):
        check()
        found.append(agent.act(part[None], generator)[0])
    return torch.cat(found).detach()


def _fitted(
    acting: Sequence[tuple[int, Run, Agent]], data: Experience, config: FQEConfig, quiet: bool
) -> NDArray[np.float64]:
    next_actions, start_actions = [], []
    with work("Asking the policies", "policies", quiet) as on_policy:
        for n, (_, run, agent) in enumerate(acting):
            normalise = run.preprocessing.observations
            next_actions.append(_asked(agent, normalise(data.next_observations), 2))
            start_actions.append(_asked(agent, normalise(data.starts), 3))
            on_policy(n + 1, len(acting))
    discounts = _discounts(acting)
    with work(f"Fitted Q evaluation of {len(acting)} policies", "steps", quiet) as on_step:
        return fitted_values(data, torch.stack(next_actions), torch.stack(start_actions), discounts, config, on_step)


def _discounts(acting: Sequence[tuple[int, Run, Agent]]) -> Tensor:
    return torch.tensor([run.config.agent.discount for _, run, _ in acting])


def _unsettled(discounts: Tensor, config: FQEConfig) -> list[str]:
    """A sentence for each discount whose values fitted Q evaluation has not had the steps to find."""
    said = []
    for discount in sorted(set(discounts.tolist())):
        share = float(settled(torch.tensor(discount), config))
        if share < ENOUGH:
            more = math.ceil(config.steps * ENOUGH / share / 1000) * 1000 if share > 0 else 0
            enough = f" --fqe.steps {more} settles." if more else ""
            if more and discount > LONGEST:
                enough += " The network's errors grow with the horizon, too, which more steps do not mend."
            said.append(
                f"fqe has not settled at a discount of {discount:.6g}: {math.exp(-share):.0%} of the way to the values "
                f"is left.{enough}"
            )
    return said
