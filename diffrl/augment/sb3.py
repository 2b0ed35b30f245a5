"""A replay buffer for Stable-Baselines3 that trains SAC, TD3 or DDPG on synthetic experience beside the real.

    from diffrl.augment.synther.config import Sampling, SynthERConfig
    from diffrl.augment.sb3 import SyntheticReplayBuffer

    SAC(
        "MlpPolicy",
        env,
        gradient_steps=20,
        replay_buffer_class=SyntheticReplayBuffer,
        replay_buffer_kwargs={"samples": 100_000, "model": SynthERConfig(width=256, steps=10_000)},
    )

SynthER (Lu et al. 2023, arXiv 2303.06614), online: every 10,000 steps a new model, 1,000,000 rows, 1 : 1, and 20
updates a step, for which the synthetic rows are there.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.augment import streams
from diffrl.augment.synther.config import RefitConfig, Sampling, SynthERConfig
from diffrl.augment.synther.refit import RefittingBuffer
from diffrl.data.replay import row_counts
from diffrl.data.sb3 import real_action_space, to_dataset
from diffrl.data.transitions import Transitions
from diffrl.support.errors import UserError
from diffrl.support.seeds import check_seed, generator_at

try:
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise UserError("Replay buffers for Stable-Baselines3 need an extra: pip install 'diffrl[sb3]'") from error


class SyntheticReplayBuffer(ReplayBuffer):
    """SB3's replay buffer, whose batches hold synthetic rows at a share from the first fit on.

    The real rows are stored and drawn as by SB3. The first batch asked for after every `refit_every` environment steps
    waits for a new model: fitted to all real rows there are, it generates `samples` rows in place of the last model's.
    Synthetic rows are in the buffer's units (observations before `VecNormalize`, actions in [-1, 1]) and drawn through
    the same normalisation; terminal are those that the model says are true ends, never cuts.

    synthetic_share, refit_every, first_fit, samples, model, sampling: the fields of `RefitConfig`. model_device: where
    the model is fitted, by default where the algorithm is. verbose: 1 prints a line a fit. seed: what all random
    numbers of models and synthetic rows come from; by default PyTorch's seed, which SB3's algorithms have set to their
    own by the time they make a buffer.

    Raises UserError for observations that are no Box of real numbers, for actions that are no Box, and for a negative
    seed.
    """

    def __init__(
        self,
        *args: Any,
        synthetic_share: float = 0.5,
        refit_every: int = 10_000,
        first_fit: int | None = None,
        samples: int = 1_000_000,
        model: SynthERConfig | None = None,
        sampling: Sampling | None = None,
        model_device: str | None = None,
        seed: int | None = None,
        verbose: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        real_action_space(self)
        if not np.issubdtype(self.observations.dtype, np.floating):
            raise UserError(
                f"The observations are {self.observations.dtype}; SynthER models real numbers. Images and counts need "
                "an encoder first."
            )
        config = RefitConfig(
            synthetic_share, refit_every, first_fit, samples, model or SynthERConfig(), sampling or Sampling()
        )
        self.verbose = verbose
        self._added = 0
        seed = torch.initial_seed() % 2**63 if seed is None else seed
        check_seed(seed, "`seed`")
        space: Any = self.observation_space
        self.synthetic = RefittingBuffer(
            config,
            (seed,),
            seed,
            self.real,
            observation_size=space.low.size,
            action_size=self.action_dim,
            observation_bounds=(space.low.ravel(), space.high.ravel()),
            device=self.device if model_device is None else model_device,
            say=self._say,
        )
        self._generator = generator_at(seed, streams.DRAW, device=self.synthetic.device)

    @property
    def steps(self) -> int:
        """Steps added so far, of all environments; at least as many as the buffer holds, however these came there."""
        return max(self._added, self.size() * self.n_envs)

    def real(self) -> Transitions:
        """A copy of the real rows, with actions as the buffer holds them."""
        return Transitions.from_dataset(to_dataset(self, scaled_actions=False), self.synthetic.device)

    @override
    def add(self, *args: Any, **kwargs: Any) -> None:
        before = self.steps
        super().add(*args, **kwargs)
        self._added = before + self.n_envs

    @override
    def reset(self) -> None:
        """Forget all rows, the synthetic ones too."""
        super().reset()
        self._added = 0
        self.synthetic.clear()

    @override
    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw a batch, the real rows first. A fit that is due is made before."""
        if self.synthetic.due(self.steps):
            self.synthetic.refit(self.steps)
        share = self.synthetic.config.share if self.synthetic.number else 0.0
        n_real, n = row_counts(batch_size, (1 - share, share))
        if not n:
            return super().sample(batch_size, env)
        synthetic = self._synthetic(n, env)
        if not n_real:
            return synthetic
        real = super().sample(n_real, env)
        parts = zip(real[:5], synthetic[:5], strict=True)
        return ReplayBufferSamples(*(torch.cat(pair) for pair in parts))

    def _synthetic(self, n: int, env: VecNormalize | None) -> ReplayBufferSamples:
        """Draw n synthetic rows, in the types, shapes and normalisation of SB3's batches."""
        batch = self.synthetic.view(self.synthetic.draw_rows(n, 1, self._generator)[0])

        def observations(values: torch.Tensor) -> NDArray[Any]:
            array = values.cpu().numpy().reshape(n, *self.obs_shape).astype(self.observations.dtype)
            return np.asarray(self._normalize_obs(array, env))

        data = (
            observations(batch.observations),
            batch.actions.cpu().numpy().astype(self.actions.dtype),
            observations(batch.next_observations),
            batch.terminals[:, None].cpu().numpy(),
            self._normalize_reward(batch.rewards[:, None].cpu().numpy(), env),
        )
        return ReplayBufferSamples(*map(self.to_torch, data))

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)
