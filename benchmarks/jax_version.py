"""The agents in JAX, one jitted function a step: the second baseline of `train_step.py`, not part of diffrl.

The same mathematics as `agents/` (shown by `tests/benchmarks/test_equivalence.py`), written to be fast: pure functions
of a state that is donated, the denoising loop unrolled, schedules as constants, Mish with one exponential, Adam by
hand, and the coin of Diffusion-QL choosing weights rather than values, so that only the critic that is climbed is
differentiated. action_size step draws its own batch. Imports no torch.
Shapes: B batch, O observation size, A action size, K candidates, T denoising steps.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from agents.base_config import AgentConfig
from agents.config import BC, DiffusionBC, DiffusionQL
from agents.flow_config import FQL, FlowConfig

Layers = list[tuple[Array, Array]]
"""An MLP: weights (in, out) and biases (out,)."""
Tree = Any
"""A pytree of arrays."""
Critic = tuple[Layers, Layers]
Metrics = dict[str, Array]
TIME_SIZE = 16


class Policy(NamedTuple):
    """Weights of eps_theta."""

    time: Layers
    network: Layers


class Batch(NamedTuple):
    """Transitions: (B, O), (B, A), (B, O), (B,), (B,)."""

    observations: Array
    actions: Array
    next_observations: Array
    rewards: Array
    terminals: Array


class AdamState(NamedTuple):
    """Both moments, and the number of steps made."""

    mean: Tree
    square: Tree
    steps: Array


def mish(x: Array) -> Array:
    """x tanh(softplus(x)), with one exponential."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


