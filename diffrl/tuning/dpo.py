"""Preference fine-tuning of a policy: Diffusion-DPO on the actions of trajectory segments.

The implicit reward difference of a pair of segments of H steps, a preferred one (w) and another (l), is

    z = -beta/2 sum_h [(e_w,h - e_ref,w,h) - (e_l,h - e_ref,l,h)],    e = |m - m_theta(a_t, t, s)|^2 / A,

Diffusion-DPO's (Wallace et al. 2023, arXiv 2311.12908, eq. 14) with the action as the image and the state as its
prompt, summed over a segment as in contrastive preference learning (Hejna et al. 2023, arXiv 2310.13639), whose log pi
is here the bound that denoising errors give. Both segments of a pair have the same times t and the same noise, step by
step. Their states differ, as they do in trajectories, so each error is held against the frozen policy's in that state.

D3PO, which has no use for a data set's actions (it compares chains, and nobody recorded those), is left to images.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import Agent, GenerativePolicy
from diffrl.alignment.losses import PairErrors, diffusion_dpo_loss
from diffrl.data.preferences import Preferences
from diffrl.data.preprocessing import Preprocessing
from diffrl.diffusion import denoising_loss
from diffrl.nets import Adam
from diffrl.training.stack import Evaluate
from diffrl.tuning.config import DPOConfig
from diffrl.tuning.owned import OwningTrainer
from diffrl.tuning.target import copy_to_averages, denoising_policy, reference


class SegmentPairBatch(NamedTuple):
    """Pairs of segments of H steps drawn for S seeds, B each: the preferred segments (w) first, then the others (l)."""

    observations: Tensor
    """(S, 2, B, H, O)"""
    actions: Tensor
    """(S, 2, B, H, A)"""


class SegmentPairs:
    """Preferences on the training device, in the agent's units: the `Source` of preference fine-tuning."""

    def __init__(self, preferences: Preferences, preprocessing: Preprocessing, device: torch.device) -> None:
        parts = preprocessing.to(device)

        def both(kind: str) -> Tensor:
            columns = [torch.from_numpy(getattr(preferences, f"{kind}_{side}")) for side in "wl"]
            return torch.stack(columns).to(device)

        self._observations = parts.observations(both("observations"))
        self._actions = parts.actions(both("actions")).clamp(-1, 1)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> SegmentPairBatch:
        """Draw B = `batch_size` pairs for each of S = `n_seeds` seeds, uniformly and with replacement."""
        n = self._observations.shape[1]
        index = torch.randint(n, (n_seeds, batch_size), generator=generator, device=self._observations.device)
        return SegmentPairBatch(self._observations[:, index].transpose(0, 1), self._actions[:, index].transpose(0, 1))


class PreferenceLearner:
    """Fine-tunes an agent's policy from pairs of segments, as a `Learner`.

    Its `state_dict` is the agent's alone, so that a checkpoint of it is one of the agent; what fine-tuning adds to that
    is in `own_state`.
    """

    period = 1

    def __init__(self, agent: Agent, config: DPOConfig) -> None:
        self.agent, self.config = agent, config
        self.n_seeds, self.seeds = agent.n_seeds, agent.seeds
        self.policy = denoising_policy(agent).requires_grad_(True)
        self.pretrained = reference(self.policy)
        self._optimiser = Adam(self.policy, config.learning_rate, config.grad_clip, warm_up=config.warm_up)

    def errors(self, batch: SegmentPairBatch, t: Tensor, noise: Tensor) -> PairErrors:
        """The policy's and the pretrained policy's denoising errors, summed over a segment's steps: (S, B) each.

        t: (S, B, H), noise: (S, B, H, A): of each step of a pair, the same for both its segments.
        """
        observations, actions = batch.observations.flatten(1, 3), batch.actions.flatten(1, 3)
        both_t, both_noise = torch.stack([t, t], 1).flatten(1), torch.stack([noise, noise], 1).flatten(1, 3)

        def of(policy: GenerativePolicy) -> tuple[Tensor, Tensor]:
            network = policy.bound(observations)
            error = denoising_loss(policy.prediction, network, actions, both_t, both_noise)
            w, l = error.view(batch.actions.shape[:-1]).sum(-1).unbind(1)  # noqa: E741
            return w, l

        with torch.no_grad():
            ref_w, ref_l = of(self.pretrained)
        return PairErrors(*of(self.policy), ref_w, ref_l)

    def loss(self, batch: SegmentPairBatch, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion-DPO's loss plus bc_weight beta/2 times the preferred segments' errors: (S,); and metrics (S,).

        t: (S, B, H), noise: (S, B, H, A), as `errors` takes them.
        """
        errors = self.errors(batch, t, noise)
        loss, metrics = diffusion_dpo_loss(errors, beta=self.config.beta, kind=self.config.loss)
        total = loss + self.config.bc_weight * self.config.beta / 2 * errors.w.mean(-1)
        # Errors a step are what a reader knows from training the policy.
        metrics |= {name: metrics[name] / batch.actions.shape[3] for name in ("error_w", "error_l")}
        return total, metrics | {"loss": total.detach()}

    def update(self, batch: SegmentPairBatch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """Make one step of the policy on a batch of pairs, at times and with noise drawn here; metrics (S,)."""
        preferred = batch.actions[:, 0]
        i = torch.randint(len(self.policy.times), preferred.shape[:-1], generator=generator, device=preferred.device)
        noise = torch.randn(preferred.shape, generator=generator, device=preferred.device)
        loss, metrics = self.loss(batch, self.policy.times[i], noise)
        norm = self._optimiser.step(loss)
        copy_to_averages(self.agent, self.policy)
        return metrics | {"policy_grad_norm": norm}

    def state_dict(self) -> dict[str, Tensor]:
        """The agent's tensors, themselves and not copies."""
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back into the agent's own tensors. Raises ValueError where it does not fit."""
        self.agent.load_state_dict(state)

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that fine-tuning adds to the agent's: the optimiser's and the pretrained policy's."""
        own = {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state_dict().items()}
        return own | {f"pretrained.{name}": tensor for name, tensor in self.pretrained.state_dict().items()}


class PreferenceTrainer(OwningTrainer[SegmentPairBatch]):
    """A stack of seeds that learns from preferences; its steps are updates.

    learner, pairs: what learns, and what from. The other arguments are those of `StackTrainer`.
    """

    def __init__(
        self,
        learner: PreferenceLearner,
        pairs: SegmentPairs,
        generator: torch.Generator,
        evaluate: Evaluate,
        *,
        capture: bool = True,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        batch_size = learner.config.batch_size
        super().__init__(learner, pairs, batch_size, generator, evaluate, capture=capture, on_close=on_close)
