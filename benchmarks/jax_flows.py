"""FQL and BFN in JAX, one jitted function a step: what `flow_step.py` holds ours against, not part of diffrl.

The same mathematics as `agents/fql.py` and `agents/bfn.py` with their authors' networks (shown by
`tests/benchmarks/test_flow_equivalence.py`), written to be fast as `jax_version.py` is, whose Adam and averages it has:
the first layer of a flow is split, so that the state's part is computed once for all Euler steps and all candidates,
and gradients are taken for the weights that a loss trains and for nothing else. Imports no torch.
Shapes: B batch, O observation size, A action size, N candidates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax_version import AdamState, Batch, Layers, Metrics, adam, adam_init, follow, init_mlp

from agents.flow_config import BFN, FQL, FlowConfig

Norms = list[tuple[Array, Array]]
"""Gain and shift of each hidden layer."""


class Critic(NamedTuple):
    """One critic: layers, and the normalisation after each hidden one's activation."""

    layers: Layers
    norms: Norms


Critics = tuple[Critic, ...]


def gelu(x: Array) -> Array:
    """x Phi(x), exact."""
    return jax.nn.gelu(x, approximate=False)


def mlp(layers: Layers, x: Array) -> Array:
    """Hidden layers with GELU, and a linear one: (..., in) -> (..., out)."""
    weight, bias = layers[0]
    return after_first(layers, x @ weight + bias)


def after_first(layers: Layers, h: Array) -> Array:
    """The same without the first layer, whose x W + b is h."""
    for weight, bias in layers[1:]:
        h = gelu(h) @ weight + bias
    return h


def q_value(critic: Critic, x: Array) -> Array:
    """Q of x = [s, a], (B, O + A) -> (B,)."""
    weight, bias = critic.layers[0]
    h = x @ weight + bias
    for (gain, shift), (weight, bias) in zip(critic.norms, critic.layers[1:], strict=True):
        h = gelu(h)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5) * gain + shift
        h = h @ weight + bias
    return h[:, 0]


def q_values(critics: Critics, observations: Array, actions: Array) -> Array:
    """All critics' values: (n, B)."""
    x = jnp.concatenate([observations, actions], -1)
    return jnp.stack([q_value(critic, x) for critic in critics])


def velocity(flow: Layers, actions: Array, t: Array, state_part: Array) -> Array:
    """v_theta(a_t, t, s): actions (B, A), t () or (B, 1); state_part: of `state_part`."""
    A = actions.shape[-1]
    weight, _ = flow[0]
    return after_first(flow, state_part + actions @ weight[:A] + t * weight[A])


def state_part(flow: Layers, observations: Array, action_size: int) -> Array:
    """What the flow's first layer makes of the state, its bias included: (B, width)."""
    weight, bias = flow[0]
    return observations @ weight[action_size + 1 :] + bias


