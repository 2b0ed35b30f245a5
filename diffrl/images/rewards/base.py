"""What a reward is: a function of images, their prompts and whatever else is known of them; and sums of rewards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffrl.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Metadata = Sequence[Mapping[str, Any]]
"""What a prompts file says of each prompt beside its text."""


class Reward(Protocol):
    """Images (B, 3 or 1, H, W) in [0, 1], float32, and their B prompts and metadata -> values (B,), more is better.

    Of a video (B, F, 3, H, W) a reward sees single frames (`shown`), and its value is their mean, unless it has an
    attribute `videos` that is true: then it gets whole videos.

    One value a sample, whatever else is in the batch. On the images' device, float32 or float64. A reward with an
    attribute `grouped` that is true compares images of a prompt: it is asked about all those of a round, and no others.
    One with a method `check_prompts(prompts, metadata)` is shown all prompts of a run before it begins, and raises
    UserError for one that it cannot take.
    """

    name: str
    differentiable: bool
    """Whether the values carry a gradient to the images, for DRaFT, AlignProp and ReFL."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""


def parts_of(reward: Reward | None) -> list[Reward]:
    """The rewards that one is made of: the terms of a sum, else itself; none of None."""
    if isinstance(reward, Sum):
        return [part for _, part in reward.terms]
    return [] if reward is None else [reward]


def asks_a_person(spec: str | None) -> bool:
    """Whether a person votes on images of the run, as `human` and `human:4` ask for; `human:VOTES.json` asks nobody."""
    return any(re.fullmatch(r"\s*([^*:\s]*\s*\*)?\s*human(:\d+)?\s*", text) for text in (spec or "").split(" + "))


def grouped(reward: Reward) -> bool:
    """Whether a reward, or a part of a sum, is to be asked about all images of a prompt in one call."""
    return any(getattr(part, "grouped", False) for part in parts_of(reward))


def check_prompts(reward: Reward | None, prompts: Sequence[str], metadata: Metadata) -> None:
    """Raise UserError where a reward, or a part of a sum, says that it cannot take one of the prompts of a run."""
    for part in parts_of(reward):
        check = getattr(part, "check_prompts", None)
        if check is not None:
            check(list(prompts), _copied(metadata))


SLACK = 2**-7
"""By how much a pixel that is asked about may lie outside [0, 1]: rounding, in bfloat16 too."""
FRAMES = 4
"""How many frames of a video a reward of images sees."""


