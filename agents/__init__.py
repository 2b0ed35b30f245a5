"""The algorithms: hyper-parameters in `config.py`, then one file each."""

from agents.base_config import AgentConfig
from agents.config import AGENTS, BC, EDP, QAM, RLPD, TD3BC, ConsistencyAC, DiffusionBC, DiffusionQL, ReBRAC
from agents.expectile_config import DTQL, IDQL, IFQL, IQL, QGuidance
from agents.flow_config import BFN, FQL
from agents.planning_config import Diffuser
from agents.registry import (
    Absent,
    UnknownAgentError,
    get,
    get_or_absent,
    having,
    installed,
    is_agent,
    left_out,
    listed,
    names,
    try_out,
)

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line

__all__ = [
    "AGENTS",
    "BC",
    "BFN",
    "DTQL",
    "EDP",
    "FQL",
    "IDQL",
    "IFQL",
    "IQL",
    "QAM",
    "RLPD",
    "TD3BC",
    "Absent",
    "AgentConfig",
    "ConsistencyAC",
    "Diffuser",
    "DiffusionBC",
    "DiffusionQL",
    "QGuidance",
    "ReBRAC",
    "UnknownAgentError",
    "get",
    "get_or_absent",
    "having",
    "installed",
    "is_agent",
    "left_out",
    "listed",
    "names",
    "try_out",
]
