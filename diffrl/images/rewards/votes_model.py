"""A small network that scores images as a person would, learned from votes by Bradley-Terry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrl.alignment.preferences import bradley_terry_loss
from diffrl.support.errors import UserError

SIDE = 32
"""Larger images are averaged down to this height and width."""
STEPS, BATCH, RATE, DECAY = 200, 128, 3e-3, 1e-2
WIDTH = 24


class VotesModel(nn.Module):
    """Scores of images (B, C, H, W), whole numbers 0 to 255, of prompts: (w + v_prompt) f(image).

    f is three convolutions, their mean and largest answers; v is 0 for a prompt that nobody has voted on. Of one prompt
    sigmoid(score - score') is the probability that the first is preferred.
    """

    def __init__(self, shape: Sequence[int], prompts: Sequence[str]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.prompts = {prompt: i for i, prompt in enumerate(prompts)}
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], WIDTH, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.common = nn.Parameter(torch.zeros(2 * WIDTH))
        self.own = nn.Parameter(torch.zeros(len(self.prompts) + 1, 2 * WIDTH))

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), with a graph."""
        if tuple(images.shape[1:]) != self.shape:
            now, then = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
            raise UserError(
                f"The images are {now}, and the votes are about images of {then}: they are another model's."
            )
        x = images.float() / 127.5 - 1
        if max(self.shape[1:]) > SIDE:
            x = F.adaptive_avg_pool2d(x, (min(self.shape[1], SIDE), min(self.shape[2], SIDE)))
        f = self.features(x)
        f = torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)
        unknown = len(self.prompts)
        index = torch.tensor([self.prompts.get(prompt, unknown) for prompt in prompts])
        known = (index < unknown)[:, None]
        return (f * (self.common + self.own[index] * known)).sum(1)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), without a graph."""
        return self.scores(images, prompts)

    @classmethod
    @torch.enable_grad()
    def fit(cls, pairs: Sequence[tuple[str, Tensor, Tensor]]) -> VotesModel:
        """The model of pairs (prompt, the other image, the preferred one); the same pairs give the same model."""
        prompts = sorted({prompt for prompt, _, _ in pairs})
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls(pairs[0][1].shape, prompts)
        if len({image.shape for _, other, best in pairs for image in (other, best)}) > 1:
            raise UserError("The votes are about images of several sizes: they are of several models.")
        others, preferred = torch.stack([pair[1] for pair in pairs]), torch.stack([pair[2] for pair in pairs])
        optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
        for _ in range(STEPS):
            i = torch.randint(len(pairs), (min(BATCH, len(pairs)),), generator=generator)
            said = [pairs[j][0] for j in i.tolist()]
            loss = bradley_terry_loss(
                model.scores(others[i], said), model.scores(preferred[i], said), torch.ones(len(i))
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return model.requires_grad_(False)
