"""Advantages: how much better a sample's reward is than what its prompt usually earns."""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from diffrl.support.errors import UserError


class PromptStatistics:
    """DDPO's advantages (Black et al. 2023, arXiv 2305.13301): A = (r - mean) / std of the prompt.

    Mean and deviation are of the last `size` rewards of the same prompt, those just seen among them. A prompt with
    fewer than `least` of them takes those of the whole batch instead, and so does every prompt with size = 0. `clip`
    limits |A| (None: no limit). Defaults as published. Of
    equal rewards they are exactly 0, and not rounding.

    `state_dict` is plain JSON: a run that is resumed with it goes on as if it had not stopped.
    """

    def __init__(self, size: int = 32, least: int = 16, clip: float | None = 5.0) -> None:
        if least < 1 or (size != 0 and size < least) or (clip is not None and not clip > 0):
            raise ValueError(f"need size = 0 or size >= least >= 1, and clip > 0; got {size}, {least} and {clip}")
        self.size, self.least, self.clip = size, least, clip
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Add `rewards` (B,), one a prompt, and give their advantages (B,), of the rewards' dtype and device.

        Read on the host. Raises ValueError where the lengths differ, UserError for a reward that is not finite: it
        would stay in the statistics.
        """
        if rewards.shape != (len(prompts),):
            raise ValueError(f"rewards of shape {tuple(rewards.shape)} for {len(prompts)} prompts; need one each")
        values = rewards.detach().to("cpu", torch.float64)
        for prompt, reward in zip(prompts, values.tolist(), strict=True):
            if not math.isfinite(reward):
                raise UserError(f"the reward of a sample for the prompt {prompt!r} is {reward}; it must be finite")
        for prompt, reward in zip(prompts, values.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.size)).append(reward)
        batch = _moments(values)
        moments = {prompt: self._moments(prompt, batch) for prompt in set(prompts)}
        mean, std = torch.tensor([moments[prompt] for prompt in prompts], dtype=torch.float64).reshape(-1, 2).unbind(1)
        advantages = (values - mean) / (std + 1e-6)
        if self.clip is not None:
            advantages = advantages.clamp(-self.clip, self.clip)
        return advantages.to(rewards)

    def _moments(self, prompt: str, batch: tuple[float, float]) -> tuple[float, float]:
        seen = self._rewards[prompt]
        return batch if len(seen) < self.least else _moments(torch.tensor(seen, dtype=torch.float64))

    def state_dict(self) -> dict[str, list[float]]:
        """The remembered rewards by prompt, oldest first."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore a `state_dict` in place of what is remembered; of more than `size` rewards the last are kept."""
        self._rewards = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in state.items()}


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and deviation; of equal values exactly these and 0: the mean of ten .1 is not .1."""
    if values.numel() and values.min() == values.max():
        return values[0].item(), 0.0
    return values.mean().item(), values.std(correction=0).item()


def group_advantages(rewards: Tensor, *, scale: bool = True, clip: float | None = None) -> Tensor:
    """GRPO's advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): A = (r - mean) / std within each group.

    rewards: (..., G), along the last axis the G samples of one prompt, a group; the advantages are of its shape.
    scale: divide by the deviation; without, A = r - mean (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783), whose policy
        gradient is unbiased up to a factor (G - 1)/G.
    clip: limits |A|, where given.

    1e-4 is added to the deviation (Flow-GRPO). A group of equal rewards teaches nothing: its advantages are exactly 0.
    Raises ValueError for groups of one.
    """
    if rewards.ndim == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"a group needs at least two samples of its prompt, got shape {tuple(rewards.shape)}")
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    advantages = torch.where(equal, 0.0, rewards - rewards.mean(-1, keepdim=True))
    if scale:
        advantages = advantages / (rewards.std(-1, correction=0, keepdim=True) + 1e-4)
    return advantages if clip is None else advantages.clamp(-clip, clip)
