"""The algorithms: hyper-parameters in `config.py`, then one file each."""

from agents.base_config import AgentConfig
from agents.config import AGENTS, BC, EDP, FQL, IDQL, IQL, TD3BC, ConsistencyAC, DiffusionBC, DiffusionQL, QGuidance
from agents.planning_config import Diffuser
from agents.registry import get, listed, names

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line

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
    "Diffuser",
    "DiffusionBC",
    "DiffusionQL",
    "QGuidance",
    "get",
    "listed",
    "names",
]
