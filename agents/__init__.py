"""The algorithms: hyper-parameters in `config.py`, then one file each."""

from agents.config import (
    AGENTS,
    BC,
    EDP,
    FQL,
    IDQL,
    IQL,
    TD3BC,
    AgentConfig,
    ConsistencyAC,
    DiffusionBC,
    DiffusionQL,
    QGuidance,
    get,
)

__all__ = [
    "AGENTS",
    "BC",
    "EDP",
    "FQL",
    "IDQL",
    "IQL",
    "TD3BC",
    "AgentConfig",
    "ConsistencyAC",
    "DiffusionBC",
    "DiffusionQL",
    "QGuidance",
    "get",
]
