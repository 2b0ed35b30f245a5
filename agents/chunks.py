"""Action chunks and returns of several steps: what agents share that learn from `data.chunks`.

With chunks (Li, Zhou & Levine 2025, arXiv 2507.07969) the policy gives H actions a_t ... a_{t+H-1} in a row, of the
state s_t alone, which are executed open loop; the critics value the state and all H. Their target is of H steps,

    y = sum_{i<H} gamma^i r_{t+i} + gamma^H Q'(s_{t+H}, a'_{t+H} ... a'_{t+2H-1}),

which no policy but the one that acts has to be corrected for. With `n_step` alone actions are single ones, and y is the
same sum, of the data's actions behind the first: biased towards the policy of the data.

A chunk within which the episode truly ends has no bootstrap. One that runs into a cut (a time limit) is left out of the
critics' loss, `Chunks.valid`; steps behind an end are left out of the cloning loss, `Chunks.mask`. Both losses stay
means over the whole batch, as in the authors' code. There an episode goes on through a state that solves the task, as
the recordings of OGBench do, and chunks hold the rewards and actions behind it; here it ends there.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Agent, GenerativePolicy
from agents.flow_config import ChunkConfig
from agents.planning import Planner
from diffrl.data.chunks import Chunks, ChunkSource
from diffrl.data.transitions import Batch, Source, Transitions
from diffrl.support.errors import DataError, UserError


class ChunkAgent(Agent):
    """An agent that learns from transitions, or as its configuration says from chunks or returns of several steps."""

    config: ChunkConfig

    @override
    def source(self, transitions: Transitions) -> Source[Any]:
        """The transitions, or their chunks of H steps. Raises DataError where no episode is as long as a chunk."""
        config = self.config
        if config.steps_ahead == 1:
            return transitions
        try:
            return ChunkSource(transitions, config.steps_ahead, config.discount, "all" if config.chunk > 1 else "first")
        except DataError as error:
            option = "chunk" if config.chunk > 1 else "n-step"
            raise DataError(f"{error} They are --agent.{option}.") from error

    def counted(self, batch: Batch | Chunks) -> Tensor | None:
        """The weights (S, B) of a batch in the critics' loss, `Chunks.valid`; None: all are 1."""
        return batch.valid if isinstance(batch, Chunks) else None

    def cloned(self, batch: Batch | Chunks) -> Tensor | None:
        """The steps (S, B, H) of a batch's actions that are cloned, `Chunks.mask`; None: all, as of single actions."""
        return batch.mask if isinstance(batch, Chunks) and self.config.chunk > 1 else None


class OpenLoop(Planner, ChunkAgent):
    """A planner whose plans are chunks (S, B, H, A), executed one action a step, whatever is seen meanwhile."""

    reaches_goal = False

    def __init__(
        self, config: ChunkConfig, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.replan_every = config.chunk

    @abstractmethod
    def chunks(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Chunks (S, B, H A) in [-1, 1] for observations (S, B, O)."""

    @override
    @torch.no_grad()
    def plan(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Chunks (S, B, H, A) in [-1, 1] for observations (S, B, O)."""
        shape = (*observations.shape[:2], self.config.chunk, self.action_size)
        return self.chunks(observations, generator).reshape(shape)

    @override
    def follow(self, plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """Actions (S, B, A): the t-th (S, B), from 0, of the chunks (S, B, H, A)."""
        index = t[..., None, None].expand(*t.shape, 1, self.action_size)
        return plans.gather(2, index).squeeze(2)

    @property
    @override
    def policy(self) -> GenerativePolicy:
        """Raises UserError: what the flow models are chunks, and not the actions of a state."""
        raise UserError(
            f"The agent {self.config.name} has chunks of {self.config.chunk} actions (--agent.chunk), and what is "
            "measured here is of single ones. Diagnose a run without chunks."
        )
