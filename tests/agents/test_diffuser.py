"""Diffuser: its loss written out plainly, its plans' known states, its controller, and plans kept and dropped."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import BC, Diffuser
from agents.diffuser import DiffuserAgent, DiffuserNoise
from agents.planning import Follower, Planner, waypoint_action
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.data.segments import Segments
from diffrl.data.walks import between_visits
from diffrl.diffusion.sampler import SOLVERS
from diffrl.runs.acting import cost_of_acting
from diffrl.support.errors import UserError
from tests.agents.agent_cases import assert_same_gradients

TINY = Diffuser(width=8, layers=2, multipliers=(1, 2), horizon=6, denoising_steps=4, batch_size=3, goal_reaching=True)
SCALES = Preprocessing(
    Normaliser(torch.tensor([1.0, 2.0, 0.0, 0.5]), torch.tensor([2.0, 3.0, 4.0, 5.0])),
    Normaliser(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5])),
)
GOAL = torch.tensor([1.0, 3.0, 0.0, 0.0])


@pytest.fixture
def double() -> Iterator[None]:
    """Networks in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(config: Diffuser = TINY, seeds: tuple[int, ...] = (0, 1), goal: Tensor | None = GOAL) -> DiffuserAgent:
    agent = DiffuserAgent(config, 4, 2, seeds, "cpu")
    agent.prepare(SCALES, goal)
    return agent


def windows(n_seeds: int = 2) -> Segments:
    g, shape = torch.Generator().manual_seed(0), (n_seeds, 3, 6)
    observations, actions = (torch.rand(*shape, n, generator=g) * 2 - 1 for n in (4, 2))
    return Segments(observations, actions, torch.zeros(shape), torch.ones(shape), torch.zeros(shape[:2]).long())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("goal_reaching", [True, False])
@pytest.mark.parametrize("show_ends", [True, False])
@pytest.mark.parametrize("action_weight", [1.0, 10.0])
def test_the_loss_is_the_papers_written_out(goal_reaching: bool, show_ends: bool, action_weight: float) -> None:
    """Window by window: noise, write the known states in, ask the network for x_0, write them in again, square.

    The first row's action, which is executed, has its weight. With `show_ends` each of the six rows is told the known
    states too, and that it is at -1, -.6, ..., 1.
    """
    shown = {"goal_reaching": goal_reaching, "show_ends": show_ends}
    agent = build(dataclasses.replace(TINY, **shown, action_weight=action_weight))
    batch = windows()
    noise = agent.noise(batch, torch.Generator().manual_seed(1))
    rows = [0, 5] if goal_reaching else [0]
    alpha_bar = torch.exp(-noise.t)
    plain = torch.zeros(2)
    for s in range(2):
        for b in range(3):
            x0 = torch.cat([batch.actions[s, b], batch.observations[s, b]], 1)
            x = alpha_bar[s, b].sqrt() * x0 + (1 - alpha_bar[s, b]).sqrt() * noise.eps[s, b]
            x[rows, 2:] = batch.observations[s, b, rows]
            label = 4 * 2 / torch.pi * torch.acos(alpha_bar[s, b].sqrt())
            if show_ends:
                known = batch.observations[s, b, rows].flatten().expand(6, -1)
                x = torch.cat([x, known, torch.tensor([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0])[:, None]], 1)
            both = agent.denoiser(x.expand(2, 1, -1, -1), label.expand(2, 1))
            keep = torch.ones(6, 6)
            keep[rows, 2:] = 0
            keep[0, :2] = action_weight
            plain[s] = plain[s] + (keep * (both[s, 0] - x0).square()).mean() / 3
    assert_same_gradients(agent.denoising_loss(batch, noise), plain, agent.denoiser)


