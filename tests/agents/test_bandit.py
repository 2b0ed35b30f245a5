"""Every agent that learns Q finds the better of two actions of a bandit (`agent_cases.bandit`)."""

from typing import Any

import pytest
import torch

from agents import BFN, DTQL, EDP, FQL, IDQL, IFQL, IQL, QAM, RLPD, TD3BC, AgentConfig, ConsistencyAC, QGuidance, ReBRAC
from tests.agents.agent_cases import bandit

RATES: dict[str, Any] = {"actor_lr": 3e-3, "critic_lr": 3e-3}
SMALL: dict[str, Any] = {"width": 32, "layers": 2, **RATES}
CHOOSING: dict[str, Any] = {"q_weight": 0.1, "ema_start": 0, "act_candidates": 8, "act_temperature": 0.0}
CONFIGS: list[tuple[AgentConfig, float]] = [
    (TD3BC(width=32, **RATES), 0.0),
    (IQL(width=32, lr_decay_steps=0, **RATES), 0.9),
    (EDP(sampling_steps=5, **CHOOSING, **SMALL), 0.15),
    (ConsistencyAC(boundaries_end=20, boundaries_steps=300, ema_every=1, ema_rate=0.05, **CHOOSING, **SMALL), 0.0),
    (IDQL(width=32, blocks=1, act_candidates=16, ema_rate=0.02, **RATES), 0.9),
    (QGuidance(guidance_scale=10.0, ema_rate=0.02, **SMALL), 0.0),
    (FQL(width=32, layers=2, learning_rate=3e-3, alpha=1.0, flow_steps=5), 0.0),
    (ReBRAC(width=32, layers=2, **RATES), 0.0),
    (BFN(width=32, layers=2, learning_rate=3e-3, act_candidates=8, critic_layer_norm=False, flow_steps=5), 0.5),
    (DTQL(width=32, layers=2, diffusion_layers=2, actor_start=50, act_candidates=8, **RATES), 0.0),
    (RLPD(width=32, actor_every=1, n_critics=3, temperature=0.1, **RATES), 0.0),
    (QAM(width=32, layers=2, learning_rate=3e-3, flow_steps=5, inverse_temperature=10.0, n_critics=3), 0.0),
    (IFQL(width=32, layers=2, act_candidates=8, flow_steps=5, **RATES), 0.7),
]
"""Each with the share of actions that must lie near the data's. 0: Q, which knows no action beyond them, is climbed on
past them, as it may be where the weight on Q is large."""


X0 = pytest.param(EDP(form="x0", sampling_steps=5, **CHOOSING, **SMALL), 0.4, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize(("config", "near"), [*CONFIGS, X0], ids=lambda x: x.name if isinstance(x, AgentConfig) else "")
def test_on_a_bandit_the_good_action_is_found(config: AgentConfig, near: float) -> None:
    """After 300 steps, in nine of ten draws; the data hold as many bad ones. Cloning alone has half."""
    agent, g = config.build(3, 2, (0,)), torch.Generator().manual_seed(0)
    for step in range(300):
        agent.update(bandit(128, step), g, step % agent.period)
    actions = agent.act(torch.zeros(1, 500, 3), g)[0]
    assert (actions.mean(-1) > 0).float().mean() > 0.9
    assert ((actions - 0.5).abs().amax(-1) < 0.25).float().mean() >= near
