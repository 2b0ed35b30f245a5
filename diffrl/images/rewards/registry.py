"""Rewards by name, as --reward takes them: diffrl's own, and other packages' (entry points of "diffrl.rewards").

Listing them imports no torch: the functions that build a reward import its module when they are called.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from diffrl.images.rewards.base import Reward, Sum
from diffrl.support import plugins
from diffrl.support.errors import UserError, nearest
from diffrl.support.plugins import Plugin

if TYPE_CHECKING:
    import torch

GRAMMAR = "[WEIGHT*]NAME[:ARGUMENT], several joined by ' + ', such as 'jpeg + 0.5*digit:8'"
Argument = Literal["none", "optional", "required"]
"""Whether a name is followed by :ARGUMENT."""


@dataclass(frozen=True)
class Options:
    """What `parse` is told beside the text. device: of networks. timeout: seconds for an answer of a remote scorer."""

    device: str | torch.device
    timeout: float


Build = Callable[[str, Options], Reward]
"""What makes a reward of its argument ("" for none). Raises UserError for an argument that it cannot use."""


@dataclass(frozen=True)
class Entry:
    """A reward that has a name.

    usage: how it is written, such as "jpeg[:QUALITY]".
    help: a line for --help.
    argument: whether it takes one.
    build: makes the reward.
    companion: the reward to look at while this one is trained on (the same by other means), as --reward takes it;
        "[:ARGUMENT]" in it stands for this one's own argument.
    """

    usage: str
    help: str
    argument: Argument
    build: Build
    companion: str | None = None


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
    entry = get(name)
    if entry is None:
        raise UserError(f"--reward {spec!r}: there is no reward {name!r}; {nearest(name, names())}")
    if argument and entry.argument == "none":
        raise UserError(f"--reward {spec!r}: {name!r} takes no argument, got {argument!r}")
    if not argument and entry.argument == "required":
        raise UserError(f"--reward {spec!r}: {name!r} needs an argument: {entry.usage}")
    return weight, entry.build(argument, options)


def get(name: str) -> Entry | None:
    """The entry of a name: diffrl's own, else another package's; None where there is none.

    Raises UserError where another package's cannot be used.
    """
    if name in REWARDS:
        return REWARDS[name]
    plugin = plugins.find("diffrl.rewards", name, REWARDS)
    return None if plugin is None else _checked(plugin)


def names() -> list[str]:
    """The names of all rewards, diffrl's own first; nothing of other packages is loaded."""
    return [*REWARDS, *(plugin.name for plugin in plugins.found("diffrl.rewards"))]


def listing() -> str:
    """A line each for --help: diffrl's own, then other packages', with the reason where one cannot be used."""
    lines = [(entry.usage, entry.help) for entry in REWARDS.values()]
    for plugin in {plugin.name: plugin for plugin in plugins.found("diffrl.rewards")}.values():
        try:
            plugins.find("diffrl.rewards", plugin.name, REWARDS)  # refuses a name that stands twice
            entry = _checked(plugin)
            lines.append((entry.usage, f"{entry.help} ({plugin.distribution})"))
        except UserError as error:
            lines.append((plugin.name, str(error)))
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:{width}}  {line}" for usage, line in lines)


def companion(spec: str) -> str | None:
    """The reward to hold out while `spec` is trained on, of the same digit where it is of one; None: it has none."""
    name, colon, argument = spec.partition(":")
    entry = get(name)
    if entry is None or entry.companion is None:
        return None
    return entry.companion.replace("[:ARGUMENT]", colon + argument)


def _checked(plugin: Plugin) -> Entry:
    """The entry that another package brings, whose `build` says whose it is where it fails. Raises UserError."""
    entry = plugin.load()
    if re.fullmatch("[a-z0-9-]+", plugin.name) is None:
        raise plugin.broken("its name is not of lower-case letters, digits and hyphens")
    if not isinstance(entry, Entry):
        raise plugin.broken(f"it is {entry!r}; expected a diffrl.images.rewards.Entry")
    texts = (entry.usage, entry.help, "" if entry.companion is None else entry.companion)
    if not all(isinstance(text, str) for text in texts) or not callable(entry.build):
        raise plugin.broken(f"expected texts for usage, help and companion, and a function for build, got {entry!r}")
    if entry.argument not in get_args(Argument):
        raise plugin.broken(f"its argument is {entry.argument!r}; expected one of {', '.join(get_args(Argument))}")

    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.python import Function

        try:
            reward = entry.build(argument, options)
        except UserError:
            raise
        except Exception as error:  # whatever another package may raise
            raise plugin.broken(f"build({argument!r}, ...) fails with {type(error).__name__}: {error}") from error
        if not callable(reward) or not isinstance(getattr(reward, "name", None), str):
            raise plugin.broken(f"build({argument!r}, ...) gives {reward!r}; expected a diffrl.images.rewards.Reward")
        return Function(reward, reward.name)  # says in a line what is raised, instead of a traceback

    return dataclasses.replace(entry, build=build)


