"""Our agents as `worker.py` times them: the only file of the speed benchmark that calls `agents/` and `diffrl/data`."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from agents.base import Agent
from agents.base import compiled as compile_function
from agents.base_config import AgentConfig
from agents.bc import DiffusionBCAgent
from agents.config import DiffusionQL
from agents.diffusion_ql import DiffusionQLAgent
from diffrl.data.transitions import Batch, Transitions
from diffrl.training.stack import StackTrainer


class Runner:
    """S seeds as one stack; see `worker.Runner`."""

    def __init__(
        self,
        config: AgentConfig,
        observation_size: int,
        action_size: int,
        rows: int,
        device: str,
        seeds: Sequence[int] = (0,),
        compiled: bool = False,
        capture: bool = True,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.transitions = make_up_data(rows, observation_size, action_size, self.generator)
        self.agent = config.build(observation_size, action_size, seeds, device)
        self.by_candidates = {1: self.agent}
        """How many candidates acting draws is part of an agent's configuration: one agent for each number."""
        if isinstance(config, DiffusionQL):
            frugal = dataclasses.replace(config, act_candidates=1)
            self.by_candidates = {1: frugal.build(observation_size, action_size, seeds, device)}
            self.by_candidates[config.act_candidates] = self.agent
        if compiled:
            for agent in self.by_candidates.values():
                agent.compile(acting=self.device.type == "cpu")
        self.trainer = StackTrainer(self.agent, self.transitions, config.batch_size, self.generator, capture=capture)
        if isinstance(self.agent, DiffusionBCAgent | DiffusionQLAgent):
            sampled = self.agent.ema_actor if isinstance(self.agent, DiffusionQLAgent) else self.agent.actor
            self.draw_noise = sampled.sampling_noise
            self.sample_actions = sampled.sample
            if compiled:  # as `Agent.compile` does; in training this is a part of the compiled critic loss
                self.sample_actions = compile_function(sampled.sample, self.device)
            self.next_observations = self.draw_batch().next_observations.contiguous()

    def draw_batch(self) -> Batch:
        """A batch for every seed."""
        return self.transitions.draw(self.config.batch_size, self.agent.n_seeds, self.generator)

    def train(self, calls: int) -> None:
        """Steps as `diffrl train` makes them, each with the drawing of its batch; on a GPU, captured."""
        while calls:
            calls -= self.trainer.advance(calls, lambda: False)
        self.synchronise()

    @torch.no_grad()
    def sample(self, calls: int) -> None:
        """Next actions of a batch, without gradients."""
        for _ in range(calls):
            self.sample_actions(self.next_observations, self.draw_noise(self.next_observations, self.generator))
        self.synchronise()

    def act(self, calls: int, observations: np.ndarray, candidates: int) -> None:
        """Actions of states (N, O), NumPy in and out; the same states for every seed."""
        agent: Agent = self.by_candidates[candidates]
        for _ in range(calls):
            states = torch.as_tensor(observations, device=self.device).expand(agent.n_seeds, -1, -1)
            agent.act(states, self.generator).cpu().numpy()

    def synchronise(self) -> None:
        """Wait for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_up_data(rows: int, observation_size: int, action_size: int, generator: torch.Generator) -> Transitions:
    """Normal observations and rewards, uniform actions, one row in a hundred terminal."""
    table = torch.empty(rows, 2 * observation_size + action_size + 4, device=generator.device)
    table.normal_(generator=generator)
    transitions = Transitions(table, observation_size, action_size)
    columns = transitions.columns
    columns.actions.uniform_(-1, 1, generator=generator)
    columns.terminals.bernoulli_(0.01, generator=generator)
    columns.episodes.zero_()
    columns.steps.zero_()
    return transitions
