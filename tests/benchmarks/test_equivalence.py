"""What the benchmark compares is one and the same mathematics.

The baselines (plain PyTorch, JAX) get our agents' weights, a batch and all random draws: losses, gradients and whole
steps must agree with ours in float32. Networks are compared as lists of MLPs, an MLP as a list of weights (in, out)
and biases (out,); a policy is its time embedding and its network, a twin critic its two heads.
"""

import dataclasses
from typing import Any

import numpy as np
import plain
import pytest
import torch
from torch import Tensor, nn
from workload import AGENTS_TIMED

from agents import AGENTS, BC, DiffusionQL
from agents.base import Agent
from agents.base_config import AgentConfig
from agents.bc import BCAgent, DiffusionBCAgent
from agents.critic import CriticEnsemble
from agents.diffusion_policy import DiffusionNoise, DiffusionPolicy
from agents.diffusion_ql import DiffusionQLAgent, DiffusionQLNoise
from diffrl.data.transitions import Batch

try:
    import jax
    import jax.numpy as jnp
    import jax_version

    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time here
except ImportError:
    jax = None

OBS, ACT, B = 5, 2, 32
needs_jax = pytest.mark.skipif(jax is None, reason="jax is not installed (pip install 'diffrl[dev]')")
agents = pytest.mark.parametrize("name", AGENTS_TIMED)
Mlps = list[list[tuple[Any, Any]]]


def config_of(name: str) -> AgentConfig:
    """A small agent, whose averages move visibly and whose gradients are clipped."""
    config = AGENTS[name](width=24, layers=2, batch_size=B)
    if not isinstance(config, BC):
        config = dataclasses.replace(config, denoising_steps=3)
    if isinstance(config, DiffusionQL):
        return dataclasses.replace(config, ema_start=1, ema_every=2, ema_rate=0.3, target_rate=0.2, grad_clip=0.5)
    return config


def make_batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(
        observations=torch.randn(1, B, OBS, generator=g),
        actions=torch.rand(1, B, ACT, generator=g) * 2 - 1,
        rewards=3 * torch.randn(1, B, generator=g),
        next_observations=torch.randn(1, B, OBS, generator=g),
        terminals=(torch.rand(1, B, generator=g) < 0.3).float(),
        episodes=torch.zeros(1, B),
        steps=torch.zeros(1, B),
    )


# --- Ours: the only places that call our agents -------------------------------------------------------------------


@dataclasses.dataclass
class Draws:
    """All that is random in a step of ours, with the axis of seeds."""

    cloning: DiffusionNoise
    t: Tensor
    """The times of `cloning`, whose numbers it has."""
    target_noise: Tensor | None = None
    actor: DiffusionQLNoise | None = None


def our_draws(agent: Agent, batch: Batch, generator: torch.Generator) -> Draws | None:
    """The draws that `agent.update(batch, generator)` would make, in its order."""
    if isinstance(agent, DiffusionBCAgent):
        cloning = agent.actor.bc_noise(batch.actions, generator)
        return Draws(cloning, agent.actor.times[cloning.i])
    if isinstance(agent, DiffusionQLAgent):
        target_noise = agent.actor.sampling_noise(batch.next_observations, generator)
        actor = agent.actor_noise(batch, generator)
        return Draws(actor.cloning, agent.actor.times[actor.cloning.i], target_noise, actor)
    return None


def our_losses(agent: Agent, batch: Batch, draws: Draws | None) -> dict[str, Tensor]:
    """The losses by the name of the network that each trains."""
    match agent:
        case BCAgent():
            return {"actor": agent.bc_loss(batch)}
        case DiffusionBCAgent():
            return {"actor": agent.bc_loss(batch, draws.cloning)}
        case DiffusionQLAgent():
            critic, _ = agent.critic_loss(batch, draws.target_noise)
            actor, _ = agent.actor_loss(batch, draws.actor)
            return {"critic": critic, "actor": actor}
    raise TypeError(type(agent))


def our_mlps(network: nn.Module, tensors: dict[str, Tensor]) -> Mlps:
    """Tensors of a stack of one network, by the names of its parameters (weights themselves, or gradients)."""

    def layers(prefix: str, *head: int) -> list[tuple[Any, Any]]:
        n = sum(name.startswith(prefix) for name in tensors) // 2
        names = [f"{prefix}linears.{i}." for i in range(n)]
        return [(tensors[f"{n}weight"][(0, *head)].numpy(), tensors[f"{n}bias"][(0, *head, 0)].numpy()) for n in names]

    if isinstance(network, DiffusionPolicy):
        return [layers("embed_time.mlp."), layers("mlp.")]
    return [layers("mlp.", 0), layers("mlp.", 1)] if isinstance(network, CriticEnsemble) else [layers("")]


