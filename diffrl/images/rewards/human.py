"""A person as the reward: votes between images of one prompt, on a page, and a model that is learned from them.

In every round the person is asked about a few groups of the round's images, and picks the best of each. A small network
learns the Bradley-Terry scores of all votes so far, and scores all images. What it learns from is kept: `votes.json` in
the run's folder has each vote with the digests of its images, and that there are `enough` where the person said so;
`votes/` has the images. A run that goes on, or is made again with the same seed, finds the votes that it asks for and
does not ask again.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrl.images.rewards.base import Metadata
from diffrl.images.rewards.votes_file import FILE, IMAGES, Vote, png, read_kept, read_votes, write_votes
from diffrl.images.rewards.votes_model import VotesModel
from diffrl.support.console import console
from diffrl.support.errors import UserError, counted, shown
from diffrl.support.files import atomic_path
from diffrl.support.page import Page, open_browser, static
from diffrl.support.seeds import generator_at

VOTES = 4
"""Groups that are asked about in a round, unless the reward's argument says otherwise."""
GROUP = 4
"""Images of a group, at most; at least two."""
_ORDER = 11
"""What random numbers are for: which groups of a round are asked about."""


class Human:
    """The reward `human`: the score of a model of a person's votes, asked for as the run goes on.

    votes: groups to ask about in a round. Until there is a vote every score is 0.
    """

    differentiable = False
    videos = True
    """Refused whole: nobody votes on single frames."""

    def __init__(self, votes: int = VOTES, name: str = "human", ready: Any = None) -> None:
        self.name, self.per_round = name, votes
        self.votes: list[Vote] = []
        self.asks = True
        """Whether the person still wants to be asked."""
        self._told = False
        """Whether it is kept that the person does not."""
        self._ready = open_browser if ready is None else ready
        self._folder: Path | None = None
        self._round, self._left = 0, 0
        self._asking = False
        self.can_go_back = False
        """Whether the newest vote is on the group before the one that is shown, so that it can be asked about again."""
        self._model: tuple[int, VotesModel] | None = None
        self._pixels: dict[str, Tensor] = {}
        self._asked: _Asked | None = None

    # --- in a run ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, folder: Path, rounds: int, done: int = 0) -> Iterator[None]:
        """In the block the person can be asked, and votes are kept in `folder`, where those of before are read.

        rounds: that are to come, after so many that are `done`, by which it is said how many choices the person is
        asked for: those votes of them that are kept are not asked for again.
        """
        self._folder = folder
        (folder / IMAGES).mkdir(exist_ok=True)
        self.votes, enough = read_kept(folder / FILE) if (folder / FILE).exists() else ([], False)
        if enough:
            self.asks, self._told = False, True
            said = "You have said `Enough votes`: the run goes on by the votes that there are."
            console.print(f"{said} To vote again, without these votes, delete {folder / FILE} first.", markup=False)
            yield
            return
        self._asked = asked = _Asked(self)
        with asked.page.serving() as address:
            console.print(f"You are the reward. Vote at {address}", markup=False, soft_wrap=True)
            console.print(self.promise(rounds, sum(vote.round >= done for vote in self.votes)), markup=False)
            self._ready(address)
            try:
                yield
            finally:
                self._asked = None

    def promise(self, rounds: int, kept: int = 0) -> str:
        """How many choices a person is asked for in so many rounds, less those that are kept; how to make fewer."""
        choices, groups = counted(max(0, rounds * self.per_round - kept), "choices"), counted(self.per_round, "groups")
        return (
            f"You are asked for at most {choices} ({counted(rounds, 'rounds')}, in each the best image of {groups} of "
            f"up to {GROUP}). `Enough votes` on the page ends it at any time; for fewer, --reward human:N asks about N "
            "groups a round, and a smaller --queries has fewer rounds."
        )

    def at(self, number: int, *, asking: bool) -> None:
        """Say which round comes: votes of later ones are left aside. asking: images are the round's, to be voted on."""
        self._round, self._asking, self._left = number, asking, self.per_round if asking else 0

    def look(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Ask the person about some of these images (B, C, H, W), which are all of the round: it asks no more in it.

        So groups are of all images of a prompt, and not of those that happen to be scored together.
        """
        pixels = quantised(images)
        groups, n = self._groups(pixels, prompts), 0
        self._left = len(groups)
        while n < len(groups):
            before = _digests(pixels[groups[n - 1]]) if n else None
            newest = (self.votes[-1].round, self.votes[-1].images) if self.votes else None
            self.can_go_back = newest == (self._round, before)
            n += 1 if self._vote(groups[n], pixels, prompts) else -1
        self._left, self.can_go_back = 0, False
        with self._turn():
            self.keep_enough()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The model's scores (B,); before, the person is asked, unless that was done by `look`."""
        if self._left:
            self.look(images, prompts)
        pixels = quantised(images)
        model = self._learned(self._round + self._asking)
        if model is None:
            return images.new_zeros(len(images))
        return model.score(pixels, prompts).to(images.device)

    # --- asking -----------------------------------------------------------------------------------------------------

    def _groups(self, pixels: Tensor, prompts: Sequence[str]) -> list[list[int]]:
        """The numbers of the images of each group to ask about: of random prompts, the first few images of each.

        Those that the round has votes on come first, in their order. The others are of different prompts, and a prompt
        comes again when all have come as often.
        """
        if self._left == 0:
            return []
        of: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            of.setdefault(prompt, []).append(i)
        groups = [numbers[start : start + GROUP] for numbers in of.values() for start in range(0, len(numbers), GROUP)]
        groups = [group for group in groups if len(group) > 1 and (pixels[group] != pixels[group[0]]).any()]
        order = torch.randperm(len(groups), generator=generator_at(0, self._round, _ORDER)).tolist()
        groups = [groups[i] for i in order]
        times: collections.Counter[str] = collections.Counter()
        turns: list[int] = []
        for group in groups:
            turns.append(times[prompts[group[0]]])
            times[prompts[group[0]]] += 1
        groups = [groups[i] for i in sorted(range(len(groups)), key=turns.__getitem__)]
        votes = [(vote.prompt, vote.images) for vote in self.votes if vote.round == self._round]
        if votes:  # a run that another version began may have asked in another order
            numbers = {vote: number for number, vote in enumerate(votes)}
            known = [numbers.get((prompts[group[0]], _digests(pixels[group])), len(votes)) for group in groups]
            groups = [groups[i] for i in sorted(range(len(groups)), key=known.__getitem__)]
        return groups[: self._left]

    def _vote(self, group: Sequence[int], pixels: Tensor, prompts: Sequence[str]) -> bool:
        """Take the vote on a group: the one that is kept, or the person's; and keep it.

        False where the person goes back: the vote on the group before is dropped, and that is to be asked about again.
        """
        self._left -= 1
        prompt, chosen = prompts[group[0]], pixels[list(group)]
        digests = _digests(chosen)
        kept = any((vote.round, vote.prompt, vote.images) == (self._round, prompt, digests) for vote in self.votes)
        if kept or not self.asks:
            return True
        if self._folder is None or self._asked is None:
            raise UserError("The reward human is for runs of `diffrl finetune`, which show its page.")
        files = [_png(image) for image in chosen]
        for digest, file in zip(digests, files, strict=True):
            path = self._folder / IMAGES / f"{digest}.png"
            if not path.exists():
                with atomic_path(path) as temporary:
                    temporary.write_bytes(file)
        model = self._learned(self._round)
        favourite = None if model is None else int(model.score(chosen, [prompt] * len(group)).argmax())
        said = self._asked.wait(prompt, dict(zip(digests, files, strict=True)))
        if said is _ENOUGH:
            self.asks, self._left = False, 0
            return True
        if said is _BACK:
            self._left += 2
            self._keep(self.votes[:-1])
            return False
        best = None if said is None else digests.index(said)
        foretold = None if favourite is None or best is None else favourite == best
        self._keep([*self.votes, Vote(self._round, prompt, digests, best, foretold)])
        return True

    def _keep(self, votes: list[Vote]) -> None:
        """Keep these votes in place of those that there are; under the page's lock, as `Enough votes` is kept too."""
        assert self._folder is not None
        with self._turn():
            self.votes = votes
            write_votes(self._folder / FILE, votes, enough=not self.asks)
            self._told = not self.asks

    def _turn(self) -> contextlib.AbstractContextManager[Any]:
        """The page's lock, where there is a page."""
        return contextlib.nullcontext() if self._asked is None else self._asked.said

    def keep_enough(self) -> None:
        """Keep that the person wants to be asked no more, where that is so and not kept yet. Under the page's lock."""
        if not self.asks and not self._told and self._folder is not None:
            write_votes(self._folder / FILE, self.votes, enough=True)
            self._told = True

    # --- learning ---------------------------------------------------------------------------------------------------

    def _learned(self, before: int) -> VotesModel | None:
        """The model of the votes of the rounds before `before`; None where they prefer nothing."""
        votes = [vote for vote in self.votes if vote.round < before and vote.best is not None]
        if not votes:
            return None
        if self._model is None or self._model[0] != len(votes):
            assert self._folder is not None
            self._model = len(votes), fit(votes, self._folder / IMAGES, self._pixels)
        return self._model[1]


class Votes:
    """The reward `human:votes.json`: a model of the votes of an earlier run; nobody is asked."""

    differentiable = False
    videos = True

    def __init__(self, path: Path) -> None:
        self.name = f"human:{path}"
        votes = [vote for vote in read_votes(path) if vote.best is not None]
        if not votes:
            raise UserError(f"{path} has no vote that prefers an image: there is nothing to learn from.")
        self.model = fit(votes, path.parent / IMAGES, {})

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The model's scores (B,). Raises UserError for images of another shape than those that were voted on."""
        return self.model.score(quantised(images), prompts).to(images.device)


def fit(votes: Sequence[Vote], folder: Path, pixels: MutableMapping[str, Tensor]) -> VotesModel:
    """The model of these votes, whose images are read from `folder` into `pixels`."""
    for digest in {name for vote in votes for name in vote.images}:
        if digest not in pixels:
            pixels[digest] = _read_png(folder / f"{digest}.png", digest)
    pairs = [
        (vote.prompt, pixels[other], pixels[vote.images[vote.best]])
        for vote in votes
        if vote.best is not None
        for other in vote.images
        if other != vote.images[vote.best]
    ]
    return VotesModel.fit(pairs)


# --- images --------------------------------------------------------------------------------------------------------


def quantised(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as whole numbers 0 to 255, as people see them and files keep them."""
    if images.ndim != 4:
        raise UserError("The reward human is for images, and this model makes videos.")
    return (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def _digests(images: Tensor) -> tuple[str, ...]:
    return tuple(map(_digest, images))


def _digest(image: Tensor) -> str:
    return hashlib.sha256(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()).hexdigest()


def _png(image: Tensor) -> bytes:
    """An image (C, H, W), C = 1 or 3, as a PNG file."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(stream, "PNG")
    return stream.getvalue()


def _read_png(path: Path, digest: str) -> Tensor:
    """The image that was written, (C, H, W). Raises UserError where it is missing or another one."""
    with png(path) as file:
        array = np.asarray(file)
    image = torch.from_numpy(array.copy())
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1).contiguous()
    if _digest(image) != digest:
        raise UserError(f"{path} is not the image that was voted on: restore it from a copy.")
    return image


# --- the page ------------------------------------------------------------------------------------------------------

_ENOUGH, _BACK = object(), object()
NEXT = 2.0
"""The most seconds that the answer to a vote waits for the next group of the round, so that the page goes on to it."""


class _Asked:
    """The page: what is asked now, and what the person has said."""

    def __init__(self, human: Human) -> None:
        self.human = human
        self.files = dict(static("diffrl.images.rewards", "page"))
        """The page's own, and the images that are asked about."""
        calls = {"state": self.state, "choose": self.choose, "back": self.back, "enough": self.enough}
        self.page = Page(self.files, calls)
        self.said = threading.Condition(self.page.turn)
        self.prompt = ""
        self.names: tuple[str, ...] = ()
        self.answer: Any = None
        self.waiting = False

    def wait(self, prompt: str, files: dict[str, bytes]) -> Any:
        """Show images, by their digests; wait for the best one, None for equally good, `_BACK` or `_ENOUGH`."""
        shown_ = {f"{digest}.png": file for digest, file in files.items()}
        with self.said:
            self.files.update(shown_)
            self.prompt, self.names, self.waiting = prompt, tuple(files), True
            self.said.notify_all()
            while self.waiting:
                self.said.wait(0.2)  # so that a signal is heard
            for name in shown_:
                self.files.pop(name, None)
            return self.answer

    def state(self, asked: Any) -> dict[str, Any]:
        """What the page shows."""
        told = [vote.foretold for vote in self.human.votes if vote.foretold is not None]
        group = {"prompt": self.prompt, "images": list(self.names)} if self.waiting else None
        return {
            "group": group,
            "round": self.human._round + 1,
            "left": self.human._left + self.waiting,
            "back": self.waiting and self.human.can_go_back,
            "votes": len(self.human.votes),
            "foretold": [sum(told[-20:]), len(told[-20:])],
            "asks": self.human.asks,
        }

    def choose(self, asked: Any) -> dict[str, Any]:
        """Take a vote: `images` as they were shown, and `best`, a number of them or null."""
        images, best = (asked.get(key) for key in ("images", "best")) if isinstance(asked, dict) else (None, -1)
        if not self.waiting or images != list(self.names):
            return self.state(None)  # of a group that has been voted on: a key that was pressed twice
        if best is not None and (type(best) is not int or not 0 <= best < len(self.names)):
            raise UserError(f"there is no image {shown(best)} to choose")
        self._answer(None if best is None else self.names[best])
        return self._next(self.human._left > 0)

    def back(self, asked: Any) -> dict[str, Any]:
        """Ask about the group before that of `images` once more, in place of the vote on it.

        Nothing before the round's first vote, and of images that are not those shown: a key that was pressed twice.
        """
        images = asked.get("images") if isinstance(asked, dict) else None
        if not self.waiting or not self.human.can_go_back or images != list(self.names):
            return self.state(None)
        self._answer(_BACK)
        return self._next(True)

    def enough(self, asked: Any) -> dict[str, Any]:
        """Ask no more: the rest of the run goes by the model of the votes. Kept at once: a run may be cut any time."""
        self.human.asks = False
        self._answer(_ENOUGH)
        self.human.keep_enough()
        return self.state(None)

    def _next(self, comes: bool) -> dict[str, Any]:
        """What the page shows after an answer: the group that is asked about next, where one `comes` at once."""
        if comes:
            self.said.wait_for(lambda: self.waiting, NEXT)
        return self.state(None)

    def _answer(self, answer: Any) -> None:
        self.answer, self.waiting = answer, False
        self.said.notify_all()
