"""Preference fine-tuning of a policy: Diffusion-DPO on the actions of trajectory segments.

The implicit reward difference of a pair of segments of H steps, a preferred one (w) and another (l), is

    z = -beta/2 sum_h [(e_w,h - e_ref,w,h) - (e_l,h - e_ref,l,h)],    e = |m - m_theta(a_t, t, s)|^2 / A,

Diffusion-DPO's (Wallace et al. 2023, arXiv 2311.12908, eq. 14) with the action as the image and the state as its
prompt, summed over a segment as in contrastive preference learning (Hejna et al. 2023, arXiv 2310.13639), whose log pi
is here the bound that denoising errors give. Both segments of a pair have the same times t and the same noise, step by
step. Their states differ, as they do in trajectories, so each error is held against the frozen policy's in that state.

D3PO, which has no use for a data set's actions (it compares chains, and nobody recorded those), is left to images.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.base import Agent, GenerativePolicy
from diffrl.alignment.losses import PairErrors, diffusion_dpo_loss
from diffrl.data.preprocessing import Preprocessing
from diffrl.data.transitions import Batch
from diffrl.diffusion import denoising_loss
from diffrl.nets import Adam, copy_state_
from diffrl.support.errors import UserError
from diffrl.training.stack import Evaluate, Progress, StackTrainer
from diffrl.tuning.config import DPOConfig
from diffrl.tuning.ppo import OWN, part
from diffrl.tuning.preferences import Preferences
from diffrl.tuning.target import copy_to_averages, denoising_policy, reference


class SegmentPairs:
    """Preferences on the training device, in the agent's units. A `Source`, whose rows are pairs of segments.

    A batch has the preferred segments in its first half: observations (S, 2 B H, O), the steps of a segment in a row,
    pair by pair; its other columns but `actions` are empty.
    """

    def __init__(self, preferences: Preferences, preprocessing: Preprocessing, device: torch.device) -> None:
        parts = preprocessing.to(device)

        def both(kind: str) -> Tensor:
            columns = [torch.from_numpy(getattr(preferences, f"{kind}_{side}")) for side in "wl"]
            return torch.stack(columns).to(device)

        self.horizon = preferences.horizon
        self._observations = parts.observations(both("observations"))
        self._actions = parts.actions(both("actions")).clamp(-1, 1)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        """`batch_size` pairs for each seed."""
        n = self._observations.shape[1]
        index = torch.randint(n, (n_seeds, batch_size), generator=generator, device=self._observations.device)
        observations, actions = (
            table[:, index].transpose(0, 1).flatten(1, 3) for table in (self._observations, self._actions)
        )
        none = observations.new_zeros(n_seeds, 0)
        return Batch(observations, actions, none, none[..., None], none, none, none)


class PreferenceLearner:
    """An agent's policy as a `Learner` from pairs of segments. Its state is the agent's; its own is `own_state`."""

    period = 1

    def __init__(self, agent: Agent, config: DPOConfig, horizon: int) -> None:
        self.agent, self.config, self.horizon = agent, config, horizon
        self.n_seeds, self.seeds = agent.n_seeds, agent.seeds
        self.policy = denoising_policy(agent).requires_grad_(True)
        self.pretrained = reference(self.policy)
        self._optimiser = Adam(self.policy, config.learning_rate, config.grad_clip, warm_up=config.warm_up)

    def errors(self, batch: Batch, t: Tensor, noise: Tensor) -> PairErrors:
        """Denoising errors summed over the segments' steps: (S, B) each.

        t: (S, B H), noise: (S, B H, A): of each step of a pair, for both its segments.
        """
        t, noise = torch.cat([t, t], 1), torch.cat([noise, noise], 1)

        def of(policy: GenerativePolicy) -> tuple[Tensor, Tensor]:
            network = policy.bound(batch.observations)
            error = denoising_loss(policy.prediction, network, batch.actions, t, noise)
            w, l = error.view(self.n_seeds, 2, -1, self.horizon).sum(-1).unbind(1)  # noqa: E741
            return w, l

        with torch.no_grad():
            ref_w, ref_l = of(self.pretrained)
        return PairErrors(*of(self.policy), ref_w, ref_l)

    def loss(self, batch: Batch, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion-DPO, and the preferred segments' errors beside it, by bc_weight beta/2: (S,)."""
        errors = self.errors(batch, t, noise)
        loss, metrics = diffusion_dpo_loss(errors, beta=self.config.beta, kind=self.config.loss)
        total = loss + self.config.bc_weight * self.config.beta / 2 * errors.w.mean(-1)
        # Errors a step are what a reader knows from training the policy.
        metrics |= {name: metrics[name] / self.horizon for name in ("error_w", "error_l")}
        return total, metrics | {"loss": total.detach()}

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """See `Learner`."""
        half = batch.actions[:, : batch.actions.shape[1] // 2]
        i = torch.randint(len(self.policy.times), half.shape[:-1], generator=generator, device=half.device)
        noise = torch.randn(half.shape, generator=generator, device=half.device)
        loss, metrics = self.loss(batch, self.policy.times[i], noise)
        norm = self._optimiser.step(loss)
        copy_to_averages(self.agent, self.policy)
        return metrics | {"policy_grad_norm": norm}

    def state_dict(self) -> dict[str, Tensor]:
        """The agent's."""
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The agent's."""
        self.agent.load_state_dict(state)

    def own_state(self) -> dict[str, Tensor]:
        """The optimiser's and the pretrained policy's."""
        own = {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state_dict().items()}
        return own | {f"pretrained.{name}": tensor for name, tensor in self.pretrained.state_dict().items()}


class PreferenceTrainer:
    """A stack of seeds that learns from preferences. A `Trainer`, whose steps are updates."""

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
        self._learner = learner
        self._stack = StackTrainer(
            learner, pairs, learner.config.batch_size, generator, evaluate, capture=capture, on_close=on_close
        )
        self.seeds, self.groups, self.device = self._stack.seeds, self._stack.groups, self._stack.device
        self.new_episodes, self.value_limit = self._stack.new_episodes, self._stack.value_limit
        self.advance, self.sums, self.reset = self._stack.advance, self._stack.sums, self._stack.reset

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return self._stack.state() | {f"{OWN}{name}": t for name, t in self._learner.own_state().items()}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """See `Trainer`."""
        try:
            copy_state_(self._learner.own_state(), part(state, OWN))
        except ValueError as error:
            raise UserError(str(error)) from error
        self._stack.load({name: tensor for name, tensor in state.items() if not name.startswith(OWN)}, step)

    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._stack.hold(positions, good)

    def evaluate(self, step: int, on_progress: Progress) -> NDArray[np.float64]:
        """See `Trainer`."""
        return self._stack.evaluate(step, on_progress)

    def close(self) -> None:
        """See `Trainer`."""
        self._stack.close()
