"""QC and QC-FQL: BFN and FQL with action chunks, and with returns of several steps, against their equations."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import BFN, FQL
from agents.bfn import BFNAgent, ChunkedBFNAgent, FlowNoise
from agents.chunks import OpenLoop
from agents.flow_config import ChunkConfig
from agents.fql import ChunkedFQLAgent, FQLAgent
from agents.planning import Follower, Planner
from diffrl.data.chunks import Chunks, ChunkSource
from diffrl.data.transitions import Transitions
from diffrl.runs import config as configuration
from diffrl.support.errors import DataError, UserError
from tests.agents.agent_cases import assert_same_gradients, make_batch, make_chunks, reached, state, weights

H = 3
SIZE: dict[str, Any] = {"width": 16, "layers": 2, "batch_size": 8, "flow_steps": 2}
QC = BFN(**SIZE, act_candidates=7, backup_candidates=5, chunk=H)
QC_FQL = FQL(**SIZE, alpha=3.0, chunk=H)
BOTH = pytest.mark.parametrize("config", [QC, QC_FQL], ids=["bfn", "fql"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: ChunkConfig, seeds: tuple[int, ...] = (0,)) -> Any:
    """The agent, its target critics with other weights than its critics."""
    agent: Any = config.build(3, 2, seeds)
    agent.target_critic.load_state_dict(config.build(3, 2, tuple(s + 1 for s in seeds)).critic.state_dict())  # type: ignore[attr-defined]
    return agent


def critic_loss(agent: Any, batch: Any, z: Tensor) -> Tensor:
    loss: Tensor = agent.critic_loss(batch, z)[0]
    return loss


def flow_loss(agent: Any, batch: Any, t: Tensor, z: Tensor) -> Tensor:
    fql = isinstance(agent, FQLAgent)
    loss: Tensor = agent.flow_loss(batch, t, z) if fql else agent.flow_loss(batch, FlowNoise(t, z))
    return loss


def test_which_class_is_built_and_what_its_networks_take() -> None:
    """With chunks, critics and policies are of H A actions; everything else of FQL and BFN stays."""
    for config, plain, chunked in ((QC, BFNAgent, ChunkedBFNAgent), (QC_FQL, FQLAgent, ChunkedFQLAgent)):
        single = dataclasses.replace(config, chunk=1)
        assert type(single.build(3, 2, (0,))) is plain
        assert type(dataclasses.replace(single, n_step=3).build(3, 2, (0,))) is plain
        agent = build(config)
        assert type(agent) is chunked
        assert agent.critic.mlp.first.weight.shape[-2] == 3 + H * 2
        assert (agent.networks[agent.generative].action_size, agent.action_size) == (H * 2, 2)
        assert (config.plans, single.plans) == (True, False)


@BOTH
def test_the_target_bootstraps_behind_the_chunk_and_what_is_cut_does_not_count(config: ChunkConfig) -> None:
    """Row by row: the sum over valid rows of (Q(s, chunk) - r - gamma^H (1 - terminal) Q'(s_H, chunk'))^2, over B."""
    agent, batch = build(config), make_chunks(size=16)
    assert 0 < batch.valid.sum() < 16
    assert ((batch.valid == 1) & (batch.mask[..., -1] == 0)).any()
    K = 5 if isinstance(agent, BFNAgent) else 1
    z = torch.randn(1, 16 * K, H * 2, generator=generator())
    if isinstance(agent, BFNAgent):
        chosen = agent.best(batch.next_observations, z)
    else:
        chosen = agent.actor(batch.next_observations, z).clip(-1, 1)
    assert chosen.shape == (1, 16, H * 2)
    following = agent.target_critic(batch.next_observations, chosen)[0].mean(0)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    plain = torch.zeros(())
    for b in range(16):
        if batch.valid[0, b]:
            y = batch.rewards[0, b] + 0.99 * 0.99 * 0.99 * (1 - batch.terminals[0, b]) * following[b].detach()
            plain = plain + (q1[b] - y) ** 2 / 16 + (q2[b] - y) ** 2 / 16
    loss = critic_loss(agent, batch, z)
    assert_same_gradients(loss, plain[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


@BOTH
def test_the_flow_clones_the_steps_that_belong_to_the_episode(config: ChunkConfig) -> None:
    """Step by step: |v - (z - a)|^2 of those, over all B H A entries."""
    agent, batch = build(config), make_chunks(size=16)
    t, z = torch.rand(1, 16, generator=generator(1)), torch.randn(1, 16, H * 2, generator=generator(2))
    flow = agent.networks[agent.generative]
    v = flow((1 - t[..., None]) * batch.actions + t[..., None] * z, t, batch.observations)
    plain = torch.zeros(())
    for b in range(16):
        for h in range(int(batch.mask[0, b].sum())):
            for i in (2 * h, 2 * h + 1):
                plain = plain + (v[0, b, i] - (z - batch.actions)[0, b, i]) ** 2 / (16 * H * 2)
    loss = flow_loss(agent, batch, t, z)
    assert_same_gradients(loss, plain[None], flow)
    assert reached(loss, agent.networks) == {agent.generative}


def test_the_one_step_policy_is_distilled_from_whole_chunks() -> None:
    agent, batch = build(QC_FQL), make_chunks()
    z = torch.randn(1, 8, H * 2, generator=generator())
    goal, actions = agent.flow.sample(batch.observations, z), agent.actor(batch.observations, z)
    q = agent.critic(batch.observations, actions.clip(-1, 1)).mean(1)
    plain = 3.0 * ((actions - goal.detach()) ** 2).mean() - q.mean()
    assert_same_gradients(agent.actor_loss(batch, z)[0], plain[None], agent.actor)


def rows_of(dataset_seed: int, n: int = 40) -> Tensor:
    """The rows of `Transitions` of a dozen episodes of 3 to 5 rows, every other one terminal at its end."""
    g = generator(dataset_seed)
    rows = torch.rand(n, 2 * 3 + 2 + 4, generator=g) * 2 - 1
    lengths = [3, 5, 4, 3, 5, 4, 3, 5, 4, 4]
    rows[:, -2] = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths)).float()
    rows[:, -1] = torch.cat([torch.arange(n) for n in lengths]).float()
    rows[:, -3] = 0
    rows[torch.tensor(lengths).cumsum(0)[::2] - 1, -3] = 1
    return rows


@BOTH
def test_losses_and_gradients_do_not_depend_on_what_stands_behind_an_episodes_end(config: ChunkConfig) -> None:
    """Chunks of the first episode, all rows behind it replaced: equal bit for bit."""
    agent, ours, other = build(config), rows_of(0), rows_of(1)
    theirs = torch.cat([ours[:3], other[3:]])
    theirs[:, -3:] = ours[:, -3:]
    losses = []
    for rows in (ours, theirs):
        batch = agent.source(Transitions(rows, 3, 2)).gather(torch.arange(3)[None])
        z, t = torch.randn(1, 3, H * 2, generator=generator()), torch.rand(1, 3, generator=generator())
        loss = torch.cat([critic_loss(agent, batch, z), flow_loss(agent, batch, t, z)])
        gradients = torch.autograd.grad(loss.sum(), [*agent.critic.parameters()])
        losses.append((loss, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


@BOTH
def test_chunks_of_one_action_are_single_actions_to_the_bit(config: ChunkConfig) -> None:
    """The source is the transitions themselves; three steps on their chunks of one give the same weights."""
    single = dataclasses.replace(config, chunk=1)
    transitions = Transitions(rows_of(0), 3, 2)
    states = []
    for chunked in (False, True):
        agent, g = single.build(3, 2, (0, 1)), generator()
        source: Any = agent.source(transitions)
        assert source is transitions
        if chunked:
            source = ChunkSource(transitions, 1, 0.99)
        for _ in range(3):
            agent.update(source.draw(8, 2, g), g)
        states.append(state(agent))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("schema", [BFN, FQL])
def test_returns_of_several_steps_are_the_same_losses_on_single_actions(schema: type[ChunkConfig]) -> None:
    """On a batch of H steps: the target with gamma^H, what is cut left out; the first action is always cloned."""
    one, several = schema(**SIZE), schema(**SIZE, n_step=H)
    ours, theirs = build(several), build(one)
    batch = make_chunks(actions=1)
    assert isinstance(ours.source(Transitions(rows_of(0), 3, 2)), ChunkSource)
    z = torch.randn(1, 8 * (4 if schema is BFN else 1), 2, generator=generator())
    y = batch.rewards + (ours.target(batch, z) - batch.rewards)
    shorter = theirs.target(make_batch()._replace(rewards=torch.zeros(1, 8)), z)
    torch.testing.assert_close(y - batch.rewards, 0.99**2 * shorter)
    q = ours.critic(batch.observations, batch.actions)
    plain = ((q - y[:, None]) ** 2 * batch.valid[:, None]).mean(-1).sum(1)
    assert_same_gradients(critic_loss(ours, batch, z), plain, ours.critic)
    t, z = torch.rand(1, 8, generator=generator()), torch.randn(1, 8, 2, generator=generator())
    plain_batch = make_batch()._replace(actions=batch.actions)
    assert torch.equal(flow_loss(ours, batch, t, z), flow_loss(theirs, plain_batch, t, z))


@BOTH
def test_two_seeds_together_are_each_alone(config: ChunkConfig) -> None:
    pair, batch = config.build(3, 2, (3, 5)), make_chunks(2)
    t, z = torch.rand(2, 8), torch.randn(2, 8, H * 2)
    target_z = torch.randn(2, 40, H * 2) if isinstance(config, BFN) else z
    for i, seed in enumerate((3, 5)):
        one = slice(i, i + 1)
        alone, own = config.build(3, 2, (seed,)), Chunks(*(column[one] for column in batch))
        torch.testing.assert_close(critic_loss(alone, own, target_z[one])[0], critic_loss(pair, batch, target_z)[i])
        torch.testing.assert_close(flow_loss(alone, own, t[one], z[one])[0], flow_loss(pair, batch, t, z)[i])
        if isinstance(alone, FQLAgent) and isinstance(pair, FQLAgent):
            torch.testing.assert_close(alone.actor_loss(own, z[one])[0][0], pair.actor_loss(batch, z)[0][i])


@BOTH
def test_a_step_moves_all_networks(config: ChunkConfig) -> None:
    agent: Any = config.build(3, 2, (0,))
    before = {name: weights(network) for name, network in agent.networks.items()}
    source = agent.source(Transitions(rows_of(0), 3, 2))
    agent.update(source.draw(8, 1, generator()), generator())
    for name, network in agent.networks.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)), name


# --- acting ---------------------------------------------------------------------------------------------------------


@BOTH
def test_a_chunk_is_executed_in_order_each_action_once_and_a_new_one_made_at_its_end(config: ChunkConfig) -> None:
    """What is seen meanwhile has no say; a reset drops the chunk of its row, and the others go on."""
    agent = build(config, (0, 1))
    assert isinstance(agent, OpenLoop)
    made: list[tuple[Tensor, Tensor]] = []
    plan = agent.plan

    def noted(observations: Tensor, g: torch.Generator) -> Tensor:
        chunks = plan(observations, g)
        made.append((observations, chunks.clone()))  # the follower writes new plans into its own tensor
        return chunks

    agent.plan = noted  # type: ignore[method-assign]
    follow = Follower(agent, generator())
    seen = torch.randn(9, 2, 4, 3, generator=generator(5))
    actions = [follow(seen[n]) for n in range(7)]
    assert len(made) == 3
    chunks = [chunk for _, chunk in made]
    for n in range(7):
        assert torch.equal(made[n // H][0], seen[n - n % H])
        assert torch.equal(actions[n], chunks[n // H][:, :, n % H])
    assert len({tuple(a.flatten().tolist()) for a in actions}) == 7
    follow.reset([2])
    action = follow(seen[7])
    assert made[3][0].shape == (2, 1, 3)
    assert torch.equal(action[:, 2], made[3][1][:, 0, 0])
    assert torch.equal(action[:, 1], chunks[2][:, 1, 1])


@BOTH
def test_acting_is_the_first_action_of_what_the_critics_or_the_policy_give(config: ChunkConfig) -> None:
    agent, x = build(config), torch.randn(1, 5, 3)
    K = 7 if config is QC else 1
    z = torch.randn(1, 5 * K, H * 2, generator=generator(1))
    if config is QC:
        states, candidates = x.repeat_interleave(7, dim=1), agent.actor.sample(x, z)
        q = agent.critic(states, candidates).mean(1).view(5, 7)
        chosen = torch.stack([candidates[0, 7 * b + int(q[b].argmax())] for b in range(5)])[None]
    else:
        chosen = agent.actor(x, z).clip(-1, 1)
    torch.testing.assert_close(agent.act(x, generator(1)), chosen[..., :2])
    assert agent.act(x, generator(1)).abs().max() <= 1


def test_what_does_not_go_with_chunks_is_refused() -> None:
    with pytest.raises(UserError, match=r"--agent.n-step.*1 with --agent.chunk 3, whose target is of 3 steps"):
        BFN(chunk=3, n_step=2)
    with pytest.raises(UserError, match=r"--agent.chunk"):
        FQL(chunk=0)
    for config, option in ((dataclasses.replace(QC, chunk=6), "chunk"), (FQL(**SIZE, n_step=6), "n-step")):
        with pytest.raises(DataError, match=f"the 6 steps of a chunk: the longest has 5.*They are --agent.{option}"):
            config.build(3, 2, (0,)).source(Transitions(rows_of(0), 3, 2))
    agent = build(QC)
    assert isinstance(agent, Planner)
    with pytest.raises(UserError, match=r"bfn has chunks of 3 actions \(--agent.chunk\)"):
        agent.sample_actions(torch.zeros(1, 1, 3), generator())
    assert np.isclose(QC.bootstrap_discount, 0.99 * 0.99 * 0.99, rtol=1e-15)


def lock(episodes: int) -> Transitions:
    """Episodes of three steps of +-.5, which the state does not tell of; at their end 1 if all three had one sign."""
    g = generator(7)
    signs = torch.randint(0, 2, (episodes, 3), generator=g) * 2.0 - 1
    rows = torch.zeros(episodes, 3, 2 * 1 + 1 + 4)
    rows[..., 0] = rows[..., 6] = torch.arange(3.0)
    rows[..., 1] = 0.5 * signs + 0.05 * torch.randn(episodes, 3, generator=g)
    rows[..., 2] = rows[..., 0] + 1
    rows[:, 2, 3] = (signs.sum(1).abs() == 3).float()
    rows[:, 2, 4] = 1
    rows[..., 5] = torch.arange(episodes)[:, None]
    return Transitions(rows.flatten(0, 1), 1, 1)


@pytest.mark.long
@pytest.mark.parametrize("schema", [BFN, FQL])
def test_chunks_that_hang_together_are_learned_where_no_state_tells_what_was_done(schema: type[ChunkConfig]) -> None:
    """The cloned flow's chunks have one sign a quarter of the time, as the data's; those of the policy mostly."""
    more: dict[str, Any] = {"act_candidates": 16} if schema is BFN else {"alpha": 1.0}
    size: dict[str, Any] = {"width": 32, "layers": 2, "batch_size": 128, "flow_steps": 5, "learning_rate": 2e-3}
    agent, g = schema(**size, **more, chunk=3).build(1, 1, (0, 1)), generator()
    assert isinstance(agent, OpenLoop)
    source = agent.source(lock(500))
    for _ in range(150):
        agent.update(source.draw(128, 2, g), g)
    x = torch.zeros(2, 300, 1)
    flow: Any = agent.networks[agent.generative]
    for chunks, low, high in (
        (agent.plan(x, g)[..., 0], 0.6, 1.0),
        (flow.sample(x, torch.randn(2, 300, 3, generator=g)), 0.1, 0.4),
    ):
        share = (chunks.sign().sum(-1).abs() == 3).float().mean(1)
        assert (low < share).all()
        assert (share <= high).all()


# --- what ships -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cube-single-play-singletask", "cube-double-play-singletask"])
def test_the_shipped_configurations_are_the_published_ones(task: str) -> None:
    """FQL's and Q-chunking's settings on OGBench's cubes: the same networks, and what tells the four apart."""
    apart = {
        f"fql/{task}-v0": FQL(alpha=300.0),
        f"fql/{task}-v0-qc": FQL(alpha=100.0, chunk=5),
        f"bfn/{task}-v0": BFN(act_candidates=4, backup_candidates=4),
        f"bfn/{task}-v0-qc": BFN(act_candidates=32, backup_candidates=32, chunk=5),
    }
    for name, expected in apart.items():
        config = configuration.find(name)
        agent = config.agent
        assert agent == expected
        assert isinstance(agent, ChunkConfig)
        assert (config.dataset, config.steps, config.eval_episodes) == (f"{task}-v0", 1_000_000, 50)
        assert config.eval_every == 100_000
        assert (agent.width, agent.layers, agent.batch_size, agent.networks) == (512, 4, 256, "published")
        assert (agent.n_critics, agent.q_agg, agent.critic_layer_norm, agent.flow_steps) == (2, "mean", True, 10)
        assert (agent.discount, agent.target_rate, agent.learning_rate) == (0.99, 0.005, 3e-4)
        assert (agent.normalise_observations, agent.reward_tune, agent.n_step) == (False, "no", 1)
        if isinstance(agent, FQL):
            assert (agent.normalise_q, agent.actor_q) == (False, "mean")
