"""FQL: Flow Q-Learning (Park, Li & Levine, ICML 2025), arXiv 2502.02538.

A flow mu_theta clones the data's policy by flow matching; a one-step policy mu_omega(s, z), which acts, is distilled
from it while it climbs Q, so that no gradient runs back through a chain (eq. 5 to 8):

    L_BC(theta)  = E |v_theta(a_t, t, s) - (z - a)|^2,    a_t = (1 - t) a + t z
    L_pi(omega)  = -E Q(s, mu_omega(s, z)) + alpha E |mu_omega(s, z) - mu_theta(s, z)|^2
    L_Q(phi)     = E (r + gamma mean_i Q'_i(s', mu_omega(s', z)) - Q_i(s, a))^2

with mu_theta(s, z) the end of `flow_steps` Euler steps from z. (The paper's time runs from noise to data.) Squares are
means over the action's dimensions, as in the authors' code, which takes the gradients of all losses before any step,
where here the policies' are taken after the critics' step. The distillation is InstaFlow's
(`diffrl.diffusion.distillation_loss`), its student a network of its own.

With `chunk` actions are chunks of H, and this is QC-FQL, see `chunks.py`.

`networks` says which networks: "published", the authors' (layer normalisation after the activation, the time itself as
an input, initial weights scaled by the average of the fans, biases 0), or "ours" (layer normalisation before it, the
time embedded as in Diffusion-QL, initialised as `torch.nn.Linear`). GELU is exact in both; the authors' is its tanh
approximation, 5e-4 away at most.

With Q divided by its mean size (`normalise_q`) the authors tune alpha from .03 to 10. That does not fit maze2d, whose
return is gathered over hundreds of steps: one action moves the normalised Q by about a hundredth. Where moving an
action by 1 gains .01, the one-step policy leaves the clone by d with 2 alpha d = .01: .05 at alpha = .1, .17 at .03,
1 at .005. Scores with our networks, one seed each, 10,000 steps on maze2d-umaze: 24 at .1, 64 at .01, 95 at .003.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from agents.base import Metrics
from agents.chunks import ChunkAgent, OpenLoop
from agents.critic import CriticEnsemble, aggregate, td_error, td_target
from agents.flow_config import FQL
from agents.flow_policy import FlowPolicy, time_size
from diffrl.data.chunks import Chunks
from diffrl.data.transitions import Batch
from diffrl.nets import MLP, Adam, average_, frozen, initialise_fan_average_


class OneStepPolicy(nn.Module):
    """mu_omega(s, z): observations (S, B, O), noise (S, B, A) -> actions (S, B, A), not clamped."""

    def __init__(
        self, observation_size: int, action_size: int, generators: Sequence[torch.Generator], **size: Any
    ) -> None:
        super().__init__()
        self.mlp = MLP((len(generators),), observation_size + action_size, action_size, generators, **size)

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions mu_omega(s, z) (S, B, A); noise is z."""
        actions: Tensor = self.mlp(torch.cat([observations, noise], -1))
        return actions