def mlp(layers: Layers, x: Array) -> Array:
    """Hidden layers with Mish, and a linear one: (..., in) -> (..., out)."""
    for weight, bias in layers[:-1]:
        x = mish(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def init_mlp(key: Array, inputs: int, outputs: int, width: int, layers: int) -> Layers:
    """Uniform within 1/sqrt(in), as torch.nn.Linear begins."""
    result = []
    for i, o in itertools.pairwise([inputs, *[width] * layers, outputs]):
        key, k_weight, k_bias = jax.random.split(key, 3)
        bound = 1 / math.sqrt(i)
        weight = jax.random.uniform(k_weight, (i, o), minval=-bound, maxval=bound)
        result.append((weight, jax.random.uniform(k_bias, (o,), minval=-bound, maxval=bound)))
    return result


def init_policy(key: Array, observation_size: int, action_size: int, config: DiffusionBC | DiffusionQL) -> Policy:
    """A new diffusion policy."""
    k_time, k_network = jax.random.split(key)
    time = init_mlp(k_time, TIME_SIZE, TIME_SIZE, 2 * TIME_SIZE, 1)
    return Policy(
        time, init_mlp(k_network, action_size + TIME_SIZE + observation_size, action_size, config.width, config.layers)
    )


def vp_times(T: int) -> np.ndarray:
    """t_i = -log(alpha_bar_i) of the "vp" schedule, i = 1 ... T, in float64."""
    i = np.arange(1, T + 1)
    return np.cumsum(0.1 / T + 9.9 * (2 * i - 1) / (2 * T**2))


def eps_network(policy: Policy, actions: Array, t: Array, observations: Array) -> Array:
    """eps_theta(a_t, t, s): actions (B, A), t () or (B,), observations (B, O) -> (B, A)."""
    half = TIME_SIZE // 2
    frequencies = np.exp(-math.log(10_000) / (half - 1) * np.arange(half)).astype(np.float32)
    angles = t[..., None] * frequencies
    time = mlp(policy.time, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
    time = jnp.broadcast_to(time, (*actions.shape[:-1], TIME_SIZE))
    return mlp(policy.network, jnp.concatenate([actions, time, observations], -1))


def denoising_loss(policy: Policy, batch: Batch, t: Array, eps: Array) -> Array:
    """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2); t (B,) are times, not indices."""
    noised = jnp.exp(-t / 2)[:, None] * batch.actions + jnp.sqrt(-jnp.expm1(-t))[:, None] * eps
    return jnp.mean((eps_network(policy, noised, t, batch.observations) - eps) ** 2)


def sample(policy: Policy, observations: Array, noise: Array) -> Array:
    """Actions (B, A) from the reverse process's noise (T + 1, B, A), the start first; a_0 clamped (eq. 1)."""
    T = len(noise) - 1
    times = vp_times(T)
    alpha_bar, before = np.exp(-times), np.exp(-np.concatenate([[0.0], times[:-1]]))
    beta = 1 - alpha_bar / before
    actions = noise[0]
    for z, i in zip(noise[1:], reversed(range(T)), strict=True):
        eps = eps_network(policy, actions, jnp.float32(times[i]), observations)
        a0 = (actions - float(np.sqrt(1 - alpha_bar[i])) * eps) / float(np.sqrt(alpha_bar[i]))
        a0 = jnp.clip(a0, -1, 1)
        on_a0 = beta[i] * np.sqrt(before[i]) / (1 - alpha_bar[i])
        on_at = (1 - before[i]) * np.sqrt(1 - beta[i]) / (1 - alpha_bar[i])
        deviation = np.sqrt(beta[i] * (1 - before[i]) / (1 - alpha_bar[i]))
        actions = float(on_a0) * a0 + float(on_at) * actions
        if i > 0:
            actions = actions + float(deviation) * z
    return actions


def q_values(critic: Critic, observations: Array, actions: Array) -> tuple[Array, Array]:
    """Q_1, Q_2: each (B,)."""
    x = jnp.concatenate([observations, actions], -1)
    return mlp(critic[0], x)[:, 0], mlp(critic[1], x)[:, 0]


def adam_init(parameters: Tree) -> AdamState:
    """Adam's state before the first step."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return AdamState(zeros(parameters), zeros(parameters), jnp.zeros((), jnp.int32))


def adam(parameters: Tree, gradients: Tree, state: AdamState, rate: float, clip: float) -> tuple[Tree, AdamState]:
    """One step of Adam (Kingma & Ba 2015) on gradients clipped to the norm `clip` (0: never)."""
    b1, b2 = 0.9, 0.999
    if clip > 0:
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        factor = jnp.minimum(clip / (norm + 1e-6), 1.0)
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    steps = state.steps + 1
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradients)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.square, gradients)
    step_size = rate / (1 - b1**steps)
    scale = 1 / jnp.sqrt(1 - b2**steps)
    new = jax.tree.map(lambda p, m, v: p - step_size * m / (jnp.sqrt(v) * scale + 1e-8), parameters, mean, square)
    return new, AdamState(mean, square, steps)


def follow(average: Tree, online: Tree, rate: Array | float) -> Tree:
    """(1 - rate) average + rate online."""
    return jax.tree.map(lambda a, o: a + rate * (o - a), average, online)


class ClonerState(NamedTuple):
    """All that training changes in behaviour cloning, either way."""

    actor: Tree
    adam: AdamState


def bc_loss(actor: Layers, batch: Batch) -> Array:
    """E |a - tanh(f(s))|^2."""
    return jnp.mean((jnp.tanh(mlp(actor, batch.observations)) - batch.actions) ** 2)


def bc_update(config: BC, state: ClonerState, batch: Batch, draws: tuple[()]) -> tuple[ClonerState, Metrics]:
    """One step of behaviour cloning."""
    loss, gradients = jax.value_and_grad(bc_loss)(state.actor, batch)
    return ClonerState(*adam(state.actor, gradients, state.adam, config.learning_rate, 0.0)), {"bc_loss": loss}


class CloningDraws(NamedTuple):
    """Times (B,) and noise (B, A) of the denoising loss."""

    t: Array
    eps: Array


def diffusion_bc_update(
    config: DiffusionBC, state: ClonerState, batch: Batch, draws: CloningDraws
) -> tuple[ClonerState, Metrics]:
    """One step of denoising score matching."""
    loss, gradients = jax.value_and_grad(denoising_loss)(state.actor, batch, draws.t, draws.eps)
    new = adam(state.actor, gradients, state.adam, config.learning_rate, config.grad_clip)
    return ClonerState(*new), {"bc_loss": loss}


class QLState(NamedTuple):
    """All that training changes in Diffusion-QL."""

    actor: Policy
    critic: Critic
    ema_actor: Policy
    target_critic: Critic
    actor_adam: AdamState
    critic_adam: AdamState
    step: Array


class QLDraws(NamedTuple):
    """All that is random in a step of Diffusion-QL; the times t (B,) are times, not indices."""

    target_noise: Array
    t: Array
    eps: Array
    actor_noise: Array
    coin: Array


def critic_loss(
    critic: Critic, config: DiffusionQL, ema_actor: Policy, target_critic: Critic, batch: Batch, noise: Array
) -> Array:
    """Eq. 5, summed over both critics; only `critic` is differentiated."""
    next_actions = sample(ema_actor, batch.next_observations, noise)
    q = jnp.minimum(*q_values(target_critic, batch.next_observations, next_actions))
    y = batch.rewards + config.discount * (1 - batch.terminals) * q
    q1, q2 = q_values(critic, batch.observations, batch.actions)
    return jnp.mean((q1 - y) ** 2) + jnp.mean((q2 - y) ** 2)


def actor_loss(actor: Policy, config: DiffusionQL, critic: Critic, batch: Batch, draws: QLDraws) -> tuple[Array, Array]:
    """L_d + eta L_q (eq. 3 and 4), and L_d; only `actor` is differentiated."""
    bc = denoising_loss(actor, batch, draws.t, draws.eps)
    heads = draws.coin < 0.5
    climbed, scaling = (
        jax.tree.map(lambda a, b: jnp.where(heads, a, b), one, other)
        for one, other in ((critic[0], critic[1]), (critic[1], critic[0]))
    )
    x = jnp.concatenate([batch.observations, sample(actor, batch.observations, draws.actor_noise)], -1)
    q_i, q_j = mlp(climbed, x), mlp(scaling, jax.lax.stop_gradient(x))
    return bc - config.q_weight * jnp.mean(q_i) / jnp.mean(jnp.abs(q_j)), bc


def ql_update(config: DiffusionQL, state: QLState, batch: Batch, draws: QLDraws) -> tuple[QLState, Metrics]:
    """One step of the critics, one of the actor, then the averages."""
    c_loss, gradients = jax.value_and_grad(critic_loss)(
        state.critic, config, state.ema_actor, state.target_critic, batch, draws.target_noise
    )
    critic, critic_adam = adam(state.critic, gradients, state.critic_adam, config.critic_lr, config.grad_clip)
    (a_loss, bc), gradients = jax.value_and_grad(actor_loss, has_aux=True)(state.actor, config, critic, batch, draws)
    actor, actor_adam = adam(state.actor, gradients, state.actor_adam, config.actor_lr, config.grad_clip)
    due = (state.step >= config.ema_start) & (state.step % config.ema_every == 0)
    ema_actor = follow(state.ema_actor, actor, config.ema_rate * due)
    target_critic = follow(state.target_critic, critic, config.target_rate)
    new = QLState(actor, critic, ema_actor, target_critic, actor_adam, critic_adam, state.step + 1)
    return new, {"actor_loss": a_loss, "bc_loss": bc, "critic_loss": c_loss}


def init(config: AgentConfig, observation_size: int, action_size: int, key: Array) -> Any:
    """The state before the first step."""
    if isinstance(config, FlowConfig):
        import jax_flows

        return jax_flows.init(config, observation_size, action_size, key)
    match config:
        case BC():
            layers = init_mlp(key, observation_size, action_size, config.width, config.layers)
            return ClonerState(layers, adam_init(layers))
        case DiffusionBC():
            policy = init_policy(key, observation_size, action_size, config)
            return ClonerState(policy, adam_init(policy))
        case DiffusionQL():
            if config.max_q_backup or config.critic_layer_norm:
                raise ValueError("neither max_q_backup nor critic_layer_norm is written here")
            k_actor, k_1, k_2 = jax.random.split(key, 3)
            actor = init_policy(k_actor, observation_size, action_size, config)
            critic = (
                init_mlp(k_1, observation_size + action_size, 1, config.width, config.layers),
                init_mlp(k_2, observation_size + action_size, 1, config.width, config.layers),
            )
            copy = functools.partial(jax.tree.map, jnp.copy)  # donated buffers must not be shared
            moments = adam_init(actor), adam_init(critic)
            return QLState(actor, critic, copy(actor), copy(critic), *moments, jnp.zeros((), jnp.int32))
    raise ValueError(f"there is no JAX version of {config.name!r}")


def draw(config: AgentConfig, action_size: int, key: Array) -> Any:
    """All that is random in a step of the agent."""
    if isinstance(config, BC):
        return ()
    if isinstance(config, FlowConfig):
        import jax_flows

        return jax_flows.draw(config, action_size, key)
    assert isinstance(config, DiffusionBC | DiffusionQL)
    B, T = config.batch_size, config.denoising_steps
    k_t, k_eps, k_target, k_actor, k_coin = jax.random.split(key, 5)
    t = jnp.asarray(vp_times(T), jnp.float32)[jax.random.randint(k_t, (B,), 0, T)]
    eps = jax.random.normal(k_eps, (B, action_size))
    if isinstance(config, DiffusionBC):
        return CloningDraws(t, eps)
    noise = (jax.random.normal(k, (T + 1, B, action_size)) for k in (k_target, k_actor))
    return QLDraws(next(noise), t, eps, next(noise), jax.random.uniform(k_coin))


def update_of(config: AgentConfig) -> Callable[..., tuple[Any, Metrics]]:
    """The agent's step: (state, batch, draws) -> (state, metrics)."""
    if isinstance(config, FlowConfig):
        import jax_flows

        return functools.partial(jax_flows.fql_update if isinstance(config, FQL) else jax_flows.bfn_update, config)
    updates: dict[type, Callable[..., Any]] = {
        BC: bc_update,
        DiffusionBC: diffusion_bc_update,
        DiffusionQL: ql_update,
    }
    return functools.partial(updates[type(config)], config)


def act(config: AgentConfig, state: Any, observations: Array, key: Array, action_size: int, K: int) -> Array:
    """Actions (N, A) for states (N, O); Diffusion-QL draws K and chooses one by the softmax of min Q."""
    if isinstance(config, BC):
        return jnp.tanh(mlp(state.actor, observations))
    assert isinstance(config, DiffusionBC | DiffusionQL)
    k_noise, k_choice = jax.random.split(key)
    N = len(observations)
    repeated = jnp.repeat(observations, K, 0)
    actions = sample(
        state.actor, repeated, jax.random.normal(k_noise, (config.denoising_steps + 1, N * K, action_size))
    )
    if not isinstance(config, DiffusionQL):
        return actions
    q = jnp.minimum(*q_values(state.target_critic, repeated, actions)).reshape(N, K)
    best = jax.random.categorical(k_choice, q / config.act_temperature)
    return actions.reshape(N, K, action_size)[jnp.arange(N), best]


class Runner:
    """What `worker.py` times: see `worker.Runner`.

    n_seeds: more than one are trained side by side (`vmap`), and only that. scan: so many steps are one call of the
    device (`lax.scan`), so that it never waits for the host; 0: each step is a call.
    """

    def __init__(
        self,
        config: AgentConfig,
        observation_size: int,
        action_size: int,
        n_rows: int,
        n_seeds: int = 1,
        scan: int = 0,
    ) -> None:
        self.action_size, self.scan = action_size, scan
        self.key, k_init, k_rows = jax.random.split(jax.random.key(0), 3)
        self.state = init(config, observation_size, action_size, k_init)
        self.policy = lambda: self.state.ema_actor if isinstance(self.state, QLState) else self.state.actor
        self.rows = _make_rows(k_rows, n_rows, observation_size, action_size)
        self.next_observations = self.rows[
            : config.batch_size, observation_size + action_size : 2 * observation_size + action_size
        ]
        update = update_of(config)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(state: Any, key: Array, rows: Array) -> tuple[Any, Array, Metrics]:
            key, k_batch, k_draws = jax.random.split(key, 3)
            indices = jax.random.randint(k_batch, (config.batch_size,), 0, n_rows)
            batch = _view(rows.at[indices].get(mode="promise_in_bounds"), observation_size, action_size)
            state, metrics = update(state, batch, draw(config, action_size, k_draws))
            return state, key, metrics

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def steps(states: Any, keys: Array, rows: Array) -> tuple[Any, Array]:
            def body(carry: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], None]:
                states, keys, _metrics = jax.vmap(step, (0, 0, None))(*carry, rows)
                return (states, keys), None

            carry: tuple[Any, Array] = jax.lax.scan(body, (states, keys), None, length=scan)[0]
            return carry

        self._steps = steps
        if scan:
            self.state = jax.vmap(lambda key: init(config, observation_size, action_size, key))(
                jax.random.split(k_init, n_seeds)
            )
            self.key = jax.random.split(self.key, n_seeds)

        @functools.partial(jax.jit, donate_argnums=1)
        def next_actions(policy: Any, key: Array, observations: Array) -> tuple[Array, Array]:
            assert isinstance(config, DiffusionBC | DiffusionQL)
            key, k_noise = jax.random.split(key)
            noise = jax.random.normal(k_noise, (config.denoising_steps + 1, len(observations), action_size))
            return sample(policy, observations, noise), key

        @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
        def choose(state: Any, key: Array, observations: Array, K: int) -> tuple[Array, Array]:
            key, k_act = jax.random.split(key)
            return act(config, state, observations, k_act, action_size, K), key

        self._step, self._next_actions, self._act = step, next_actions, choose

    def train(self, calls: int) -> None:
        """Steps, each with the drawing of its batch."""
        for _ in range(calls // self.scan if self.scan else 0):
            self.state, self.key = self._steps(self.state, self.key, self.rows)
        for _ in range(0 if self.scan else calls):
            self.state, self.key, _ = self._step(self.state, self.key, self.rows)
        jax.block_until_ready(self.state)

    def sample(self, calls: int) -> None:
        """Next actions of a batch, without gradients."""
        actions: Array | None = None
        for _ in range(calls):
            actions, self.key = self._next_actions(self.policy(), self.key, self.next_observations)
        jax.block_until_ready(actions)

    def act(self, calls: int, observations: np.ndarray, candidates: int) -> None:
        """Actions of states (N, O)."""
        for _ in range(calls):
            actions, self.key = self._act(self.state, self.key, observations, candidates)
            np.asarray(actions)


def _view(rows: Array, observation_size: int, action_size: int) -> Batch:
    ends = np.cumsum([observation_size, action_size, observation_size, 1]).tolist()
    observations, actions, next_observations, rewards, terminals = jnp.split(rows, ends, -1)
    return Batch(observations, actions, next_observations, rewards[:, 0], terminals[:, 0])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _make_rows(key: Array, n: int, observation_size: int, action_size: int) -> Array:
    """A made-up data set (n, 2 O + A + 2): observations, actions, next observations, rewards, terminals."""
    k_1, k_2, k_3, k_4 = jax.random.split(key, 4)
    actions = jax.random.uniform(k_2, (n, action_size), minval=-1, maxval=1)
    terminals = (jax.random.uniform(k_4, (n, 1)) < 0.01).astype(jnp.float32)
    both = jax.random.normal(k_1, (n, observation_size)), jax.random.normal(k_3, (n, observation_size + 1))
    return jnp.concatenate([both[0], actions, both[1], terminals], -1)
