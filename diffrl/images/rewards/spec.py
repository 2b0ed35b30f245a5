"""Rewards by name, as `--reward` takes them: [WEIGHT*]NAME[:ARGUMENT], several joined by " + "."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.images import catalogue
from diffrl.images.rewards import clip, codecs, digits, python, remote
from diffrl.images.rewards.base import Metadata, Reward, ask
from diffrl.images.rewards.classifier import Classifier
from diffrl.images.rewards.imagereward import ImageReward
from diffrl.images.rewards.richhf import RichReward
from diffrl.support.errors import UserError, nearest

GRAMMAR = "[WEIGHT*]NAME[:ARGUMENT], several joined by ' + ', such as 'jpeg + 0.5*digit:8'"


@dataclass(frozen=True)
class Options:
    """What `parse` is told beside the text. device: of networks. timeout: seconds for an answer of a remote scorer."""

    device: str | torch.device
    timeout: float


Build = Callable[[str, Options], Reward]
"""What makes a reward of its argument ("" for none)."""


class Sum:
    """The weighted sum of rewards, itself one, in `terms` order; differentiable where all its parts are."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        names = [part.name for _, part in terms]
        if len(set(names)) < len(names):
            raise UserError(f"a reward stands twice in {' + '.join(names)!r}; add up its weights instead")
        self.terms = list(terms)
        self.name = " + ".join(part.name if w == 1 else f"{w:g}*{part.name}" for w, part in terms)
        self.differentiable = all(part.differentiable for _, part in terms)

    def values(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> dict[str, Tensor]:
        """Each part's values (B,) by its name, without their weights, checked as `ask` does."""
        return {part.name: ask(part, images, prompts, metadata) for _, part in self.terms}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of what `values` gave, with the weights."""
        return torch.stack([weight * values[part.name] for weight, part in self.terms]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The values (B,)."""
        return self.combine(self.values(images, prompts, metadata))


def ask_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `ask`, with the values of each part of a sum beside it, for the log: (B,), and (B,) by name."""
    metadata = [{}] * len(prompts) if metadata is None else metadata
    if not isinstance(reward, Sum):
        total = ask(reward, images, prompts, metadata)
        return total, {reward.name: total}
    parts = reward.values(images, prompts, metadata)
    return reward.combine(parts), parts


def parse(spec: str, *, device: str | torch.device = "cpu", timeout: float = 60.0) -> Reward:
    """The reward that `spec` says, its networks loaded on `device`.

    A single reward of weight 1 is that reward; anything else a `Sum`. Raises UserError for what does not follow
    `GRAMMAR`, an unknown name (naming the nearest known), and for what an argument names and cannot be loaded.
    """
    options = Options(device, timeout)
    terms = [_term(text, spec, options) for text in spec.split(" + ")]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(terms)


def _term(text: str, spec: str, options: Options) -> tuple[float, Reward]:
    match = re.fullmatch(r"\s*(?:([^*:\s]*)\s*\*)?\s*([a-z0-9-]+)(?::(.*\S))?\s*", text, re.DOTALL)
    if match is None:
        raise UserError(f"--reward {spec!r}: {text.strip()!r} is not of the form {GRAMMAR}")
    number, name, argument = match.group(1), match.group(2), match.group(3) or ""
    try:
        weight = 1.0 if number is None else float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise UserError(f"--reward {spec!r}: the weight {number!r} of {name!r} is not a number")
    if name not in REWARDS:
        raise UserError(f"--reward {spec!r}: there is no reward {name!r}; {nearest(name, REWARDS)}")
    usage, _ = catalogue.REWARDS[name]
    if argument and ":" not in usage:
        raise UserError(f"--reward {spec!r}: {name!r} takes no argument, got {argument!r}")
    if not argument and ":" in usage and "[:" not in usage:
        raise UserError(f"--reward {spec!r}: {name!r} needs an argument: {usage}")
    return weight, REWARDS[name](argument, options)


def _jpeg(name: str, size: Callable[..., int], sign: int = -1) -> Build:
    def build(argument: str, options: Options) -> Reward:
        if argument and not (argument.isdecimal() and 1 <= int(argument) <= 100):
            raise UserError(f"{name}:{argument}: the argument is JPEG's quality, a whole number from 1 to 100")
        quality = int(argument) if argument else codecs.QUALITY
        full = f"{name}:{argument}" if argument else name
        return codecs.CodecSize(full, functools.partial(size, quality=quality), sign)

    return build


def _digit(held_out: bool) -> Build:
    def build(argument: str, options: Options) -> Reward:
        if argument and argument not in list("0123456789"):
            raise UserError(f"digit:{argument}: the argument is one digit, 0 to 9")
        return digits.Digit(int(argument) if argument else None, held_out=held_out, device=options.device)

    return build


def _clip(kind: type[clip.ClipReward]) -> Build:
    return lambda argument, options: kind(argument, device=options.device)


REWARDS: dict[str, Build] = {
    "jpeg": _jpeg("jpeg", codecs.jpeg_bytes),
    "jpeg-file": _jpeg("jpeg-file", codecs.jpeg_file_bytes),
    "incompressible": _jpeg("incompressible", codecs.jpeg_bytes, 1),
    "png": lambda a, o: codecs.CodecSize("png", codecs.png_bytes),
    "digit": _digit(False),
    "digit-held-out": _digit(True),
    "classifier": lambda a, o: Classifier(a, device=o.device),
    "classifier-probability": lambda a, o: Classifier(a, log=False, device=o.device),
    "clip": _clip(clip.ClipScore),
    "pickscore": _clip(clip.PickScore),
    "hps": _clip(clip.HPS),
    "aesthetic": _clip(clip.Aesthetic),
    "imagereward": lambda a, o: ImageReward(a, device=o.device),
    "richhf": lambda a, o: RichReward(a, device=o.device),
    "python": lambda a, o: python.from_file(a),
    "remote": lambda a, o: remote.Remote(a, timeout=o.timeout),
}
