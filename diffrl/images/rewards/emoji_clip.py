"""A small two-tower model of tiny-emoji's pictures and prompts, scored as CLIP's are (Radford et al. 2021; CLIPScore).

One tower maps an image, the other the words of a prompt, to a unit vector each; the score is 100 times their cosine.
They were trained against each other, by the symmetric cross-entropy of arXiv 2103.00020, on emoji of five typefaces
that tiny-emoji has not seen; each is right on a picture where its own prompt is the nearest of all 84.

The weights come with the package; `benchmarks/emoji/towers.py` makes them, and states what they are right on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffrl.images.emoji_words import COLOURS, OBJECTS, words_of
from diffrl.images.models.emoji import WEIGHTS
from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.images.rewards.emoji import to_32x32
from diffrl.support.errors import UserError
from diffrl.support.folder import read_tensors
from diffrl.support.machine import usual_torch
from diffrl.support.seeds import undrawn

FILE = WEIGHTS / "emoji-clip.safetensors"
WIDTH = 48
"""Numbers of an embedding."""


class Towers(nn.Module):
    """An image tower, a text tower, and the logarithm of the scale of their cosines; random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(96, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * 16, 96),
            nn.SiLU(),
            nn.Linear(96, WIDTH),
        )
        self.words = nn.EmbeddingBag(1 + len(OBJECTS) + len(COLOURS), 64, mode="sum", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def images(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [0, 1] -> unit vectors (B, WIDTH)."""
        return normalize(self.image(2 * images - 1), dim=-1)

    def prompts(self, tokens: Tensor) -> Tensor:
        """Words (B, 2), as `tokens_of` numbers them -> unit vectors (B, WIDTH)."""
        return normalize(self.text(self.words(tokens)), dim=-1)


def tokens_of(prompts: Sequence[str]) -> Tensor:
    """The words of prompts (B, 2): the object's number, from 1 on, and the colour's, after those; 0 for no colour.

    Raises UserError for a prompt that tiny-emoji does not know.
    """
    rows = []
    for prompt in prompts:
        colour, thing = words_of(prompt)
        rows.append([1 + thing, 0 if colour is None else 1 + len(OBJECTS) + colour])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


@usual_torch()
def towers() -> Towers:
    """The trained towers, frozen. Raises Damaged where the package's file is not as it was shipped."""
    with undrawn():
        made = Towers()
    made.load_state_dict({name: tensor.float() for name, tensor in read_tensors(FILE).items()})
    return made.eval().requires_grad_(False)


class EmojiClip:
    """100 times the cosine of an image and a prompt, in [-100, 100]. Differentiable.

    prompt: which, such as "blue heart"; None: the image's own.
    """

    differentiable = True

    def __init__(self, prompt: str | None = None, *, device: str | torch.device = "cpu") -> None:
        self.name = "emoji-clip" if prompt is None else f"emoji-clip:{prompt}"
        self.prompt = prompt
        if prompt is not None:
            words_of(prompt)
        self.device = torch.device(device)
        self.towers = towers().to(self.device)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image. Raises RewardError for a prompt that it does not know."""
        embedded = self.towers.images(to_32x32(images).to(self.device))
        wanted = self.towers.prompts(self._tokens(prompts, len(images)).to(self.device))
        values: Tensor = 100 * (embedded * wanted).sum(-1)
        return values.to(images.device)

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise RewardError for a prompt that it does not know, where no other one is asked for."""
        self._tokens(prompts, len(prompts))

    def _tokens(self, prompts: Sequence[str], n: int) -> Tensor:
        """The words of what each of n images is to show."""
        try:
            return tokens_of(prompts if self.prompt is None else [self.prompt] * n)
        except UserError as error:
            raise RewardError(
                f"{self.name}: which object? Name one for all, '{self.name}:blue heart'. {error}"
            ) from error