def our_weights(agent: Agent) -> dict[str, Mlps]:
    """All networks' weights, copied."""
    return {
        name: our_mlps(network, {key: value.detach().clone() for key, value in network.named_parameters()})
        for name, network in agent.networks.items()
    }


def our_gradients(agent: Agent, losses: dict[str, Tensor]) -> dict[str, Mlps]:
    """The gradients of each loss by the network that it trains."""
    result = {}
    for name, loss in losses.items():
        names, parameters = zip(*agent.networks[name].named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss.sum(), parameters), strict=True))
        result[name] = our_mlps(agent.networks[name], gradients)
    return result


# --- Plain --------------------------------------------------------------------------------------------------------


def plain_linears(network: nn.Module) -> list[list[nn.Linear]]:
    match network:
        case plain.DiffusionPolicy():
            parts = [network.time_mlp, network.network]
        case plain.Critic():
            parts = [network.q1, network.q2]
        case _:
            parts = [network]
    return [[module for module in part.modules() if isinstance(module, nn.Linear)] for part in parts]


def plain_networks(agent: plain.PlainAgent) -> dict[str, nn.Module]:
    if isinstance(agent, plain.DiffusionQLearning):
        averages = {"ema_actor": agent.ema_actor, "target_critic": agent.critic_target}
        return {"actor": agent.actor, "critic": agent.critic} | averages
    return {"actor": agent.actor}


def plain_twin(config: AgentConfig, weights: dict[str, Mlps]) -> plain.PlainAgent:
    """The plain agent with our weights."""
    twin = plain.build(config, OBS, ACT)
    with torch.no_grad():
        for name, network in plain_networks(twin).items():
            for linears, layers in zip(plain_linears(network), weights[name], strict=True):
                for linear, (weight, bias) in zip(linears, layers, strict=True):
                    linear.weight.copy_(torch.from_numpy(weight).T)
                    linear.bias.copy_(torch.from_numpy(bias))
    return twin


def plain_batch(batch: Batch) -> plain.Batch:
    o, a, r, n, terminal = (column[0] for column in batch[:5])
    return plain.Batch(o, a, n, r[:, None], 1 - terminal[:, None])


def plain_draws(agent: plain.PlainAgent, draws: Draws | None) -> dict[str, Any]:
    """The keyword arguments of `train_step` that stand for our draws."""
    if draws is None:
        return {}
    assert not isinstance(agent, plain.BehaviourCloning)
    t = (agent.actor.labels - draws.t[0][:, None]).abs().argmin(1)
    if isinstance(agent, plain.DiffusionCloning):
        return {"t": t, "eps": draws.cloning.eps[0]}
    eps, sampling = draws.cloning.eps[0], draws.actor.sampling[:, 0]
    return {"draws": plain.Draws(draws.target_noise[:, 0], t, eps, sampling, float(draws.actor.coin))}


def plain_losses(agent: plain.PlainAgent, batch: plain.Batch, draws: dict[str, Any]) -> dict[str, Tensor]:
    if isinstance(agent, plain.DiffusionQLearning):
        critic = agent.critic_loss(batch, draws["draws"].target_noise)
        return {"critic": critic, "actor": agent.actor_loss(batch, **draws)[0]}
    return {"actor": agent.loss(batch, **draws)}


def plain_gradients(agent: plain.PlainAgent, losses: dict[str, Tensor]) -> dict[str, Mlps]:
    result = {}
    for name, loss in losses.items():
        linears = plain_linears(plain_networks(agent)[name])
        parameters = [p for part in linears for linear in part for p in (linear.weight, linear.bias)]
        gradients = iter(torch.autograd.grad(loss, parameters))
        result[name] = [[(next(gradients).T.numpy(), next(gradients).numpy()) for _ in part] for part in linears]
    return result


def plain_weights(agent: plain.PlainAgent) -> dict[str, Mlps]:
    def layers(linears: list[nn.Linear]) -> list[tuple[Any, Any]]:
        return [(linear.weight.detach().T.numpy(), linear.bias.detach().numpy()) for linear in linears]

    return {name: [layers(part) for part in plain_linears(network)] for name, network in plain_networks(agent).items()}


# --- JAX ----------------------------------------------------------------------------------------------------------


def jax_network(mlps: Mlps) -> Any:
    """One MLP as it is; two of unlike sizes are a policy, two of like sizes a twin critic."""
    parts = [[(jnp.asarray(weight), jnp.asarray(bias)) for weight, bias in layers] for layers in mlps]
    if len(parts) == 1:
        return parts[0]
    return tuple(parts) if parts[0][0][0].shape == parts[1][0][0].shape else jax_version.Policy(*parts)


