"""The agents by name: ours. Imports no torch."""

from agents.base_config import AgentConfig, PolicyKind
from agents.config import BC, EDP, FQL, IDQL, IQL, TD3BC, ConsistencyAC, DiffusionBC, DiffusionQL, QGuidance
from diffrl.support.errors import UserError, nearest

AGENTS: dict[str, type[AgentConfig]] = {
    config.name: config
    for config in (BC, DiffusionBC, TD3BC, IQL, DiffusionQL, EDP, ConsistencyAC, IDQL, QGuidance, FQL)
}
"""Every algorithm of ours by its name."""


def get(name: str) -> type[AgentConfig]:
    """The configuration class of the algorithm called `name`. Raises UserError naming the nearest known one."""
    if name not in AGENTS:
        raise UserError(f"Unknown agent {name!r}: {nearest(name, AGENTS)}")
    return AGENTS[name]


def names(*kinds: PolicyKind) -> list[str]:
    """The names of our agents whose policies are of these kinds."""
    return [name for name, config in AGENTS.items() if config.policy_kind in kinds]