def test_the_label_is_the_steps_index_on_the_cosine_schedule() -> None:
    """alpha_bar = cos^2((i/T + .008) / 1.008 pi/2) / cos^2(.008 / 1.008 pi/2): the label is i to a hundredth of T."""
    agent, seen = build(dataclasses.replace(TINY, denoising_steps=64)), []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    agent.network(spy, torch.zeros(2, 63, 6, 6), agent._times[1:-1].expand(2, 63))  # type: ignore[arg-type]
    expected = torch.arange(63, 0, -1).float()
    assert (seen[0][0] - expected).abs().max() < 0.64


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", None), ("ddim", 2), ("dpmpp2m", 3)])
def test_every_plan_begins_at_the_state_and_ends_at_the_goal_at_rest(solver: Any, steps: int | None) -> None:
    agent = build(dataclasses.replace(TINY, solver=solver, sampling_steps=steps))
    assert agent.sampler.n_steps == (steps or 4)
    x = torch.rand(2, 5, 4) * 2 - 1
    plans = agent.plan(x, torch.Generator().manual_seed(0))
    assert plans.shape == (2, 5, 6, 6)
    states = agent.states(plans)
    assert torch.equal(states[:, :, 0], x)
    assert torch.equal(states[:, :, -1], SCALES.observations(GOAL).expand(2, 5, 4))
    assert plans[..., :2].abs().max() <= 1
    assert plans[:, :, 1:-1].abs().max() <= 1


def test_without_a_goal_only_the_first_state_is_given_and_the_plans_own_actions_are_taken() -> None:
    agent = build(dataclasses.replace(TINY, goal_reaching=False, replan_every=3), goal=None)
    x = torch.rand(2, 5, 4)
    plans = agent.plan(x, torch.Generator().manual_seed(0))
    assert torch.equal(plans[:, :, 0, 2:], x)
    assert agent.replan_every == 3
    t = torch.tensor([0, 1, 2, 0, 1]).expand(2, 5)
    actions = agent.follow(plans, t, x)
    for row in range(5):
        assert torch.equal(actions[:, row], plans[:, row, int(t[0, row]), :2])
    assert build(dataclasses.replace(TINY, goal_reaching=False)).replan_every == 1
    assert build().replan_every is None


@pytest.mark.usefixtures("double")
def test_plans_of_a_batch_are_those_of_its_rows_under_the_same_noise() -> None:
    """And a seed alone plans as it does in the stack. In double, to 1e4 roundings of 1.

    A call of the network is some hundred sums, and three further calls let their rounding grow.
    """
    agent, g = build(), torch.Generator().manual_seed(0)
    x, noise = torch.rand(2, 5, 4), torch.randn(1 + agent.sampler.n_noise, 2, 5, 6, 6, generator=g)
    plans = agent.plan_from(x, noise)
    for row in range(5):
        one = agent.plan_from(x[:, row : row + 1], noise[:, :, row : row + 1])
        torch.testing.assert_close(one[:, 0], plans[:, row], rtol=0, atol=1e4 * 2**-52)
    alone = build(seeds=(1,))
    torch.testing.assert_close(alone.plan_from(x[1:], noise[:, 1:])[0], plans[1], rtol=0, atol=1e4 * 2**-52)


def test_the_controller_on_a_straight_line_has_a_closed_form() -> None:
    """Waypoints c + i d at velocity v: behind by e, at speed u, the action is d + e + v - u, and at the end e - u."""
    c, d, v = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5]), torch.tensor([3.0, -1.0])
    e, u = torch.tensor([0.125, -0.5]), torch.tensor([2.0, 0.25])
    line = torch.stack([torch.cat([c + i * d, v]) for i in range(5)]).expand(1, 7, 5, 4)
    t = torch.arange(7)[None]
    here = torch.stack([torch.cat([c + min(i, 4) * d - e, u]) for i in range(7)])[None]
    actions = waypoint_action(line, t, here)
    expected = torch.stack([d + e + v - u if i < 4 else e - u for i in range(7)])
    assert torch.equal(actions[0], expected)  # all are sums of few powers of two: exact


