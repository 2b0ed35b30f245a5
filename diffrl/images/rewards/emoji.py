"""Rewards on tiny-emoji's pictures: does the image show what the prompt says, in the colour that it says?

Three small convolutional networks say how probable each object and each colour is. `emoji` was trained on the pictures
that tiny-emoji itself learned from (Noto Color Emoji); `emoji-held-out` on emoji of five other typefaces, so that it
knows a heart from other drawings; the classifier of the measures on all six. What a run gains on `emoji` and not on the
others is not likeness but error of one network (over-optimisation). That classifier is no reward: nothing is ever
optimised against it.

The weights come with the package; `benchmarks/emoji/classifiers.py` makes them, and states what they are right on.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffrl.images.emoji_words import COLOURS, OBJECTS, words_of
from diffrl.images.models.emoji import WEIGHTS
from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.support.errors import UserError
from diffrl.support.folder import read_tensors
from diffrl.support.machine import usual_torch
from diffrl.support.seeds import undrawn

SIDE = 32
Which = Literal["emoji", "emoji-held-out", "classifier"]
"""The networks by their files' names; `classifier` is that of the measures."""


class Emoji:
    """The probability that a network gives the prompt's object, times that of its colour if it has one, in [0, 1].

    prompt: which, such as "blue heart"; None: the image's own. held_out: ask the other network. Differentiable.
    """

    differentiable = True

    def __init__(
        self, prompt: str | None = None, *, held_out: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        which: Which = "emoji-held-out" if held_out else "emoji"
        self.name = which if prompt is None else f"{which}:{prompt}"
        self.prompt = prompt
        if prompt is not None:
            words_of(prompt)
        self.network = network(which).to(device)
        self.device = torch.device(device)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        wanted = self._wanted(prompts, len(images))
        things, colours = self.network(to_32x32(images).to(self.device)).split([len(OBJECTS), len(COLOURS)], -1)
        thing = torch.tensor([thing for _, thing in wanted], device=self.device)
        colour = torch.tensor([-1 if colour is None else colour for colour, _ in wanted], device=self.device)
        of_colour = colours.softmax(-1).gather(1, colour.clamp_min(0)[:, None])[:, 0]
        of_thing = things.softmax(-1).gather(1, thing[:, None])[:, 0]
        values: Tensor = of_thing * torch.where(colour < 0, torch.ones_like(of_colour), of_colour)
        return values.to(images.device)

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise RewardError for a prompt that names none of the objects, where no other one is asked for."""
        self._wanted(prompts, len(prompts))

    def _wanted(self, prompts: Sequence[str], n: int) -> list[tuple[int | None, int]]:
        """The numbers of the colour, if any, and of the object that each of n images is to show."""
        try:
            return [words_of(p) for p in (prompts if self.prompt is None else [self.prompt] * n)]
        except UserError as error:
            raise RewardError(
                f"The reward {self.name} is for prompts of --model tiny-emoji; for others there is {self.name}:PROMPT, "
                f"such as '{self.name}:blue heart'. {error}"
            ) from error


def to_32x32(images: Tensor) -> Tensor:
    """Images (B, 3 or 1, H, W) as (B, 3, 32, 32), averaged over areas, or enlarged.

    Raises UserError for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images of shape {tuple(images.shape)}; pictures are (B, 3 or 1, H, W)")
    rgb = images.float().expand(-1, 3, -1, -1)
    if rgb.shape[2:] == (SIDE, SIDE):
        return rgb
    mode = "area" if min(rgb.shape[2:]) >= SIDE else "bilinear"
    return interpolate(rgb, size=(SIDE, SIDE), mode=mode)


def untrained(which: Which) -> nn.Sequential:
    """Maps (B, 3, 32, 32) in [0, 1] to logits (B, 12 + 6), of objects and of colours; random weights."""
    outputs = len(OBJECTS) + len(COLOURS)
    if which == "emoji-held-out":  # patches, then dense layers
        return nn.Sequential(
            nn.Conv2d(3, 48, 6, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(48, 48, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 24, 1),
            nn.Flatten(),
            nn.Linear(24 * 64, 40),
            nn.SiLU(),
            nn.Linear(40, outputs),
        )
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, outputs),
    )


@usual_torch()
def network(which: Which) -> nn.Module:
    """The trained network, frozen. Raises Damaged where the package's file is not as it was shipped."""
    with undrawn():  # the caller's generator is not ours
        made = untrained(which)
    made.load_state_dict({name: t.float() for name, t in read_tensors(WEIGHTS / f"{which}.safetensors").items()})
    return made.eval().requires_grad_(False)


class EmojiClassifier:
    """What the measures of a run on tiny-emoji ask: which object and which colour an image shows."""

    def __init__(self) -> None:
        self.network = network("classifier")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities of the objects (B, 12), in the order of OBJECTS."""
        logits: Tensor = self.network(to_32x32(images))
        return logits[:, : len(OBJECTS)].softmax(-1)

    @torch.no_grad()
    def agree(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether each image (B, 3, H, W) shows its prompt's object, in its colour if it names one: bool (B,)."""
        things, colours = self.network(to_32x32(images)).split([len(OBJECTS), len(COLOURS)], -1)
        wanted = [words_of(prompt) for prompt in prompts]
        thing = torch.tensor([thing for _, thing in wanted])
        colour = torch.tensor([-1 if colour is None else colour for colour, _ in wanted])
        agreed: Tensor = (things.argmax(-1) == thing) & ((colour < 0) | (colours.argmax(-1) == colour))
        return agreed


@functools.cache
def emoji_classifier() -> EmojiClassifier:
    """The classifier, read once."""
    return EmojiClassifier()