def shown(frames: int) -> list[int]:
    """The numbers of the frames, of so many, that a reward of images sees: at most `FRAMES`, the first and the last
    among them, as even as whole numbers allow."""
    n = min(FRAMES, frames)
    return [(i * (frames - 1) + (n - 1) // 2) // (n - 1) for i in range(n)] if n > 1 else [0]


def without_gradient(name: str, algo: str) -> UserError:
    """What is said of a reward without a gradient, for an algorithm that needs one."""
    function = name.partition("#")[2]
    others = "choose a classifier, aesthetic, clip and the like, or --algo ddpo-is"
    if name.startswith("python:") and function.isidentifier():
        others = f"if it is made of torch's operations, write {function}.differentiable = True below it; else {others}"
    return UserError(f"{algo} needs a reward with a gradient, and {name} has none: {others}.")


class RewardError(UserError):
    """A reward that answers with something that cannot be learned from."""


class GradientError(RewardError):
    """A reward that says that it is differentiable, and whose gradient is none, or that of other images."""


def ask(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
    """The reward's values as float32 (B,), the caller's own; of videos the mean over the frames that are `shown`.

    prompts: one an image, or none at all. Raises UserError for another number of them or of metadata, and for pixels
    outside [0, 1]; RewardError as `answer`.
    """
    _check_images(images, prompts, metadata)
    return answer(reward, images, prompts, metadata)


def answer(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
    """As `ask`, of a run's own images: what is asked is not looked at, but what is answered.

    A reward may be anybody's code: it gets copies of the images, prompts and metadata, so that whatever it does to them
    reaches neither the other rewards nor the measures. Raises RewardError where its values are of a wrong shape or not
    finite, and, of images that carry a gradient, where it changes them in place or its values have no gradient.
    """
    import torch

    if images.ndim == 5 and not getattr(reward, "videos", False):
        each = [answer(reward, images[:, frame], prompts, metadata) for frame in shown(images.shape[1])]
        return torch.stack(each).mean(0)
    given = images.clone()
    version = given._version
    values = reward(given, list(prompts), [{}] * len(prompts) if metadata is None else _copied(metadata))
    if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise RewardError(f"The reward {reward.name} gave {got} for {len(images)} images; expected ({len(images)},).")
    if values.is_complex():
        raise RewardError(f"The reward {reward.name} gave complex numbers; expected real ones, such as their abs().")
    if images.requires_grad and torch.is_grad_enabled() and reward.differentiable:
        _check_gradient(reward, values, changed=given._version != version)
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise RewardError(
            f"The reward {reward.name} is {values[i].item()} for image {i} of {len(images)} "
            f"(prompt {prompts[i]!r}); it must be finite."
        )
    return values.to(torch.float32, copy=True)  # it may keep the tensor, and fill it again next time


def _check_images(images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> None:
    """Raise UserError for images that have no prompt and no metadata each, or pixels outside [0, 1]."""
    for what, given in (("prompts", prompts), ("metadata", metadata)):
        if given and len(given) != len(images):
            raise UserError(
                f"A reward is asked about {len(images)} images with {len(given)} {what}: give each its own."
            )
    low, high = (float(bound) for bound in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if low < -SLACK or high > 1 + SLACK:
        raise UserError(
            f"A reward is asked about pixels from {low:.5g} to {high:.5g}; they must be in [0, 1]: clamp them, or "
            "divide those of 0 to 255 by 255."
        )


def _check_gradient(reward: Reward, values: Tensor, changed: bool) -> None:
    """Raise GradientError where a gradient would be that of other images than the model's, or is none."""
    if changed:
        raise GradientError(
            f"The reward {reward.name} changes the images in place (mul_, clamp_, Normalize(inplace=True) and the "
            "like), so its gradient is not that of the model's images: let it work on images.clone()."
        )
    if not values.requires_grad:
        raise GradientError(
            f"The reward {reward.name} says that it is differentiable, and its values carry no gradient to the images: "
            "compute them by torch's operations, without detach(), no_grad() or NumPy."
        )


def _copied(value: Any) -> Any:
    """Metadata with lists and dictionaries of their own, at every depth; what else is in them is the same."""
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list | tuple) else value


class Sum:
    """The weighted sum of rewards, itself one, in `terms` order; differentiable where all its parts are."""

    videos = True
    """Each part says for itself what it sees of a video."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        names = [part.name for _, part in terms]
        if len(set(names)) < len(names):
            raise UserError(f"a reward stands twice in {' + '.join(names)!r}; add up its weights instead")
        self.terms = list(terms)
        self.name = " + ".join(part.name if w == 1 else f"{w:g}*{part.name}" for w, part in terms)
        self.differentiable = all(part.differentiable for _, part in terms)

    def values(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> dict[str, Tensor]:
        """Each part's values (B,) by its name, without their weights, checked as `answer` does."""
        return {part.name: answer(part, images, prompts, metadata) for _, part in self.terms}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of what `values` gave, with the weights."""
        import torch

        return torch.stack([weight * values[part.name] for weight, part in self.terms]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        return self.combine(self.values(images, prompts, metadata))


def ask_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `ask`, with the values of each part of a sum beside it: (B,), and (B,) by name."""
    _check_images(images, prompts, metadata)
    return answer_parts(reward, images, prompts, [{}] * len(prompts) if metadata is None else metadata)


def answer_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `answer`, with the values of each part of a sum beside it, for the log: (B,), and (B,) by name."""
    if not isinstance(reward, Sum):
        total = answer(reward, images, prompts, metadata)
        return total, {reward.name: total}
    parts = reward.values(images, prompts, metadata)
    return reward.combine(parts), parts
