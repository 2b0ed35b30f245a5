"""The algorithms: hyper-parameters in `config.py`, then one file each."""

from agents.config import AGENTS, BC, AgentConfig, DiffusionBC, DiffusionQL, get

__all__ = ["AGENTS", "BC", "AgentConfig", "DiffusionBC", "DiffusionQL", "get"]
