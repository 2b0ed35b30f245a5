"""What the arithmetic alone would take: counted FLOPs, and the matmul peak that they are divided by.

The FLOPs are counted by PyTorch (`FlopCounterMode`: matrix products, 2 a multiply-add) while the plain version runs,
less its waste: gradients are taken for the weights that a loss trains and for nothing else, and where a whole batch is
at one time the time is embedded once. Elementwise work (Mish, Adam, noise) counts nothing, so a real step is always
above this floor.
"""

import time

import torch
from plain import Batch, BehaviourCloning, DiffusionCloning, DiffusionPolicy, DiffusionQLearning, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workload import Work, works_of

from agents import AgentConfig


def count_flops(config: AgentConfig, observation_size: int, action_size: int) -> dict[Work, int]:
    """FLOPs of everything that is timed of an agent."""
    torch.manual_seed(0)
    agent = build(config, observation_size, action_size)
    for network in vars(agent).values():
        if isinstance(network, DiffusionPolicy):
            network.time_mlp = EmbedOnce(network.time_mlp)

    def run(work: Work) -> None:
        n = work.states
        states = torch.zeros(n, observation_size)
        if work.kind == "act":
            agent.act(states, work.candidates)
            return
        if work.kind == "sample":
            assert not isinstance(agent, BehaviourCloning)
            with torch.no_grad():
                agent.sampled.sample(states)
            return
        batch = Batch(states, torch.zeros(n, action_size), states, torch.zeros(n, 1), torch.zeros(n, 1))
        match agent:
            case DiffusionQLearning():
                _differentiate(agent.critic_loss(batch), agent.critic)
                _differentiate(agent.actor_loss(batch)[0], agent.actor)
            case BehaviourCloning() | DiffusionCloning():
                _differentiate(agent.loss(batch), agent.actor)

    counts = {}
    for work in works_of(config):
        with FlopCounterMode(display=False) as counter:
            run(work)
        counts[work] = counter.get_total_flops()
    return counts


class EmbedOnce(nn.Module):
    """A time embedding that does a batch at one time as one row: (B,) -> (B, size)."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, t: Tensor) -> Tensor:
        """The embedding (B, size) of times t (B,); of equal times one row is computed."""
        rows = t[:1] if bool((t == t[0]).all()) else t
        embedding: Tensor = self.embed(rows)
        return embedding.expand(len(t), -1)


def _differentiate(loss: Tensor, network: nn.Module) -> None:
    torch.autograd.grad(loss, list(network.parameters()))


class Matmul:
    """A float32 product of two 1024 x 1024 matrices, the machine's practical peak."""

    def __init__(self, size: int = 1024) -> None:
        self.size = size
        self.a, self.b, self.out = torch.randn(3, size, size)

    def gflops(self, calls: int) -> float:
        """GFLOP per CPU second."""
        start = time.process_time()
        for _ in range(calls):
            torch.mm(self.a, self.b, out=self.out)
        return calls * 2 * self.size**3 / (time.process_time() - start) / 1e9
