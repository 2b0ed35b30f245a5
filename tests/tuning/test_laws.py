"""What a policy's chain and its advantages are: identities, without training."""

import numpy as np
import pytest
import torch

from agents.diffusion_policy import DiffusionPolicy
from diffrl.alignment.gae import RewardScale, gae
from diffrl.nets import seed_generator
from tests.rounding import assert_equal_to_rounding


def policy(steps: int = 5) -> DiffusionPolicy:
    made = DiffusionPolicy(3, 2, [seed_generator(0), seed_generator(1)], width=32, layers=2, steps=steps, schedule="vp")
    for parameter in made.parameters():  # far from the small outputs of a fresh network
        parameter.data *= 2
    return made


def drawn(policy: DiffusionPolicy, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    observations = torch.randn(2, rows, 3, generator=generator)
    return observations, policy.sampling_noise(observations, generator)


@pytest.mark.parametrize("early", [0, 2])
def test_the_chain_is_the_policys_own_sampling(early: int) -> None:
    """The same noise leads through the same states to the same action, to the bit, with a frozen start too."""
    actor = policy()
    actor.freeze_start(early)
    for parameter in actor.mlp.parameters():  # as training would
        parameter.data += 0.05
    observations, noise = drawn(actor)
    with torch.no_grad():
        rollout = actor.chain().rollout(actor.step_denoiser(observations), noise[0], noise=noise[1:])
        general = actor.chain().rollout(actor.denoiser(observations), noise[0], noise=noise[1:])
        assert torch.equal(rollout.x, actor.sample(observations, noise))
        states = actor.sampler(
            actor.step_denoiser(observations), noise[0], noise=noise[1:], clip=(-1.0, 1.0), return_chain=True
        )
    assert torch.equal(rollout.states, states)
    assert_equal_to_rounding(general.states, states, 64)  # five steps of a network of sums of some 32


def test_a_frozen_start_is_the_network_as_it_was() -> None:
    """Its first n states do not follow what is learned, and its last follow it; the whole is in the state."""
    actor, before = policy(), policy()
    actor.freeze_start(2)
    observations, noise = drawn(actor)
    for name, parameter in actor.named_parameters():
        assert parameter.requires_grad != name.startswith("early.")
    for parameter in actor.mlp.parameters():
        parameter.data += 0.05
    with torch.no_grad():
        a, b = (p.chain().rollout(p.step_denoiser(observations), noise[0], noise=noise[1:]) for p in (actor, before))
    assert torch.equal(a.states[:3], b.states[:3])
    assert not torch.equal(a.states[3], b.states[3])
    again = policy()
    again.freeze_start(2)
    again.load_state_dict(actor.state_dict())
    assert torch.equal(again.sample(observations, noise), actor.sample(observations, noise))
    with pytest.raises(ValueError, match="from 0 to 4"):
        actor.freeze_start(5)


def test_gae_is_the_sum_of_the_errors_of_the_episode() -> None:
    """Against the definition, summed directly, over episodes that end, are cut, and go on past the last row."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, following = torch.randn(3, 9, 2, generator=generator).double()
    terminals = torch.zeros(9, 2).double()
    terminals[3, 0] = terminals[8, 1] = 1
    ends = terminals.clone()
    ends[5, 0] = ends[2, 1] = 1  # cut: bootstrapped, but the sum stops
    discount, decay = 0.9, 0.7
    result = gae(rewards, values, following, terminals, ends, discount, decay)
    for column in range(2):
        for t in range(9):
            total, weight = 0.0, 1.0
            for k in range(t, 9):
                ahead = 0.0 if terminals[k, column] else discount * float(following[k, column])
                total += weight * (float(rewards[k, column]) + ahead - float(values[k, column]))
                if ends[k, column]:
                    break
                weight *= discount * decay
            assert float(result[t, column]) == pytest.approx(total, abs=1e-12)


def test_decay_1_gives_returns_and_decay_0_errors() -> None:
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [0.25], [0.75]])
    following, ends = torch.tensor([[0.25], [0.75], [9.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    whole = gae(rewards, values, following, ends, ends, 0.5, 1.0)
    assert float(whole[0]) == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 - 0.5)
    assert float(gae(rewards, values, following, ends, ends, 0.5, 0.0)[0]) == pytest.approx(1 + 0.5 * 0.25 - 0.5)


def test_reward_scale_is_the_deviation_of_all_discounted_returns() -> None:
    """In parts or at once; each seed its own; episodes do not leak into one another."""
    rewards = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0])[:, None]
    ends = torch.zeros(12, 2, 3)
    ends[4, 0] = ends[7, 1] = 1
    scale = RewardScale(2, 3, 0.9)
    scale(rewards[:5], ends[:5])
    last = scale(rewards[5:], ends[5:])
    G, returns = np.zeros((2, 3)), []
    for t in range(12):
        G = rewards[t].double().numpy() + 0.9 * G
        returns.append(G)
        G = G * (1 - ends[t].numpy())
    std = np.sqrt(np.array(returns).transpose(1, 0, 2).reshape(2, -1).var(1) + 1e-8)
    np.testing.assert_allclose(last, rewards[5:].numpy() / std[:, None], rtol=1e-5)