class FQLAgent(ChunkAgent):
    """FQL. Shapes: S seeds, B batch, O observation size, A action size.

    Where there are chunks, A is the size of H actions in a row.
    """

    config: FQL
    value_metrics = ("q",)
    compilable = ("critic_loss", "flow_loss", "actor_loss")
    generative = "flow"

    def __init__(self, config: FQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        sizes = (observation_size, config.chunk * action_size, self.generators)
        size: dict[str, Any] = {
            "width": config.width,
            "layers": config.layers,
            "activation": torch.nn.functional.gelu,
        }
        published = config.networks == "published"
        self.flow = FlowPolicy(*sizes, steps=config.flow_steps, time_size=time_size(config.networks), **size)
        self.actor = OneStepPolicy(*sizes, **size)
        self.critic = CriticEnsemble(*sizes, config, activation=torch.nn.functional.gelu, norm_after=published)
        for network in (self.flow, self.actor, self.critic):
            if published:
                initialise_fan_average_(network, self.generators)
            network.to(self.device)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.frozen_critic = frozen(self.critic)
        self.networks = {
            "flow": self.flow,
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
        }
        trained = ("flow", "actor", "critic")
        self.optimisers = {name: Adam(self.networks[name], config.learning_rate) for name in trained}

    @torch.no_grad()
    def target(self, batch: Batch | Chunks, z: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) mean_i Q'_i(s', mu_omega(s', z)), or as `q_agg` says: (S, B)."""
        actions = self.actor(batch.next_observations, z).clamp(-1, 1)
        q = aggregate(self.target_critic(batch.next_observations, actions), self.config.q_agg, self.config.q_spread)
        return td_target(batch, q, self.config.bootstrap_discount)

    def critic_loss(self, batch: Batch | Chunks, z: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q(phi), the temporal-difference loss, summed over the critics: (S,). z: (S, B, A), standard normal."""
        y = self.target(batch, z)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y, self.counted(batch))
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def flow_loss(self, batch: Batch | Chunks, t: Tensor, z: Tensor) -> Tensor:
        """L_BC(theta), flow matching: (S,). t: (S, B), uniform on (0, 1]; z: (S, B, A), standard normal."""
        return self.flow.matching_loss(batch.actions, batch.observations, t, z, self.cloned(batch))

    def actor_loss(self, batch: Batch | Chunks, z: Tensor) -> tuple[Tensor, Metrics]:
        """L_pi(omega), distillation loss and -Q: (S,). z: (S, B, A), standard normal, the same for both policies."""
        with torch.no_grad():
            goal = self.flow.sample(batch.observations, z)
        actions = self.actor(batch.observations, z)
        distill_loss = (actions - goal).square().mean((-2, -1))
        q = self.frozen_critic(batch.observations, actions.clamp(-1, 1))
        q = aggregate(q, self.config.actor_q, self.config.q_spread)
        q_loss = -q.mean(-1)
        if self.config.normalise_q:
            q_loss = q_loss / q.detach().abs().mean(-1)
        loss = q_loss + self.config.alpha * distill_loss
        return loss, {"distill_loss": distill_loss.detach(), "q_loss": q_loss.detach()}

    def update(self, batch: Batch | Chunks, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics, the flow and the one-step policy."""
        target_z, flow_z, z = torch.randn((3, *batch.actions.shape), generator=generator, device=self.device)
        t = torch.rand(batch.actions.shape[:-1], generator=generator, device=self.device)
        critic_loss, metrics = self.critic_loss(batch, target_z)
        metrics = {**metrics, "critic_grad_norm": self.optimisers["critic"].step(critic_loss)}
        actor_loss, actor_metrics = self.actor_loss(batch, z)
        flow_loss = self.flow_loss(batch, 1 - t, flow_z)  # t in (0, 1]
        actor_norm = self.optimisers["actor"].step(actor_loss)
        flow_norm = self.optimisers["flow"].step(flow_loss)
        average_(self.target_critic, self.critic, self.config.target_rate)
        self.step += 1
        norms = {"actor_grad_norm": actor_norm, "flow_grad_norm": flow_norm}
        return metrics | actor_metrics | {"bc_loss": flow_loss.detach()} | norms

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action a state, sampled from the one-step policy."""
        return self.act_from(observations, self.flow.sampling_noise(observations, generator))

    def act_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors; noise is z (S, B, A)."""
        actions: Tensor = self.actor(observations, noise)
        return actions.clamp(-1, 1)


class ChunkedFQLAgent(OpenLoop, FQLAgent):
    """FQL with action chunks: QC-FQL. See `OpenLoop` for how it acts."""

    config: FQL

    @override
    def chunks(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One chunk (S, B, H A) for each of the observations (S, B, O), sampled from the one-step policy."""
        return FQLAgent.act(self, observations, generator)