def jax_mlps(network: Any) -> Mlps:
    return [network] if isinstance(network, list) else list(network)


def jax_state(config: AgentConfig, weights: dict[str, Mlps]) -> Any:
    """The state of the JAX version with our weights."""
    state = jax.jit(jax_version.init, static_argnums=(0, 1, 2))(config, OBS, ACT, jax.random.key(0))
    return state._replace(**{name: jax_network(mlps) for name, mlps in weights.items()})


def jax_batch(batch: Batch) -> Any:
    o, a, r, n, terminal = (jnp.asarray(column[0].numpy()) for column in batch[:5])
    return jax_version.Batch(o, a, n, r, terminal)


def jax_draws(draws: Draws | None) -> Any:
    if draws is None:
        return ()
    t, eps = jnp.asarray(draws.t[0].numpy()), jnp.asarray(draws.cloning.eps[0].numpy())
    if draws.actor is None:
        return jax_version.CloningDraws(t, eps)
    target_noise, actor_noise = (jnp.asarray(z[:, 0].numpy()) for z in (draws.target_noise, draws.actor.sampling))
    return jax_version.QLDraws(target_noise, t, eps, actor_noise, jnp.float32(draws.actor.coin.item()))


def jax_losses_and_gradients(
    config: AgentConfig, state: Any, batch: Any, draws: Any
) -> tuple[dict[str, Any], dict[str, Mlps]]:
    if isinstance(config, DiffusionQL):
        arguments = (config, state.ema_actor, state.target_critic, batch, draws.target_noise)
        critic_loss = jax.jit(jax.value_and_grad(jax_version.critic_loss), static_argnums=1)
        critic, critic_gradient = critic_loss(state.critic, *arguments)
        actor_loss = jax.jit(jax.value_and_grad(jax_version.actor_loss, has_aux=True), static_argnums=1)
        (actor, _), actor_gradient = actor_loss(state.actor, config, state.critic, batch, draws)
        gradients = {"critic": jax_mlps(critic_gradient), "actor": jax_mlps(actor_gradient)}
        return {"critic": critic, "actor": actor}, gradients
    loss = jax_version.bc_loss if config.name == "bc" else jax_version.denoising_loss
    value, gradient = jax.jit(jax.value_and_grad(loss))(state.actor, batch, *draws)
    return {"actor": value}, {"actor": jax_mlps(gradient)}


# --- The laws -----------------------------------------------------------------------------------------------------


def flat(mlps: Mlps) -> np.ndarray:
    """All tensors of a network as one vector."""
    return np.concatenate([np.ravel(tensor) for layers in mlps for layer in layers for tensor in layer])


def assert_close(theirs: dict[str, Mlps], ours: dict[str, Mlps], tolerance: float) -> None:
    """Every array agrees to `tolerance` of its largest entry."""
    assert theirs.keys() == ours.keys()
    for name, mlps in ours.items():
        for their_layers, our_layers in zip(theirs[name], mlps, strict=True):
            for theirs_i, ours_i in zip(their_layers, our_layers, strict=True):
                for a, b in zip(theirs_i, ours_i, strict=True):
                    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "coin"), [("bc", 0.0), ("diffusion_bc", 0.0), ("diffusion_ql", 0.2), ("diffusion_ql", 0.8)]
)
@pytest.mark.parametrize("version", ["plain", pytest.param("jax", marks=needs_jax)])
def test_losses_and_gradients_are_ours(version: str, name: str, coin: float) -> None:
    """On either side of Diffusion-QL's coin."""
    config, batch = config_of(name), make_batch(0)
    agent = config.build(OBS, ACT, (0,))
    draws = our_draws(agent, batch, torch.Generator().manual_seed(0))
    if draws is not None and draws.actor is not None:
        draws.actor.coin.fill_(coin)
    losses = our_losses(agent, batch, draws)
    if version == "plain":
        twin = plain_twin(config, our_weights(agent))
        their_losses: dict[str, Any] = plain_losses(twin, plain_batch(batch), plain_draws(twin, draws))
        gradients = plain_gradients(twin, their_losses)
    else:
        state = jax_state(config, our_weights(agent))
        their_losses, gradients = jax_losses_and_gradients(config, state, jax_batch(batch), jax_draws(draws))
    for key, loss in losses.items():
        assert their_losses[key].item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradients, our_gradients(agent, losses), 1e-5)


