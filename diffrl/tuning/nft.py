"""DiffusionNFT of a policy: better and worse actions, learned by the forward process alone (arXiv 2509.16117).

An action a with advantage A (what a sample of a prompt is there, an action in a state is here) has the goodness
r = 1/2 + A / (2 A_max), A limited to +-A_max, and the policy is trained on the denoising losses of two mixtures
(`diffrl.alignment.losses.nft_loss`, which fine-tunes image models too):

    L = A_max E[ r e(D+) / b + (1 - r) e(D-) / b ] + w_ref E |m - m_ref|^2,

with D+ and D- mixtures of the trained policy's denoiser and of that of the policy which acts, a copy that follows. No
log-probabilities: any policy with a denoiser will do, however it is sampled, also by a deterministic solver. Advantages
come from acting (`NFTTrainer`: GAE, normalised over an iteration), or from the run's own critics in the states of its
data (`NFTLearner`: each action against the others of its state; nothing acts).

Where the policy acts, each action that is taken has K companions: actions that the same policy might have taken there,
with goodness r' = 1/2 - (r - 1/2) / K. At v = v_old the gradient of a group is, with g(a) that of the denoising error,

    (2 r - 1) [ g(a) - 1/K sum_k g(a'_k) ],

whose mean is 0 wherever r says nothing of a: it depends on the state alone, or on luck. Without companions a state of
advantage A pulls the policy towards or from its own samples by A E[g(a)], which is 0 for a perfect denoiser and sampler
alone; of five steps it is most of the gradient. A policy gradient needs no such care: E[grad log pi] = 0. The actions
of a group are learned from at the same times and with the same noise, which then cancels as well.

Differs from the paper: advantages of actions in the place of a prompt's rewards, and companions; times are drawn as the
policy was trained with, and not from the solver's grid; where it acts, errors are not divided by their own size: what
the actions of a group teach would no longer cancel. With critics, which take no such care, they are: an update a batch
would otherwise let the denoiser drift at high noise.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Agent, GenerativePolicy
from diffrl.alignment.losses import nft_loss
from diffrl.data.preprocessing import Preprocessing
from diffrl.data.transitions import Batch
from diffrl.nets import SeparateAdam, average_
from diffrl.training.stack import Evaluate
from diffrl.tuning.acting import EnvironmentTrainer, differ
from diffrl.tuning.config import NFTConfig
from diffrl.tuning.environments import Environments
from diffrl.tuning.target import (
    ForwardPolicy,
    copy_to_averages,
    critics_of,
    forward_policy,
    reference,
    training_times,
)


def goodness(advantages: Tensor, limit: float) -> Tensor:
    """r = 1/2 + A / (2 A_max), in [0, 1], of advantages A of any shape; limit: A_max."""
    return 0.5 + advantages.clamp(-limit, limit) / (2 * limit)


def normalised(advantages: Tensor) -> Tensor:
    """Advantages (S, M) of each seed over their deviation, around 0; all 0 where they are equal."""
    spread = advantages.std(-1, correction=0, keepdim=True)
    scaled = (advantages - advantages.mean(-1, keepdim=True)) / (spread + 1e-8)
    return torch.where(differ(advantages)[:, None], scaled, 0.0)


def among_group(values: Tensor) -> Tensor:
    """Advantages (S, B, K) of values of K actions a state: less the state's mean, over one deviation a seed.

    One deviation for all of a seed's states, not one a state: where actions matter little, little is learned. States
    whose actions are all worth the same have advantages of exactly 0.
    """
    equal = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    centred = torch.where(equal, 0.0, values - values.mean(-1, keepdim=True))
    spread = centred.square().mean((-2, -1), keepdim=True).sqrt()
    return centred / (spread + 1e-8)


def with_companions(r: Tensor, companions: int) -> Tensor:
    """Goodness (S, M, 1 + K) of M actions, r (S, M), each followed by its K companions: 1/2 - (r - 1/2) / K."""
    others = 0.5 - (r - 0.5) / max(companions, 1)
    return torch.cat([r[..., None], others[..., None].expand(*r.shape, companions)], -1)


def policy_nft_loss(
    policy: GenerativePolicy,
    old: GenerativePolicy,
    pretrained: GenerativePolicy,
    observations: Tensor,
    actions: Tensor,
    r: Tensor,
    t: Tensor,
    noise: Tensor,
    config: NFTConfig,
    *,
    adaptive: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The module's loss L (S,), and metrics (S,).

    observations: (S, B, O). actions: (S, B K, A), the K of a state in a row, of the policy `old`, which acts. r:
    (S, B K), how good each is. t: (S, B K L), noise: (S, B K L, A): the L times of an action in a row. adaptive: see
    `nft_loss`.
    """
    n, L = actions.shape[1] // observations.shape[1], t.shape[1] // actions.shape[1]
    x_0 = actions.repeat_interleave(L, dim=1)
    prediction = policy.prediction
    x = prediction.process.perturb(x_0, t, noise)
    inputs = prediction.inputs(x, t)
    m = policy.bound(observations, n * L)(*inputs)
    with torch.no_grad():
        m_old = prediction.to_x0(old.bound(observations, n * L)(*inputs), x, t)
    denoised = prediction.to_x0(m, x, t)
    loss, metrics = nft_loss(x_0, denoised, m_old, r.repeat_interleave(L, dim=1), beta=config.beta, adaptive=adaptive)
    loss = config.adv_clip * loss
    if config.anchor > 0:
        with torch.no_grad():
            m_ref = pretrained.bound(observations, n * L)(*inputs)
        distance = (m - m_ref).square().mean((-2, -1))
        loss, metrics = loss + config.anchor * distance, metrics | {"anchor": distance.detach()}
    return loss, metrics | {"policy_loss": loss.detach()}


