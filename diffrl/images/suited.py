"""Whether rewards suit the run that is to learn from them: what is refused, and what is said. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING

from diffrl.images.config.algorithms import ALGORITHMS, DRaFTConfig
from diffrl.images.config.base import NOTHING, FinetuneConfig, OnlineConfig, base_of
from diffrl.images.emoji_words import PROMPTS
from diffrl.images.lists import read_prompts
from diffrl.images.rewards.base import GradientError, Reward, answer, asks_a_person, grouped, parts_of
from diffrl.images.rewards.registry import check
from diffrl.images.rewards.votes_file import shape_of
from diffrl.support.errors import UserError

if TYPE_CHECKING:
    from diffrl.images.model import ImageModel
    from diffrl.images.samples import Prompts

MAKES = {"tiny-digits": (1, 8, 8), "tiny-latents": (1, 32, 32), "tiny-emoji": (3, 32, 32)}
"""The shapes (C, H, W) of the images of the built-in models."""
DIGITS = ("digit", "digit-held-out")
"""The rewards that take an image for a handwritten digit, whatever it shows."""
COLOURED = ("emoji", "emoji-held-out", "emoji-clip", "colour")
"""The rewards that look at emoji, or at hues, of which grey images have none."""


def refuse(config: FinetuneConfig) -> None:
    """Raise UserError for settings of a new run that mean nothing, and for rewards that cannot tell what is asked.

    Rewards by their names, as they are written: one on images that the model does not make, and a held-out reward that
    is the reward.
    """
    _refuse_nonsense(config)
    spec, held_out = config.scored_by, None if config.held_out == NOTHING else config.held_out
    for option, text in (("--reward", spec), ("--held-out", held_out)):
        if text is None:
            continue
        names = {_named(entry.usage) for _, entry, _ in check(text, option)}
        if base_of(config.model) == "tiny-emoji" and not names.isdisjoint(DIGITS):
            raise UserError(
                f"{option} {text} is for handwritten digits, and {config.model} makes none: --model tiny-digits."
            )
        if base_of(config.model) in ("tiny-digits", "tiny-latents") and not names.isdisjoint(COLOURED):
            what = "hues" if names.isdisjoint(set(COLOURED) - {"colour"}) else "emoji"
            data = "" if getattr(config, "data", None) is None else " with --data FOLDER, its images"
            raise UserError(
                f"{option} {text} is for {what}, and {config.model} makes grey digits: --model tiny-emoji{data}."
            )
        for other, argument in _kept_votes(text):
            _refuse_other_images(f"{option} {other}", argument, config.model)
    if spec is not None and held_out is not None and _same(spec, held_out):
        raise UserError(
            f"--held-out {held_out} is the reward itself, which cannot show that it is hacked: leave it out, give "
            "another reward, or --held-out none."
        )


def _kept_votes(spec: str) -> list[tuple[str, Path]]:
    """Each reward of `spec` that is `human` with kept votes, and their file."""
    terms = zip(spec.split(" + "), check(spec), strict=True)
    return [(t.strip(), Path(a)) for t, (_, e, a) in terms if _named(e.usage) == "human" and not asks_a_person(t)]


def _refuse_other_images(option: str, votes: Path, model: str) -> None:
    """Raise UserError for votes about images of another size than the built-in model makes, and for what is none."""
    made, seen = MAKES.get(base_of(model) or ""), shape_of(votes)
    if made is not None and seen is not None and made != seen:
        then, now = ("x".join(map(str, shape)) for shape in (seen, made))
        raise UserError(f"{option} has votes about images of {then}, and {model} makes images of {now}.")


def _refuse_nonsense(config: FinetuneConfig) -> None:
    """Raise UserError for numbers of a new run that mean nothing; older runs, which took them, are still read."""
    if config.guidance < 0:
        raise UserError(f"--guidance is {config.guidance:g}; expected at least 0, and 1 for none.")
    if getattr(config, "data", None) == "digits" and base_of(config.model) == "tiny-emoji":
        raise UserError(
            f"--algo {config.algo} learns from images, by default from scikit-learn's digits, of which {config.model} "
            "knows none: --data FOLDER, images with a metadata.jsonl, or --model tiny-digits."
        )
    if config.shard and config.processes == 1 and "WORLD_SIZE" not in os.environ:
        raise UserError("--shard shares frozen weights among processes, and there is one: give --processes 2 or more.")
    if isinstance(config, DRaFTConfig) and config.draft_steps > max(config.steps, DRaFTConfig.draft_steps):
        raise UserError(f"--draft-steps is {config.draft_steps}, more than the {config.steps} --steps of the chain.")


def refuse_human(config: FinetuneConfig, processes: int = 1, new: bool = True) -> None:
    """Raise UserError where a person is the reward of a run that cannot ask, by the rewards' names alone.

    new: rounds without groups are refused of new runs; one that goes on cannot take another algorithm.
    """
    spec = config.scored_by or ""
    asking = sum(asks_a_person(text) for text in spec.split(" + "))
    if asking > 1:
        raise UserError("--reward names human twice: one person votes on one page.")
    if asks_a_person(config.held_out):
        raise UserError("--held-out human asks nobody: a person is a --reward; or give human:RUN/votes.json.")
    if asking and processes > 1:
        raise UserError("--reward human asks one person at one page: leave out --processes.")
    if asking and config.scored_before:
        raise UserError(f"--reward human votes round by round, and {config.algo} scores before: --algo nft.")
    if asking and new:
        _require_groups("human", config)


def refuse_grouped(config: FinetuneConfig, asked: Sequence[Reward | None], processes: int, new: bool) -> None:
    """Raise UserError where a reward compares images of a prompt, and the run cannot show it all of them.

    That is, of the reward or the held-out one, in several processes; and of the reward, the first of those asked, in
    rounds without two images of a prompt, where the run is new: one that goes on cannot take another algorithm.
    """
    for reward in asked:
        if reward is not None and grouped(reward) and processes > 1:
            raise UserError(f"{reward.name} compares the images of a prompt: leave out --processes.")
    if new and asked[0] is not None and grouped(asked[0]):
        _require_groups(asked[0].name, config)


def refuse_videos(reward: Reward | None, model: ImageModel) -> None:
    """Raise UserError where a reward of one's own is made for whole videos, and the model makes images."""
    from diffrl.images.model import image_shape
    from diffrl.images.rewards.python import Function

    whole = [part for part in parts_of(reward) if isinstance(part, Function) and part.videos]
    if whole and len(image_shape(model)) == 3:
        raise UserError(
            f"{whole[0].name} says videos = True, and the model makes images: leave that out, or take a model of "
            "videos (Wan with --frames N)."
        )