@pytest.mark.long
@agents
@pytest.mark.parametrize("version", ["plain", pytest.param("jax", marks=needs_jax)])
def test_whole_steps_are_ours(version: str, name: str) -> None:
    """Clipping, Adam and the averages, both sides of the coin among the steps.

    Adam divides a gradient by its size, and so enlarges the rounding of the few that are near 0: the distance between
    two networks is taken over all their weights, and must be less than a thousandth of the way they have gone.
    """
    config = config_of(name)
    agent = config.build(OBS, ACT, (0,))
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    weights, coins = our_weights(agent), []
    twin, state = plain_twin(config, weights), None if version == "plain" else jax_state(config, weights)
    jax_update = None if version == "plain" else jax.jit(jax_version.update_of(config))
    for step in range(6):
        batch = make_batch(step)
        draws = our_draws(agent, batch, same)
        coins += [] if draws is None or draws.actor is None else [float(draws.actor.coin) < 0.5]
        agent.update(batch, generator)
        if version == "plain":
            twin.train_step(plain_batch(batch), **plain_draws(twin, draws))
        else:
            state, _ = jax_update(state, jax_batch(batch), jax_draws(draws))
    assert len(set(coins)) != 1
    after = our_weights(agent)
    theirs = (
        plain_weights(twin) if version == "plain" else {key: jax_mlps(getattr(state, key)) for key in agent.networks}
    )
    for key, network in after.items():
        way = np.linalg.norm(flat(network) - flat(weights[key]))
        assert way > 0
        assert np.linalg.norm(flat(theirs[key]) - flat(network)) < 1e-3 * way, key


@pytest.mark.parametrize("version", ["plain", pytest.param("jax", marks=needs_jax)])
def test_sampled_actions_and_their_values_are_ours(version: str) -> None:
    """What acting draws and how it is judged; the choice itself is a categorical draw in all versions."""
    config = config_of("diffusion_ql")
    agent = config.build(OBS, ACT, (0,))
    assert isinstance(agent, DiffusionQLAgent)
    observations, noise = make_batch(0).observations, torch.randn(4, 1, B, ACT)
    with torch.no_grad():
        actions = agent.actor.sample(observations, noise)
        q = agent.target_critic(observations, actions)[0]
    if version == "plain":
        twin = plain_twin(config, our_weights(agent))
        assert isinstance(twin, plain.DiffusionQLearning)
        with torch.no_grad():
            their_actions = twin.actor.sample(observations[0], noise[:, 0])
            their_q = torch.stack(twin.critic_target(observations[0], their_actions))[..., 0]
    else:
        state = jax_state(config, our_weights(agent))
        states = jnp.asarray(observations[0].numpy())
        their_actions = jax_version.sample(state.actor, states, jnp.asarray(noise[:, 0].numpy()))
        their_q = jnp.stack(jax_version.q_values(state.target_critic, states, their_actions))
    np.testing.assert_allclose(their_actions, actions[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(their_q, q.numpy(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("version", ["plain", pytest.param("jax", marks=needs_jax)])
def test_acting_at_temperature_zero_takes_the_best_candidate(version: str) -> None:
    """The choice itself is a categorical draw by min_i Q_i / temperature, each version with its own generator."""
    K, N = 10, 4
    config = config_of("diffusion_ql")
    assert isinstance(config, DiffusionQL)
    config = dataclasses.replace(config, act_temperature=1e-6)
    agent, states = config.build(OBS, ACT, (0,)), make_batch(0).observations[0, :N]
    if version == "plain":
        twin = plain_twin(config, our_weights(agent))
        assert isinstance(twin, plain.DiffusionQLearning)
        torch.manual_seed(0)
        chosen = twin.act(states, K).numpy()
        torch.manual_seed(0)
        repeated = states.repeat_interleave(K, 0)
        with torch.no_grad():
            candidates = twin.actor.sample(repeated)
            values = torch.min(*twin.critic_target(repeated, candidates)).numpy()
    else:
        state, key = jax_state(config, our_weights(agent)), jax.random.key(0)
        x = jnp.asarray(states.numpy())
        chosen = np.asarray(jax_version.act(config, state, x, key, ACT, K))
        noise = jax.random.normal(jax.random.split(key)[0], (4, N * K, ACT))
        candidates = np.asarray(jax_version.sample(state.actor, jnp.repeat(x, K, 0), noise))
        values = np.minimum(*jax_version.q_values(state.target_critic, jnp.repeat(x, K, 0), candidates))
    best = np.asarray(values).reshape(N, K).argmax(-1)
    np.testing.assert_allclose(chosen, np.asarray(candidates).reshape(N, K, ACT)[np.arange(N), best], atol=1e-6)