def draw(
    policy: ForwardPolicy, actions: Tensor, group: int, levels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Times (S, B K L) and noise (S, B K L, A) of the L `levels` at which actions (S, B K, A) are learned from.

    The K = `group` actions of a state, which stand in a row, have the same.
    """
    S, rows, A = actions.shape
    shape = (S, rows // group, 1, levels)
    t = training_times(policy, shape, generator)
    noise = torch.randn((*shape, A), generator=generator, device=actions.device)
    return t.expand(-1, -1, group, -1).flatten(1), noise.expand(-1, -1, group, -1, -1).flatten(1, 3)


class Acted(NamedTuple):
    """What S policies met in M environment steps each."""

    observations: Tensor
    """(S, M, O), normalised."""
    actions: Tensor
    """(S, M, 1 + K, A): as they were taken, and their companions."""
    advantages: Tensor
    """(S, M), of GAE, of the actions that were taken."""
    r: Tensor
    """(S, M, 1 + K): how good each action is, in [0, 1]."""
    returns: Tensor
    """(S, M): the critic's targets."""

    def rows(self, index: Tensor) -> "Acted":
        """The environment steps at `index` (S, B) of each seed."""
        s = torch.arange(len(index), device=index.device)[:, None]
        return Acted(*(column[s, index] for column in self))


class NFTTrainer(EnvironmentTrainer[Acted, ForwardPolicy, NFTConfig]):
    """DiffusionNFT of a stack of S seeds, each in environments of its own: see `EnvironmentTrainer`.

    After iteration i the policy that acts is w old + (1 - w) trained, w = min(rate i, sampling_decay).
    """

    def __init__(
        self,
        agent: Agent,
        config: NFTConfig,
        environments: Environments,
        preprocessing: Preprocessing,
        critic_generators: Sequence[torch.Generator],
        generator: torch.Generator,
        evaluate: Evaluate,
        *,
        on_close: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        policy = forward_policy(agent).requires_grad_(True)
        given = environments, preprocessing, critic_generators, generator, evaluate
        super().__init__(agent, config, policy, *given, on_close=on_close, say=say)
        self.old = reference(policy)

    @override
    def act(self, observations: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        chosen = self.explored(observations)
        return chosen, (chosen[None],)  # what is learned from is what was taken

    def explored(self, observations: Tensor, K: int = 1) -> Tensor:
        """K actions (S, B K, A) a state of the policy that acts, with its noise of exploration, for (S, B, O)."""
        actions = self.old.sample(observations, self.old.sampling_noise(observations, self._generator, K))
        noise = torch.randn(actions.shape, generator=self._generator, device=actions.device)
        return (actions.nan_to_num(0.0, 0.0, 0.0) + self.config.exploration * noise).clamp(-1, 1)

    @override
    @torch.no_grad()
    def experience(self, observations: Tensor, kept: Sequence[Tensor], advantages: Tensor, returns: Tensor) -> Acted:
        K = self.config.companions
        r = with_companions(goodness(normalised(advantages), self.config.adv_clip), K)
        actions = kept[0][0].unsqueeze(2)
        if K:
            others = self.explored(observations, K).view(*actions.shape[:2], K, -1)
            actions = torch.cat([actions, others], 2)
        return Acted(observations, actions, advantages, r, returns)

    @override
    def policy_loss(self, batch: Acted) -> tuple[Tensor, dict[str, Tensor]]:
        group, actions = batch.actions.shape[2], batch.actions.flatten(1, 2)
        t, noise = draw(self.policy, actions, group, self.config.noise_levels, self._generator)
        mine = self.policy, self.old, self._pretrained
        return policy_nft_loss(*mine, batch.observations, actions, batch.r.flatten(1), t, noise, self.config)

    @override
    def finish(self, experience: Acted) -> dict[str, Tensor]:
        w = min(self.config.sampling_decay_rate * (int(self._iterations) + 1), self.config.sampling_decay)
        average_(self.old, self.policy, 1 - w)
        return {}

    @override
    def _own(self) -> dict[str, Tensor]:
        return super()._own() | {f"sampling.{name}": tensor for name, tensor in self.old.state_dict().items()}


class NFTLearner:
    """DiffusionNFT of an agent's policy by the agent's own critics, as a `Learner` from the data's states.

    An update draws a group of actions in each state of a batch from the policy that samples, compares them by the
    critics, which stay as they are, and makes one step. Where a seed's critics tell no two actions of a group apart,
    its policy and its optimiser stay as they are. Its `state_dict` is the agent's alone; see `own_state`.
    """

    period = 1

    def __init__(self, agent: Agent, config: NFTConfig) -> None:
        self.agent, self.config = agent, config
        self.n_seeds, self.seeds = agent.n_seeds, agent.seeds
        self.values = critics_of(agent)
        self.policy = forward_policy(agent).requires_grad_(True)
        self.pretrained, self.old = reference(self.policy), deepcopy(self.policy).requires_grad_(False)
        size = {"warm_up": config.warm_up, "n_seeds": agent.n_seeds}
        self._optimiser = SeparateAdam(self.policy, config.learning_rate, config.grad_clip, **size)
        self._updates = torch.zeros((), device=agent.device)

    @torch.no_grad()
    def compare(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actions (S, B K, A) of the policy that samples, their advantages (S, B, K), and metrics (S,)."""
        S, B, _ = observations.shape
        K = self.config.group
        actions = self.old.sample(observations, self.old.sampling_noise(observations, generator, K)).clamp(-1, 1)
        q = self.values(observations.repeat_interleave(K, dim=1), actions).view(S, B, K)
        return actions, among_group(q), {"q": q.mean((-2, -1)), "q_spread": q.std(-1, correction=0).mean(-1)}

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """Make one step of the policy in a batch's states; metrics (S,)."""
        observations, config = batch.observations, self.config
        actions, advantages, metrics = self.compare(observations, generator)
        r = goodness(advantages, config.adv_clip).flatten(1)
        t, noise = draw(self.policy, actions, config.group, config.noise_levels, generator)
        mine = self.policy, self.old, self.pretrained
        loss, more = policy_nft_loss(*mine, observations, actions, r, t, noise, config, adaptive=True)
        heard = (advantages != 0).flatten(1).any(-1)
        norm = self._optimiser.step_where(loss, heard)
        self._updates += 1
        w = (config.sampling_decay_rate * self._updates).clamp_max(config.sampling_decay)
        average_(self.old, self.policy, 1 - w)
        copy_to_averages(self.agent, self.policy)
        return metrics | more | {"policy_grad_norm": norm, "no_signal": (~heard).float()}

    def state_dict(self) -> dict[str, Tensor]:
        """The agent's tensors, themselves and not copies."""
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back into the agent's own tensors. Raises ValueError where it does not fit."""
        self.agent.load_state_dict(state)

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that fine-tuning adds to the agent's."""
        own = {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state_dict().items()}
        for kind, network in (("pretrained", self.pretrained), ("sampling", self.old)):
            own |= {f"{kind}.{name}": tensor for name, tensor in network.state_dict().items()}
        return own | {"updates": self._updates}
