"""What `train_step.py` measures, in terms that parent and workers share. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from agents import AGENTS, AgentConfig, DiffusionQL

TASKS = {"hopper": (11, 3), "halfcheetah": (17, 6)}
"""Observation and action sizes."""
Timed = Literal["bc", "diffusion_bc", "diffusion_ql"]
AGENTS_TIMED: tuple[Timed, ...] = get_args(Timed)
"""The agents of which `plain.py` and `jax_version.py` have a version."""
ROWS = 1_000_000
"""Of the made-up data set, in memory."""


def config_of(agent: str) -> AgentConfig:
    """The paper's configuration, in its steady state: the averaged actor moves from the first step on."""
    config = AGENTS[agent]()
    return dataclasses.replace(config, ema_start=1) if isinstance(config, DiffusionQL) else config


@dataclass(frozen=True)
class Work:
    """One thing that is timed."""

    kind: Literal["train", "sample", "act"]
    """A training step; the next actions of a batch without gradient; actions for states."""
    states: int
    candidates: int = 1
    """Actions drawn for each state."""

    @property
    def name(self) -> str:
        """How the table and the JSON call it."""
        match self.kind:
            case "train":
                return "training step"
            case "sample":
                return f"sampling {self.states}, no gradient"
        return f"act: {self.states} state{'s' * (self.states > 1)}, K = {self.candidates}"


def works_of(config: AgentConfig) -> list[Work]:
    """All that is timed of an agent."""
    works = [Work("train", config.batch_size)]
    if config.name != "bc":
        works.append(Work("sample", config.batch_size))
    many = config.act_candidates if isinstance(config, DiffusionQL) else 1
    works += [Work("act", 1, candidates) for candidates in sorted({many, 1}, reverse=True)]
    return [*works, Work("act", 10, many)]
