"""What a reward is: a function of images, their prompts and whatever else is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffrl.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Metadata = Sequence[Mapping[str, Any]]
"""What a prompts file says of each prompt beside its text."""


class Reward(Protocol):
    """Images (B, 3 or 1, H, W) in [0, 1], float32, and their B prompts and metadata -> values (B,), more is better.

    One value a sample, whatever else is in the batch. On the images' device, float32 or float64.
    """

    name: str
    differentiable: bool
    """Whether the values carry a gradient to the images, for DRaFT, AlignProp and ReFL."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The values (B,)."""


class RewardError(UserError):
    """A reward that answers with something that cannot be learned from."""


def ask(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
    """The reward's values as float32 (B,). Raises RewardError where they are of a wrong shape, or not finite."""
    import torch

    values = reward(images, prompts, [{}] * len(prompts) if metadata is None else metadata)
    if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise RewardError(f"The reward {reward.name} gave {got} for {len(images)} images; expected ({len(images)},).")
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise RewardError(
            f"The reward {reward.name} is {values[i].item()} for image {i} of {len(images)} "
            f"(prompt {prompts[i]!r}); it must be finite."
        )
    return values.float()
