"""FQL and BFN in JAX, which `flow_step.py` times, are ours: whole steps from the same weights, batches and draws."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents import BFN, FQL
from agents.base import Agent
from agents.bfn import BFNAgent
from agents.fql import FQLAgent
from tests.benchmarks.test_equivalence import ACT, OBS, B, make_batch

jax = pytest.importorskip("jax", reason="pip install 'diffrl[dev]'")
import jax.numpy as jnp  # noqa: E402
import jax_flows  # noqa: E402
import jax_version  # noqa: E402

SIZE: dict[str, Any] = {"width": 24, "layers": 2, "batch_size": B, "flow_steps": 3, "target_rate": 0.2}
CONFIGS = [FQL(**SIZE, alpha=3.0), BFN(**SIZE, backup_candidates=4, act_candidates=4)]


def layers(mlp: nn.Module, *head: int) -> list[tuple[Any, Any]]:
    return [
        (jnp.asarray(linear.weight.detach()[(0, *head)]), jnp.asarray(linear.bias.detach()[(0, *head, 0)]))
        for linear in mlp.linears
    ]


def critics(ensemble: nn.Module) -> Any:
    norms = [
        [(norm.weight.detach()[0, i, 0], norm.bias.detach()[0, i, 0]) for norm in ensemble.mlp.norms] for i in range(2)
    ]
    return tuple(
        jax_flows.Critic(layers(ensemble.mlp, i), [(jnp.asarray(a), jnp.asarray(b)) for a, b in norms[i]])
        for i in range(2)
    )


def networks(agent: Agent) -> dict[str, Any]:
    """Our weights, as the JAX version has them."""
    found = {"critic": critics(agent.networks["critic"]), "target_critic": critics(agent.networks["target_critic"])}
    return found | {name: layers(agent.networks[name].mlp) for name in ("flow", "actor") if name in agent.networks}


def draws(agent: Agent, batch: Any, generator: torch.Generator) -> Any:
    """The draws that `agent.update(batch, generator)` would make, in its order."""
    if isinstance(agent, FQLAgent):
        zs = torch.randn((3, *batch.actions.shape), generator=generator)
        t = 1 - torch.rand(batch.actions.shape[:-1], generator=generator)
        return jax_flows.FQLDraws(*(jnp.asarray(z[0]) for z in zs), jnp.asarray(t[0, :, None]))
    assert isinstance(agent, BFNAgent)
    target_z = agent.actor.sampling_noise(batch.next_observations, generator, agent.config.backup_candidates)
    t, z = agent.actor.matching_noise(batch.actions, generator)
    return jax_flows.BFNDraws(jnp.asarray(target_z[0]), jnp.asarray(z[0]), jnp.asarray(t[0, :, None]))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_whole_steps_are_ours(config: FQL | BFN) -> None:
    """Losses to 1e-4; after six steps networks are apart by less than a thousandth of the way they have gone."""
    agent = dataclasses.replace(config).build(OBS, ACT, (0,))
    g = torch.Generator().manual_seed(5)
    for p in agent.networks["critic"].parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)  # gains, shifts and biases as training would have them
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    before = networks(agent)
    state = jax_version.init(config, OBS, ACT, jax.random.key(0))._replace(**before)
    update = jax.jit(jax_version.update_of(config))
    for step in range(6):
        batch = make_batch(step)
        its = draws(agent, batch, same)
        metrics = agent.update(batch, generator)
        o, a, r, n, terminal = (jnp.asarray(column[0]) for column in batch[:5])
        state, theirs = update(state, jax_version.Batch(o, a, n, r, terminal), its)
        assert float(theirs["critic_loss"]) == pytest.approx(float(metrics["critic_loss"]), rel=1e-4)
        assert float(theirs["flow_loss"]) == pytest.approx(float(metrics["bc_loss"]), rel=1e-4)
    for name, ours in networks(agent).items():
        way = np.linalg.norm(flat(ours) - flat(before[name]))
        assert way > 0
        assert np.linalg.norm(flat(getattr(state, name)) - flat(ours)) < 1e-3 * way, name