def test_the_agent_drives_in_the_environments_units_and_stays_within_its_actions() -> None:
    """Actions are bounded by [-1, 1] x [0, 1] in the environment: the second's agent unit is (a - .5) / .5."""
    agent = build()
    plans = torch.zeros(2, 1, 6, 6)
    plans[..., 2] = 0.125  # rows .25 ahead of row 0 in the environment, where z = 0
    plans[:, :, 0, 2:] = 0
    actions = SCALES.actions.inverse(agent.follow(plans, torch.zeros(2, 1).long(), torch.zeros(2, 1, 4)))
    assert torch.equal(actions, torch.tensor([0.25, 0.0]).expand(2, 1, 2))
    far = agent.follow(10 * plans + 10, torch.zeros(2, 1).long(), torch.zeros(2, 1, 4))
    assert torch.equal(far, torch.ones(2, 1, 2))


def test_the_average_copies_up_to_its_start_and_then_moves_by_its_rate() -> None:
    agent = build(dataclasses.replace(TINY, ema_start=2, ema_every=2, ema_rate=0.25))
    g, batch = torch.Generator().manual_seed(0), windows()
    for step in range(5):
        before = [p.clone() for p in agent.average.parameters()]
        agent.update(batch, g)
        rate = {0: 1.0, 2: 0.25, 4: 0.25}.get(step, 0.0)
        for old, now, goal in zip(before, agent.average.parameters(), agent.denoiser.parameters(), strict=True):
            torch.testing.assert_close(now, old + rate * (goal - old))


