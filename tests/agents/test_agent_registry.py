"""The agents by name, and what their configurations say of their policies."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import agents
from agents import AGENTS
from agents.base import Agent, GenerativePolicy
from agents.consistency_policy import ConsistencyPolicy
from agents.diffusion_policy import DiffusionPolicy
from agents.flow_policy import FlowPolicy
from agents.solver_policy import SolverPolicy
from diffrl.data.d4rl import NEEDING_NONE
from diffrl.support.errors import UserError
from diffrl.tuning.target import chain_policy, denoising_policy
from tests.agents.agent_cases import make_batch_for

KINDS = {"chain": DiffusionPolicy, "solver": SolverPolicy, "flow": FlowPolicy, "consistency": ConsistencyPolicy}


def build(name: str, **fields: Any) -> Agent:
    return AGENTS[name](width=16, layers=1, batch_size=8, **fields).build(3, 2, (0,))


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_the_kind_of_policy_is_that_of_the_agents_network(name: str) -> None:
    """And so says rightly what can be fine-tuned, and diagnosed."""
    agent, kind = build(name), AGENTS[name].policy_kind
    policy = agent.networks[agent.generative]
    assert type(policy) is KINDS[kind] if kind in KINDS else not isinstance(policy, GenerativePolicy)

    def works(use: Any) -> bool:
        try:
            use(agent)
        except UserError:
            return False
        return True

    assert works(chain_policy) == (kind == "chain")
    assert works(denoising_policy) == (kind in ("chain", "solver"))
    assert works(lambda agent: agent.generative_model(torch.zeros(1, 1, 3))) == (kind in ("chain", "solver", "flow"))


def test_the_agents_of_a_kind_are_named_in_order() -> None:
    assert agents.names("chain", "solver") == ["diffusion_bc", "diffusion_ql", "edp", "idql", "q_guidance"]
    assert agents.names("deterministic") == ["bc", "td3_bc", "rebrac", "iql", "rlpd"]
    with pytest.raises(UserError, match="expected one of diffusion_bc, diffusion_ql and idql"):
        chain_policy(build("bc"))
    with pytest.raises(UserError, match="diffusion_bc, diffusion_ql, edp, idql, q_guidance, ifql, fql, bfn and qam"):
        build("bc").generative_model(torch.zeros(1, 1, 3))


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'diffusion_ql'"):
        agents.get("difusion_ql")
    assert agents.get("fql") is agents.FQL


def test_configurations_import_no_torch() -> None:
    code = "import sys, agents; agents.FQL(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_agents_on_which_rewards_have_no_influence_are_told_to_who_has_none() -> None:
    """Four updates by other rewards leave the same parameters, to the bit, in these alone."""

    def learned(name: str, scale: float) -> list[torch.Tensor]:
        agent, g = build(name), torch.Generator().manual_seed(1)
        batch = make_batch_for(agent)
        batch = batch._replace(rewards=scale * torch.randn(batch.rewards.shape, generator=g))
        for phase in range(4):
            agent.update(batch, g, phase)
        return [p for network in agent.networks.values() for p in network.parameters()]

    alike = [name for name in AGENTS if all(map(torch.equal, learned(name, 0.0), learned(name, 1.0)))]
    assert tuple(alike) == NEEDING_NONE