def refuse_without_gradient(reward: Reward | None, config: FinetuneConfig, model: ImageModel, prompts: Prompts) -> None:
    """Raise GradientError where a reward of one's own turns out to have no gradient, of a run that is to learn by it.

    It is asked about images of noise, before the run has a folder. Whatever else is wrong with its answer is left to
    the run: on its own images it may be right.
    """
    import torch

    from diffrl.images.model import image_shape
    from diffrl.images.rewards.python import Function
    from diffrl.support.seeds import undrawn

    own = [part for part in parts_of(reward) if isinstance(part, Function) and part.differentiable]
    if not own:
        return
    n = min(2, config.micro_batch, len(prompts))
    noise = torch.rand(n, *image_shape(model), generator=torch.Generator().manual_seed(config.seed)).to(model.device)
    with undrawn(model.device), torch.enable_grad():  # a reward may draw numbers, and the run has its own
        for part in own:
            about = prompts.texts[:n], prompts.metadata[:n]
            try:
                answer(part, noise.clone().requires_grad_(), *about)
            except GradientError:
                # One that finds nothing in noise, and says the same of all, may have a gradient where it does.
                if n == 1 or len(set(answer(part, noise.clone(), *about).tolist())) > 1:
                    raise
            except UserError:
                pass


def notes(reward: Reward | None) -> list[str]:
    """What is to be known of a run's numbers because of its reward, a sentence or two each."""
    if reward is None or not grouped(reward):
        return []
    return [
        f"{reward.name} compares the images of a prompt: its mean over those of one model says little of how good they "
        "are, and of ranks it never changes. Judge by --held-out REWARD, one of each image alone."
    ]


def _require_groups(reward: str, config: FinetuneConfig) -> None:
    """Raise UserError where no round of the run has two images of one prompt, which the reward compares."""
    if getattr(config, "group", 1) > 1 or config.batch > _different_prompts(config):
        return
    having = [algo for algo, of in ALGORITHMS.items() if issubclass(of, OnlineConfig) and "group" in of.options()]
    raise UserError(
        f"--reward {reward} compares images of one prompt, and a round of {config.algo} has one of each: --algo "
        f"{' or '.join(having)}, with a --group of 2 or more."
    )


def _different_prompts(config: FinetuneConfig) -> float:
    """How many prompts the run draws from; infinite where that is not known before the model is loaded."""
    if config.prompts is not None:
        return len(set(read_prompts(config.prompts)[0]))
    if not config.builtin:
        return float("inf")
    return len(PROMPTS) if base_of(config.model) == "tiny-emoji" else 10


def _same(spec: str, other: str) -> bool:
    """Whether two sums are of the same rewards, with weights that are alike but for one positive factor."""
    sums = [{(e.usage, normpath(argument or "")): w for w, e, argument in check(text) if w} for text in (spec, other)]
    if sums[0].keys() != sums[1].keys():
        return False
    factors = [sums[1][name] / weight for name, weight in sums[0].items()]
    return min(factors) > 0 and max(factors) - min(factors) < 1e-6 * max(factors)


def _named(usage: str) -> str:
    """The name at the beginning of a reward's usage."""
    return usage.partition("[")[0].partition(":")[0]