def _jpeg(name: str, sign: int = -1, *, whole_file: bool = False) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards import codecs

        if argument and not (argument.isdecimal() and 1 <= int(argument) <= 100):
            raise UserError(f"{name}:{argument}: the argument is JPEG's quality, a whole number from 1 to 100")
        quality = int(argument) if argument else codecs.QUALITY
        full = f"{name}:{argument}" if argument else name
        size = codecs.jpeg_file_bytes if whole_file else codecs.jpeg_bytes
        return codecs.CodecSize(full, functools.partial(size, quality=quality), sign)

    return build


def _png(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards import codecs

    return codecs.CodecSize("png", codecs.png_bytes)


def _digit(held_out: bool) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.digits import Digit

        if argument and argument not in list("0123456789"):
            raise UserError(f"digit:{argument}: the argument is one digit, 0 to 9")
        return Digit(int(argument) if argument else None, held_out=held_out, device=options.device)

    return build


def _classifier(log: bool) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.classifier import Classifier

        return Classifier(argument, log=log, device=options.device)

    return build


def _clip(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.clip import ClipScore

    return ClipScore(argument, device=options.device)


def _pickscore(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.clip import PickScore

    return PickScore(argument, device=options.device)


def _hps(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.clip import HPS

    return HPS(argument, device=options.device)


def _aesthetic(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.clip import Aesthetic

    return Aesthetic(argument, device=options.device)


def _imagereward(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.imagereward import ImageReward

    return ImageReward(argument, device=options.device)


def _richhf(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.richhf import RichReward

    return RichReward(argument, device=options.device)


def _python(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.python import from_file

    return from_file(argument)


def _remote(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.remote import Remote

    return Remote(argument, timeout=options.timeout)


REWARDS: dict[str, Entry] = {
    "jpeg": Entry(
        "jpeg[:QUALITY]",
        "compressibility: -kB of the JPEG's scan, quality 95",
        "optional",
        _jpeg("jpeg"),
        companion="png",
    ),
    "jpeg-file": Entry(
        "jpeg-file[:QUALITY]",
        "-kB of the whole JPEG file, as DDPO",
        "optional",
        _jpeg("jpeg-file", whole_file=True),
        companion="png",
    ),
    "incompressible": Entry(
        "incompressible[:QUALITY]",
        "the negative of jpeg",
        "optional",
        _jpeg("incompressible", 1),
        companion="-1*png",
    ),
    "png": Entry("png", "-kB of the PNG's data: another codec, to hold out", "none", _png),
    "digit": Entry(
        "digit[:D]",
        "probability of the digit D, or of the prompt's",
        "optional",
        _digit(held_out=False),
        companion="digit-held-out[:ARGUMENT]",
    ),
    "digit-held-out": Entry(
        "digit-held-out[:D]", "the same by another network, on other data", "optional", _digit(held_out=True)
    ),
    "classifier": Entry(
        "classifier:PATH[#LABEL]",
        "log-probability of LABEL, or of the prompt, by a transformers image classifier",
        "required",
        _classifier(log=True),
    ),
    "classifier-probability": Entry(
        "classifier-probability:PATH[#LABEL]", "the probability itself", "required", _classifier(log=False)
    ),
    "clip": Entry("clip:PATH", "100 cos of CLIP's image and prompt", "required", _clip),
    "pickscore": Entry("pickscore:PATH", "PickScore: exp(logit scale) cos", "required", _pickscore),
    "hps": Entry("hps:PATH", "HPSv2: cos", "required", _hps),
    "aesthetic": Entry("aesthetic:PATH[#HEAD]", "LAION's aesthetic predictor on CLIP", "required", _aesthetic),
    "imagereward": Entry("imagereward:PATH", "ImageReward: BLIP and a head", "required", _imagereward),
    "richhf": Entry(
        "richhf:PATH[#WEIGHT]",
        "rich feedback: overall score less WEIGHT (1) times the artifact map's mean",
        "required",
        _richhf,
    ),
    "python": Entry("python:FILE.py#NAME", "a function of yours", "required", _python),
    "remote": Entry(
        "remote:URL", "a scorer over HTTP and JSON (python -m diffrl.images.rewards.serve)", "required", _remote
    ),
}
"""diffrl's own rewards by name."""