def sample(flow: Layers, observations: Array, z: Array, steps: int) -> Array:
    """The end of Euler's steps from z (B N, A), the N of an observation (B, O) in a row; clamped."""
    part = jnp.repeat(state_part(flow, observations, z.shape[-1]), len(z) // len(observations), 0)
    a = z
    for i in range(steps):
        a = a - velocity(flow, a, jnp.float32(1 - i / steps), part) / steps
    return jnp.clip(a, -1, 1)


def matching_loss(flow: Layers, batch: Batch, t: Array, z: Array) -> Array:
    """E |v_theta(a_t, t, s) - (z - a)|^2; t: (B, 1)."""
    a_t = (1 - t) * batch.actions + t * z
    part = state_part(flow, batch.observations, z.shape[-1])
    return jnp.mean((velocity(flow, a_t, t, part) - (z - batch.actions)) ** 2)


def td_loss(critics: Critics, batch: Batch, y: Array) -> Array:
    """E (y - Q_i(s, a))^2, summed over the critics."""
    return jnp.sum(jnp.mean((q_values(critics, batch.observations, batch.actions) - y) ** 2, -1))


def bellman(config: FlowConfig, batch: Batch, q: Array) -> Array:
    """y = r + gamma (1 - terminal) q."""
    return batch.rewards + config.discount * (1 - batch.terminals) * q


class FQLState(NamedTuple):
    """All that training changes in FQL."""

    flow: Layers
    actor: Layers
    critic: Critics
    target_critic: Critics
    flow_adam: AdamState
    actor_adam: AdamState
    critic_adam: AdamState


class FQLDraws(NamedTuple):
    """All that is random in a step of FQL: (B, A) each, t (B, 1) in (0, 1]."""

    target_z: Array
    flow_z: Array
    z: Array
    t: Array


def fql_actor_loss(actor: Layers, config: FQL, critics: Critics, goal: Array, batch: Batch, z: Array) -> Array:
    """-E mean_i Q_i + alpha E |mu_omega - goal|^2; only `actor` is differentiated."""
    actions = mlp(actor, jnp.concatenate([batch.observations, z], -1))
    q = q_values(critics, batch.observations, jnp.clip(actions, -1, 1)).mean(0)
    return -q.mean() + config.alpha * jnp.mean((actions - goal) ** 2)


def fql_update(config: FQL, state: FQLState, batch: Batch, draws: FQLDraws) -> tuple[FQLState, Metrics]:
    """One step of the critics, the flow and the one-step policy, in our order."""
    rate = config.learning_rate
    next_actions = jnp.clip(mlp(state.actor, jnp.concatenate([batch.next_observations, draws.target_z], -1)), -1, 1)
    y = bellman(config, batch, q_values(state.target_critic, batch.next_observations, next_actions).mean(0))
    c_loss, gradients = jax.value_and_grad(td_loss)(state.critic, batch, y)
    critic, critic_adam = adam(state.critic, gradients, state.critic_adam, rate, 0.0)
    goal = sample(state.flow, batch.observations, draws.z, config.flow_steps)
    a_loss, gradients = jax.value_and_grad(fql_actor_loss)(state.actor, config, critic, goal, batch, draws.z)
    actor, actor_adam = adam(state.actor, gradients, state.actor_adam, rate, 0.0)
    f_loss, gradients = jax.value_and_grad(matching_loss)(state.flow, batch, draws.t, draws.flow_z)
    flow, flow_adam = adam(state.flow, gradients, state.flow_adam, rate, 0.0)
    target = follow(state.target_critic, critic, config.target_rate)
    new = FQLState(flow, actor, critic, target, flow_adam, actor_adam, critic_adam)
    return new, {"critic_loss": c_loss, "actor_loss": a_loss, "flow_loss": f_loss}


class BFNState(NamedTuple):
    """All that training changes in BFN."""

    actor: Layers
    critic: Critics
    target_critic: Critics
    actor_adam: AdamState
    critic_adam: AdamState


class BFNDraws(NamedTuple):
    """All that is random in a step of BFN: target_z (B N, A), z (B, A), t (B, 1) in (0, 1]."""

    target_z: Array
    z: Array
    t: Array


def bfn_update(config: BFN, state: BFNState, batch: Batch, draws: BFNDraws) -> tuple[BFNState, Metrics]:
    """One step of the critics and the flow."""
    rate, (B, A), N = config.learning_rate, batch.actions.shape, config.backup_candidates
    s = batch.next_observations
    candidates = sample(state.actor, s, draws.target_z, config.flow_steps)
    q = q_values(state.critic, jnp.repeat(s, N, 0), candidates).mean(0).reshape(B, N)
    best = candidates.reshape(B, N, A)[jnp.arange(B), q.argmax(-1)]
    y = bellman(config, batch, q_values(state.target_critic, s, best).mean(0))
    c_loss, gradients = jax.value_and_grad(td_loss)(state.critic, batch, y)
    critic, critic_adam = adam(state.critic, gradients, state.critic_adam, rate, 0.0)
    f_loss, gradients = jax.value_and_grad(matching_loss)(state.actor, batch, draws.t, draws.z)
    actor, actor_adam = adam(state.actor, gradients, state.actor_adam, rate, 0.0)
    target = follow(state.target_critic, critic, config.target_rate)
    return BFNState(actor, critic, target, actor_adam, critic_adam), {"critic_loss": c_loss, "flow_loss": f_loss}


def init(config: FlowConfig, observation_size: int, action_size: int, key: Array) -> FQLState | BFNState:
    """The state before the first step; of the sizes of ours, not of their distribution."""
    if config.networks != "published" or config.q_agg != "mean" or not config.critic_layer_norm:
        raise ValueError("only the authors' networks, and the critics' mean, are written here")
    k_flow, k_actor, *k_critics = jax.random.split(key, 2 + config.n_critics)
    size = config.width, config.layers
    flow = init_mlp(k_flow, action_size + 1 + observation_size, action_size, *size)
    one = (jnp.ones(config.width), jnp.zeros(config.width))

    def critics() -> Critics:  # made twice: donated buffers must not be shared
        norms = lambda: [tuple(jnp.copy(part) for part in one) for _ in range(config.layers)]  # noqa: E731
        return tuple(Critic(init_mlp(k, observation_size + action_size, 1, *size), norms()) for k in k_critics)

    critic, target = critics(), critics()
    if isinstance(config, BFN):
        return BFNState(flow, critic, target, adam_init(flow), adam_init(critic))
    assert isinstance(config, FQL)
    actor = init_mlp(k_actor, observation_size + action_size, action_size, *size)
    return FQLState(flow, actor, critic, target, adam_init(flow), adam_init(actor), adam_init(critic))


def draw(config: FlowConfig, action_size: int, key: Array) -> Any:
    """All that is random in a step of the agent."""
    B = config.batch_size
    k_t, k_1, k_2, k_3 = jax.random.split(key, 4)
    t = 1 - jax.random.uniform(k_t, (B, 1))
    z = jax.random.normal(k_1, (B, action_size))
    if isinstance(config, BFN):
        return BFNDraws(jax.random.normal(k_2, (B * config.backup_candidates, action_size)), z, t)
    return FQLDraws(jax.random.normal(k_2, (B, action_size)), z, jax.random.normal(k_3, (B, action_size)), t)