class Counting(Planner):
    """A plan is (row number of the call, its observation, how many plans there were before); actions tell it."""

    def __init__(self, replan_every: int | None) -> None:
        super().__init__(BC(), 1, 3, (0, 1), "cpu")
        self.replan_every, self.calls = replan_every, 0

    def update(self, batch: Any, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        raise NotImplementedError

    def plan(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        self.calls += 1
        return torch.cat([observations, torch.full_like(observations, self.calls)], -1)

    def follow(self, plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        return torch.cat([plans, t.unsqueeze(-1)], -1)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_a_plan_is_kept_for_its_steps_and_dropped_where_an_episode_begins(every: int | None) -> None:
    """At step n the action tells of the observation at the plan's beginning, n - n mod K, and of the step n mod K."""
    agent = Counting(every)
    follow = Follower(agent, torch.Generator())
    for n in range(7):
        actions = follow(torch.full((2, 4, 1), float(n)))
        t = n if every is None else n % every
        assert (actions[..., 0] == n - t).all()
        assert (actions[..., 2] == t).all()
    assert agent.calls == (1 if every is None else -(-7 // every))
    follow.reset([2])  # one row begins anew, the others go on
    actions = follow(torch.full((2, 4, 1), 7.0))
    assert actions[0, 2].tolist()[::2] == [7, 0]
    t = 7 if every is None else 7 % every
    assert actions[0, 1].tolist()[::2] == [7 - t, t]
    with pytest.raises(ValueError, match="the 4 rows that plans are kept for, got 3: call reset"):
        follow(torch.zeros(2, 3, 1))
    follow.reset()
    assert (follow(torch.full((2, 3, 1), 9.0))[..., ::2] == torch.tensor([9.0, 0.0])).all()


def test_rows_whose_episode_is_over_are_not_planned_for_until_they_begin_anew() -> None:
    """Rows 1 and 2 of four end after the first step, and row 2 begins anew: replanned at every second step."""
    agent, planned = Counting(2), []
    plan = agent.plan
    agent.plan = lambda x, g: planned.append(x.shape[1]) or plan(x, g)  # type: ignore[method-assign, func-returns-value]
    follow = Follower(agent, torch.Generator())
    steps = []
    for n in range(7):
        actions = follow(torch.full((2, 4, 1), float(n)))
        steps.append(actions[0, :, ::2].tolist())
        if n == 0:
            follow.finish([1, 2])
        if n == 4:
            follow.reset([2])
    assert planned == [4, 2, 2, 1, 2]  # at steps 0, 2, 4; 5 for row 2; 6 for rows 0 and 3
    assert [step[0] for step in steps] == [[0, 0], [0, 1], [2, 0], [2, 1], [4, 0], [4, 1], [6, 0]]
    assert [step[1] for step in steps] == [[0, t % 2] for t in range(7)]
    assert [step[2] for step in steps[5:]] == [[5, 0], [5, 1]]
    follow.reset()
    follow(torch.zeros(2, 4, 1))
    follow(torch.zeros(2, 4, 1))
    follow(torch.zeros(2, 4, 1))
    assert planned[5:] == [4, 4]


def test_acting_is_planning_and_its_first_step() -> None:
    agent, x = build(), torch.rand(2, 5, 4)
    once = agent.act(x, torch.Generator().manual_seed(3))
    assert torch.equal(once, Follower(agent, torch.Generator().manual_seed(3))(x))


def test_a_walk_is_cut_where_the_goal_is_left_and_joined_where_it_goes_on() -> None:
    """Rows 0 to 9 at 0, 1, ... but for a jump of 5 before row 7; in the goal at rows 2 and 3, timeouts at 5 and 6."""
    x = np.arange(10, dtype=np.float32)
    x[7:] += 5
    rewards, timeouts = np.zeros(10, np.float32), np.zeros(10, bool)
    rewards[2:4], timeouts[[5, 6]] = 1, True
    data = OfflineDataset(x[:, None], np.zeros((10, 1), np.float32), rewards, np.zeros(10, bool), timeouts)
    assert between_visits(data).episodes().tolist() == [[0, 4], [4, 7], [7, 10]]
    assert TINY.episodes(data).episodes().tolist() == [[0, 4], [4, 7], [7, 10]]
    assert dataclasses.replace(TINY, goal_reaching=False).episodes(data) is data


@pytest.mark.parametrize("solver", ["ddpm", *SOLVERS])
def test_the_calls_of_a_plan_are_those_that_are_made(solver: Any) -> None:
    agent = build(dataclasses.replace(TINY, goal_reaching=False, denoising_steps=6, sampling_steps=4, solver=solver))
    made: list[int] = []
    agent.average.register_forward_hook(lambda *_: made.append(1))
    agent.plan(torch.zeros(2, 3, 4), torch.Generator().manual_seed(0))
    assert len(made) == agent.calls


def test_what_acting_costs_is_said_of_plans_that_are_dear_and_soon_dropped() -> None:
    """Calls a plan, over the steps that it is followed; nothing of one plan an episode, nor of agents without plans."""
    dear = dataclasses.replace(TINY, goal_reaching=False, denoising_steps=30)
    options = "--agent.replan-every, --agent.sampling-steps and --agent.solver lower that."
    said = cost_of_acting(build(dear))
    assert said.startswith("Acting takes 30 network calls a step (a new plan at every step)")
    assert said.endswith(options)
    seldom = cost_of_acting(build(dataclasses.replace(dear, replan_every=3)))
    assert "Acting takes 10 network calls a step (a plan of 30 calls every 3 steps)" in seldom
    assert cost_of_acting(build(dataclasses.replace(dear, replan_every=4))) == ""
    assert cost_of_acting(build(dataclasses.replace(dear, goal_reaching=True))) == ""
    assert cost_of_acting(BC().build(4, 2, (0,))) == ""


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(UserError, match="nothing says where it is"):
        build(goal=None).plan(torch.zeros(2, 1, 4), torch.Generator())
    with pytest.raises(UserError, match="3 observations and 2 actions"):
        TINY.build(3, 2, (0,))
    with pytest.raises(UserError, match=r"sampling-steps.*at most --agent.denoising-steps, 4"):
        dataclasses.replace(TINY, sampling_steps=5)
    with pytest.raises(UserError, match="multipliers"):
        dataclasses.replace(TINY, layers=3)
    with pytest.raises(UserError, match=r"replan-every.*at most --agent.horizon, 6"):
        dataclasses.replace(TINY, goal_reaching=False, replan_every=7)


def test_noise_is_drawn_uniformly_over_the_grid() -> None:
    agent = build()
    noise: DiffuserNoise = agent.noise(windows(), torch.Generator().manual_seed(0))
    assert noise.eps.shape == (2, 3, 6, 6)
    assert set(noise.t.flatten().tolist()) <= set(agent._times[:-1].tolist())
