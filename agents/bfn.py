"""BFN: the best of N actions of a flow, by the critics, in acting and in the target (Li, Zhou & Levine 2025).

arXiv 2507.07969. A flow mu_theta clones the data's policy by flow matching (`flow_policy.py`), and no network climbs Q:

    a*(s)    = argmax over a_1 ... a_N ~ mu_theta(s) of mean_i Q_i(s, a)
    L_Q(phi) = E (r + gamma mean_i Q'_i(s', a*(s')) - Q_i(s, a))^2

The online critics Q choose, the target critics Q' value the choice, as in the authors' code. Networks as in `fql.py`.
With `chunk` actions are chunks of H, and this is Q-chunking (QC), see `chunks.py`; N is 32 there.
What is different here: the flow's and the critics' losses have optimisers of their own (theirs: one for the sum, which
is the same for Adam without clipping).
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Metrics
from agents.chunks import ChunkAgent, OpenLoop
from agents.critic import CriticEnsemble, aggregate, choose, td_error, td_target
from agents.flow_config import BFN
from agents.flow_policy import FlowPolicy, time_size
from diffrl.data.chunks import Chunks
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, average_, initialise_fan_average_


class FlowNoise(NamedTuple):
    """All that is random in `BFNAgent.flow_loss`."""

    t: Tensor
    """(S, B), uniform on (0, 1]."""
    z: Tensor
    """(S, B, A), standard normal."""


class BFNAgent(ChunkAgent):
    """BFN. Shapes: S seeds, B batch, K candidates (the paper's N), O observation size, A action size.

    Where there are chunks, A is the size of H actions in a row.
    """

    config: BFN
    value_metrics = ("q",)
    compilable = ("critic_loss", "flow_loss")
    acting = ("act_from",)

    def __init__(self, config: BFN, observation_size: int, action_size: int, seeds: Sequence[int], device: str) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        sizes = (observation_size, config.chunk * action_size, self.generators)
        gelu = torch.nn.functional.gelu
        size: dict[str, Any] = {"width": config.width, "layers": config.layers, "activation": gelu}
        published = config.networks == "published"
        self.actor = FlowPolicy(*sizes, steps=config.flow_steps, time_size=time_size(config.networks), **size)
        self.critic = CriticEnsemble(*sizes, config, gelu, norm_after=published)
        for network in (self.actor, self.critic):
            if published:
                initialise_fan_average_(network, self.generators)
            network.to(self.device)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.networks = {"actor": self.actor, "critic": self.critic, "target_critic": self.target_critic}
        self.optimisers = {name: Adam(self.networks[name], config.learning_rate) for name in ("actor", "critic")}

    def aggregate(self, q: Tensor) -> Tensor:
        """One value (S, B) of the critics' (S, n, B): mean_i Q_i, or as `q_agg` says."""
        return aggregate(q, self.config.q_agg, self.config.q_spread)

    @torch.no_grad()
    def best(self, observations: Tensor, noise: Tensor) -> Tensor:
        """a*(s), the best of K actions sampled from the flow, by the online critics: (S, B, A).

        observations: (S, B, O); noise: (S, B K, A), of the policy's `sampling_noise`.
        """
        S, B, _ = observations.shape
        K = noise.shape[1] // B
        actions = self.actor.sample(observations, noise)
        q = self.aggregate(self.critic(observations.repeat_interleave(K, dim=1), actions))
        return choose(actions, q, torch.zeros(S, B, K, device=q.device), 0.0)

    @torch.no_grad()
    def target(self, batch: Batch | Chunks, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) mean_i Q'_i(s', a*(s')): (S, B). noise: as in `best`."""
        actions = self.best(batch.next_observations, noise)
        q = self.aggregate(self.target_critic(batch.next_observations, actions))
        return td_target(batch, q, self.config.bootstrap_discount)

    def critic_loss(self, batch: Batch | Chunks, noise: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q(phi), summed over the critics: (S,). noise: as in `best`."""
        y = self.target(batch, noise)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y, self.counted(batch))
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def flow_loss(self, batch: Batch | Chunks, noise: FlowNoise) -> Tensor:
        """Flow matching: (S,)."""
        return self.actor.matching_loss(batch.actions, batch.observations, noise.t, noise.z, self.cloned(batch))

    def update(self, batch: Batch | Chunks, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics and the flow."""
        noise = self.actor.sampling_noise(batch.next_observations, generator, self.config.backup_candidates)
        flow_noise = FlowNoise(*self.actor.matching_noise(batch.actions, generator))
        critic_loss, metrics = self.critic_loss(batch, noise)
        flow_loss = self.flow_loss(batch, flow_noise)
        critic_norm = self.optimisers["critic"].step(critic_loss)
        flow_norm = self.optimisers["actor"].step(flow_loss)
        average_(self.target_critic, self.critic, self.config.target_rate)
        self.step += 1
        norms = {"critic_grad_norm": critic_norm, "actor_grad_norm": flow_norm}
        return metrics | {"bc_loss": flow_loss.detach()} | norms

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """a*(s), the best of N actions by the online critics: (S, B, A) for observations (S, B, O)."""
        return self.act_from(
            observations, self.actor.sampling_noise(observations, generator, self.config.act_candidates)
        )

    def act_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors: of observations (S, B, O) and its noise."""
        return self.best(observations, noise)


class ChunkedBFNAgent(OpenLoop, BFNAgent):
    """BFN with action chunks: QC. See `OpenLoop` for how it acts."""

    config: BFN

    @override
    def chunks(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The best of N chunks by the online critics: (S, B, H A) for observations (S, B, O)."""
        return BFNAgent.act(self, observations, generator)
