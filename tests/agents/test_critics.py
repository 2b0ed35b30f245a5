"""Ensembles of critics: what counts of their values, by itself and in the losses and choices of the agents."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from agents import AGENTS, TD3BC, DiffusionQL
from agents.base_config import Aggregate, CriticConfig
from agents.critic import CandidateNoise, aggregate
from agents.diffusion_policy import DiffusionNoise
from agents.diffusion_ql import DiffusionQLAgent, DiffusionQLNoise
from agents.td3_bc import TD3BCAgent
from diffrl.tuning.target import chain_policy
from tests.agents.agent_cases import assert_same_gradients, make_batch

WITH_CRITICS = [config for _, config in sorted(AGENTS.items()) if issubclass(config, CriticConfig)]
SIZE: dict[str, Any] = {"width": 16, "layers": 2, "batch_size": 8}
HOW: tuple[Aggregate, ...] = ("min", "mean", "lcb")


def plainly(q: Tensor, how: Aggregate, spread: float) -> Tensor:
    """Of q (n, B), critic by critic."""
    values = list(q)
    if how == "min":
        smallest = values[0]
        for value in values[1:]:
            smallest = torch.minimum(smallest, value)
        return smallest
    mean = sum(values[1:], start=values[0]) / len(values)
    if how == "mean":
        return mean
    variance = torch.stack([(value - mean) ** 2 for value in values]).sum(0) / len(values)
    return mean - spread * variance.sqrt()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("n", [2, 3, 10])
def test_one_value_of_many_is_its_definition_with_its_gradient(how: Aggregate, n: int) -> None:
    q = torch.randn(3, n, 7, dtype=torch.float64, requires_grad=True)
    ours = aggregate(q, how, 0.7)
    plain = torch.stack([plainly(one, how, 0.7) for one in q])
    torch.testing.assert_close(ours, plain)
    weights = torch.randn(3, 7, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * value).sum(), q)[0] for value in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_of_two_critics_the_lower_confidence_bound_at_one_deviation_is_their_minimum() -> None:
    q = torch.randn(4, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(aggregate(q, "lcb", 1.0), aggregate(q, "min"))


@pytest.mark.parametrize("how", HOW)
def test_critics_that_agree_count_as_one_and_have_finite_gradients(how: Aggregate) -> None:
    q = torch.randn(2, 1, 5).expand(-1, 4, -1).clone().requires_grad_()
    value = aggregate(q, how)
    torch.testing.assert_close(value, q[:, 0])
    (gradient,) = torch.autograd.grad(value.sum(), q)
    torch.testing.assert_close(gradient.sum(1), torch.ones(2, 5))


@pytest.mark.parametrize("how", HOW)
def test_diffusion_ql_bootstraps_climbs_and_chooses_by_what_it_is_told(how: Aggregate) -> None:
    config = DiffusionQL(
        **SIZE, n_critics=5, q_agg=how, q_spread=1.5, actor_q=how, act_candidates=6, act_temperature=0.0
    )
    agent, batch = config.build(3, 2, (0,)), make_batch()
    assert isinstance(agent, DiffusionQLAgent)
    noise = torch.randn(6, 1, 8, 2)
    q = agent.target_critic(batch.next_observations, agent.ema_actor.sample(batch.next_observations, noise))[0]
    assert q.shape == (5, 8)
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * plainly(q, how, 1.5)
    torch.testing.assert_close(agent.target(batch, noise)[0], expected)

    loss, _ = agent.critic_loss(batch, noise)
    values = agent.critic(batch.observations, batch.actions)[0]
    errors = [((value - expected.detach()) ** 2).mean() for value in values]
    assert_same_gradients(loss, sum(errors[1:], start=errors[0])[None], agent.critic)

    cloning = DiffusionNoise(i=(torch.arange(8) % 5)[None], eps=torch.randn(1, 8, 2))
    actor_loss, _ = agent.actor_loss(batch, DiffusionQLNoise(cloning, noise, torch.tensor([[0.3]])))
    climbed = plainly(agent.critic(batch.observations, agent.actor.sample(batch.observations, noise))[0], how, 1.5)
    bc_loss = agent.actor.bc_loss(batch.actions, batch.observations, cloning)
    plain = bc_loss - climbed.mean() / climbed.abs().mean().detach()
    assert_same_gradients(actor_loss, plain, agent.actor)

    observations = torch.randn(1, 4, 3)
    chosen = agent.act(observations, torch.Generator().manual_seed(1))
    repeated = observations.repeat_interleave(6, 1)
    with torch.no_grad():
        drawn = agent.actor.sample(repeated, torch.randn(6, 1, 24, 2, generator=torch.Generator().manual_seed(1)))
        value = plainly(agent.target_critic(repeated, drawn)[0], how, 1.5).view(4, 6)
    for i, best in enumerate(value.argmax(1).tolist()):
        torch.testing.assert_close(chosen[0, i], drawn[0, 6 * i + best])


@pytest.mark.parametrize(("coin", "climbed"), [(0.0, 0), (0.32, 0), (0.34, 1), (0.7, 2), (0.9999, 2)])
def test_of_three_critics_one_is_climbed_and_the_next_one_scales_it(coin: float, climbed: int) -> None:
    agent, batch = DiffusionQL(**SIZE, n_critics=3).build(3, 2, (0,)), make_batch()
    assert isinstance(agent, DiffusionQLAgent)
    q = agent.critic(batch.observations, batch.actions)[0]
    _, metrics = agent.weighted(torch.zeros(1), batch.observations, batch.actions, torch.tensor([[coin]]))
    expected = -q[climbed].mean() / q[(climbed + 1) % 3].abs().mean()
    torch.testing.assert_close(metrics["q_loss"][0], expected.detach())


@pytest.mark.parametrize(("coin", "climbed"), [(0.32, 0), (0.34, 1), (0.7, 2)])
def test_the_critic_that_is_climbed_may_scale_itself(coin: float, climbed: int) -> None:
    agent, batch = DiffusionQL(**SIZE, n_critics=3, actor_q="random_own").build(3, 2, (0,)), make_batch()
    assert isinstance(agent, DiffusionQLAgent)
    q = agent.critic(batch.observations, batch.actions)[0]
    _, metrics = agent.weighted(torch.zeros(1), batch.observations, batch.actions, torch.tensor([[coin]]))
    torch.testing.assert_close(metrics["q_loss"][0], (-q[climbed].mean() / q[climbed].abs().mean()).detach())


@pytest.mark.parametrize("which", ["target", "online"])
def test_candidates_are_ranked_by_the_critics_that_are_named(which: Literal["target", "online"]) -> None:
    config = DiffusionQL(**SIZE, act_candidates=16, act_temperature=0.0, act_critics=which)
    agent, other = config.build(3, 2, (0,)), config.build(3, 2, (1,))
    assert isinstance(agent, DiffusionQLAgent)
    agent.target_critic.load_state_dict(other.networks["critic"].state_dict())
    observations = torch.randn(1, 9, 3)
    repeated, noise = observations.repeat_interleave(16, 1), torch.randn(6, 1, 144, 2)
    chosen = agent.act_from(observations, CandidateNoise(noise, gumbel=torch.zeros(1, 9, 16)))
    drawn = agent.actor.sample(observations, noise)
    picks = {
        name: drawn[0, 16 * torch.arange(9) + critic(repeated, drawn)[0].amin(0).view(9, 16).argmax(1)]
        for name, critic in (("target", agent.target_critic), ("online", agent.critic))
    }
    torch.testing.assert_close(chosen[0], picks[which])
    assert not torch.allclose(picks["target"], picks["online"])


@pytest.mark.parametrize("how", ["first", *HOW])
def test_td3_bc_climbs_the_first_critic_or_what_it_is_told(how: Any) -> None:
    agent, batch = TD3BC(**SIZE, n_critics=3, actor_q=how, q_spread=2.0).build(3, 2, (0,)), make_batch()
    assert isinstance(agent, TD3BCAgent)
    loss, _ = agent.actor_loss(batch)
    actions = torch.tanh(agent.actor(batch.observations))
    q = agent.critic(batch.observations, actions)[0]
    value = q[0] if how == "first" else plainly(q, how, 2.0)
    plain = ((actions - batch.actions) ** 2).mean() - 2.5 * value.mean() / value.abs().mean().detach()
    assert_same_gradients(loss, plain[None], agent.actor)


def test_the_averaged_actor_acts_where_it_is_asked_to_and_one_draw_asks_no_critic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DiffusionQL(**SIZE, act_with="average", act_candidates=1)
    agent = config.build(3, 2, (0,))
    assert isinstance(agent, DiffusionQLAgent)
    other = config.build(3, 2, (1,))
    assert isinstance(other, DiffusionQLAgent)
    agent.ema_actor.load_state_dict(other.actor.state_dict())
    monkeypatch.setattr(agent.target_critic, "forward", None)
    observations, noise = torch.randn(1, 9, 3), torch.randn(6, 1, 9, 2, generator=torch.Generator().manual_seed(2))
    drawn = agent.act(observations, torch.Generator().manual_seed(2))
    torch.testing.assert_close(drawn, agent.ema_actor.sample(observations, noise))
    assert not torch.allclose(drawn, agent.actor.sample(observations, noise))
    assert chain_policy(agent) is agent.ema_actor  # what is fine-tuned and diagnosed is what acts
    other_config = dataclasses.replace(config, act_with="actor")
    plain = other_config.build(3, 2, (0,))
    assert chain_policy(plain) is plain.networks["actor"]


@pytest.mark.parametrize("act_with", ["actor", "average"])
def test_the_first_steps_that_do_not_reach_the_acting_network_are_counted(
    act_with: Literal["actor", "average"],
) -> None:
    config = DiffusionQL(**SIZE, act_with=act_with, ema_start=3, ema_every=1)
    agent, batch, generator = config.build(3, 2, (0,)), make_batch(), torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    steps = 0
    while all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True)):
        agent.update(batch, generator)
        steps += 1
    assert steps == config.untrained_steps + 1


@pytest.mark.parametrize("config", WITH_CRITICS, ids=lambda config: config.name)
def test_every_agent_with_critics_trains_any_number_of_them_by_any_rule(config: type[CriticConfig]) -> None:
    """The members differ, all of them move, and a step by the mean is another one than by the min."""
    states = []
    for how in HOW:
        agent = config(**SIZE, n_critics=4, q_agg=how).build(3, 2, (0, 1))
        first = agent.state_dict()["critic.mlp.linears.0.weight"]
        assert first.shape[:2] == (2, 4)
        before = first.clone()
        assert not torch.equal(before[:, 0], before[:, 3])
        for step in range(2):
            agent.update(make_batch(2, seed=step), torch.Generator().manual_seed(step), step % agent.period)
        assert (first != before).flatten(2).any(-1).all()
        states.append(agent.state_dict())
    name = "value.linears.0.weight" if "value.linears.0.weight" in states[0] else "critic.mlp.linears.0.weight"
    assert not torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[1][name], states[2][name])


def test_a_number_of_critics_that_cannot_be_is_refused() -> None:
    from diffrl.support.errors import UserError

    with pytest.raises(UserError, match="n-critics is 0; expected at least 1"):
        dataclasses.replace(DiffusionQL(), n_critics=0)
