"""Rewards by name, as --reward takes them: diffrl's own, and other packages' (entry points of "diffrl.rewards").

Listing them imports no torch: the functions that build a reward import its module when they are called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffrl.images.rewards.arguments import CHECKS, HUES, digit_of, jpeg_quality
from diffrl.images.rewards.base import Reward, Sum, without_gradient
from diffrl.images.rewards.entry import (
    GRAMMAR,
    NAME,
    NEAR,
    TERM,
    Argument,
    Build,
    Entry,
    Options,
    is_single,
    malformed,
    unjoined,
    weighed,
)
from diffrl.support import plugins
from diffrl.support.errors import UserError, closest, nearest, shown
from diffrl.support.plugins import Plugin

if TYPE_CHECKING:
    import torch


def parse(spec: str, *, device: str | torch.device = "cpu", timeout: float = 60.0, made: bool = False) -> Reward:
    """The reward that `spec` says, its networks loaded on `device`.

    A single reward of weight 1 is that reward; anything else a `Sum`. Raises UserError for what does not follow
    `GRAMMAR`, an unknown name, and what cannot be loaded. made: a run was made with it, so that no name is mistyped.
    """
    terms = [(w, entry.build(argument, Options(device, timeout))) for w, entry, argument in check(spec, "reward", made)]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(terms)


def check(spec: str, option: str = "--reward", made: bool = False) -> list[tuple[float, Entry, str]]:
    """The weight, the entry and the argument of each reward in `spec`; nothing is built, and no torch imported.

    Raises UserError as `parse` does; of arguments, only those in `arguments.CHECKS` are checked. option: what says
    `spec` on the command line, for errors; made: see `parse`.
    """
    terms = [_term(text, spec, f"{option} {spec!r}", made) for text in spec.split(" + ")]
    if not any(weight for weight, _, _ in terms):
        raise UserError(f"{option} {spec!r}: every weight is 0, so there is nothing to learn.")
    return terms


def require_gradient(spec: str, algo: str) -> None:
    """Raise UserError for a sum of rewards of which one is known to have no gradient, which `algo` needs."""
    if not all(entry.gradient for _, entry, _ in check(spec)):
        raise without_gradient(spec, algo)


def _term(text: str, spec: str, where: str, made: bool) -> tuple[float, Entry, str]:
    match = TERM.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: {malformed(text, spec)}")
    number, name, argument = match["weight"], match["name"], match["argument"] or ""
    try:
        weight = 1.0 if number is None else float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise UserError(f"{where}: the weight {number!r} of {name!r} is not a number{unjoined(spec)}")
    entry = get(name)
    if entry is None:
        hint = nearest(name, names(), "diffrl finetune --help", cutoff=NEAR)
        hint = f"did you mean 'colour:{name}'?" if name in HUES else hint
        elsewhere = name not in HUES and (made or closest(name, names(), NEAR) is None)
        raise UserError(f"{where}: there is no reward {name!r}; {hint}{plugins.not_here('diffrl.rewards') * elsewhere}")
    if argument and entry.argument == "none":
        raise UserError(f"{where}: {name!r} takes no argument, got {argument!r}")
    if not argument and entry.argument == "required":
        raise UserError(f"{where}{'' if is_single(spec) else f': {name!r}'} needs an argument: {entry.usage}")
    try:
        if argument and name in CHECKS:
            CHECKS[name](argument)
    except UserError as error:
        part = "" if is_single(spec) else f"{name}:{argument}: "
        raise UserError(f"{where}: {part}{error}") from error
    return weight, entry, argument


def get(name: str) -> Entry | None:
    """The entry of a name: diffrl's own, else another package's; None where there is none.

    Raises UserError where another package's cannot be used.
    """
    own = REWARDS.get(name)
    plugin = None if own else plugins.find("diffrl.rewards", name, REWARDS)
    return own if plugin is None else _checked(plugin)


def names() -> list[str]:
    """The names of all rewards, each once, diffrl's own first; nothing of other packages is loaded."""
    return list(dict.fromkeys([*REWARDS, *(plugin.name for plugin in plugins.found("diffrl.rewards"))]))


def listing() -> str:
    """A line each for --help: diffrl's own, then other packages', with the reason where one cannot be used."""
    lines = [(entry.usage, entry.help) for entry in REWARDS.values()]
    for plugin in {plugin.name: plugin for plugin in plugins.found("diffrl.rewards")}.values():
        try:
            entry = tried_out(plugin)
            lines.append((entry.usage, f"{entry.help} ({plugin.distribution})"))
        except UserError as error:
            lines.append((plugin.name, str(error)))
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:{width}}  {line}" for usage, line in lines)


def companion(spec: str) -> str | None:
    """The reward to hold out while `spec` is trained on, with the same arguments and weights; None: it has none.

    Of a sum the sum of its parts' companions, where each part has one: what is held out is to be the same by other
    means, and not a part of it. Parts with one companion add up their weights.
    """
    weights: dict[str, float] = {}
    for text in spec.split(" + "):
        match = TERM.fullmatch(text)
        entry = None if match is None else get(match["name"])
        if match is None or entry is None or entry.companion is None:
            return None
        argument = "" if match["argument"] is None else f":{match['argument']}"
        for other in entry.companion.split(" + "):
            name, weight = weighed(other.strip())
            name = name.replace("[:ARGUMENT]", argument)
            weights[name] = weights.get(name, 0.0) + weight * weighed(text)[1]
    if not all(abs(weight) < float("inf") for weight in weights.values()):
        return None  # what `parse` refuses
    terms = [name if w == 1 else f"{str(w).removesuffix('.0')}*{name}" for name, w in weights.items() if w]
    return " + ".join(terms) or None


def named_in(spec: str) -> set[str]:
    """The names of the rewards in `spec`, whether there are such or not."""
    return {match["name"] for text in spec.split(" + ") if (match := TERM.fullmatch(text))}


def refused(spec: str) -> list[str]:
    """For each reward that `spec` names and diffrl has itself: why another package's of the same name is not used."""
    return plugins.left_out("diffrl.rewards", named_in(spec) & set(REWARDS))


def tried_out(plugin: Plugin) -> Entry:
    """The entry that another package brings. Raises UserError where it cannot be used, for its name or by itself."""
    plugins.check_name(plugin, REWARDS)
    return _checked(plugin)


def _checked(plugin: Plugin) -> Entry:
    """The entry that another package brings, whose `build` says whose it is where it fails. Raises UserError."""
    if re.fullmatch(NAME, plugin.name) is None:
        raise plugin.broken("its name is not of lower-case letters, digits and hyphens")
    brought = plugin.load()
    entry = brought if isinstance(brought, Entry) else _of_function(plugin, brought)
    _check_words(plugin, entry)

    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.python import Function

        call = f"build({argument!r}, ...)"
        with plugin.blamed(call):
            reward = entry.build(argument, options)
        if not callable(reward) or not isinstance(getattr(reward, "name", None), str):
            raise plugin.broken(f"{call} gives {shown(reward)}; expected a diffrl.images.rewards.Reward")
        return Function(reward, reward.name)  # says in a line what is raised, instead of a traceback

    return dataclasses.replace(entry, build=build)


def _of_function(plugin: Plugin, function: Any) -> Entry:
    """The entry of a plain function that a package brings: without an argument, its docstring for help.

    Raises UserError for what is no function of (images, prompts, metadata), saying what to write.
    """
    expected = (
        "expected a function of (images, prompts, metadata) that gives one value an image, or, for a reward with "
        f"an argument, diffrl.images.rewards.Entry({plugin.name + '[:ARGUMENT]'!r}, HELP, 'optional', BUILD), where "
        "BUILD(argument, options) gives such a function with a `name`"
    )
    if isinstance(function, type) or not callable(function):
        raise plugin.broken(f"it is {shown(function)}; {expected}")
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise plugin.broken(f"it takes {inspect.signature(function)}; {expected}") from error
    except ValueError:  # of a function in C nothing is known
        pass

    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.python import Function

        return Function(function, plugin.name)

    about = (inspect.getdoc(function) or "").splitlines() or [f"a function, {plugin.entry.value}"]
    return Entry(plugin.name, about[0].rstrip("."), "none", build)


def _check_words(plugin: Plugin, entry: Entry) -> None:
    """Raise UserError for an entry whose fields do not say how it is written, what it does, and what makes it."""
    if entry.argument not in get_args(Argument):
        raise plugin.broken(f"its argument is {shown(entry.argument)}; expected one of {', '.join(get_args(Argument))}")
    for what, text in (("usage", entry.usage), ("help", entry.help)):
        if not isinstance(text, str) or len(text.splitlines()) != 1 or not text.strip():
            raise plugin.broken(f"its {what} is {shown(text)}; expected a line of text")
    ends = {"none": "", "optional": r"\[:.+\]", "required": ":.+"}[entry.argument]
    if re.fullmatch(re.escape(plugin.name) + ends, entry.usage) is None:
        example = plugin.name + {"none": "", "optional": "[:ARGUMENT]", "required": ":ARGUMENT"}[entry.argument]
        raise plugin.broken(
            f"its usage is {entry.usage!r}, which --help would print; expected {example!r}, its argument "
            f"being {entry.argument!r}"
        )
    if not callable(entry.build):
        raise plugin.broken(f"its build is {shown(entry.build)}; expected a function of (argument, options)")
    if entry.companion is not None:
        if not isinstance(entry.companion, str):
            raise plugin.broken(f"its companion is {shown(entry.companion)}; expected {GRAMMAR}")
        for term in entry.companion.replace("[:ARGUMENT]", "").split(" + "):
            match = TERM.fullmatch(term)
            if match is None or match["name"] not in names():
                raise plugin.broken(f"its companion is {shown(entry.companion)}; expected a reward that there is")


def _jpeg(name: str, sign: int = -1, *, whole_file: bool = False) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards import codecs

        quality = jpeg_quality(argument) if argument else codecs.QUALITY
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

        return Digit(digit_of(argument) if argument else None, held_out=held_out, device=options.device)

    return build


def _emoji(held_out: bool) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.emoji import Emoji

        return Emoji(argument or None, held_out=held_out, device=options.device)

    return build


def _emoji_clip(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.emoji_clip import EmojiClip

    return EmojiClip(argument or None, device=options.device)


def _colour(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.pictures import Colour

    return Colour(argument)


def _symmetry(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.pictures import Symmetry

    return Symmetry()


def _classifier(log: bool) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.classifier import Classifier

        return Classifier(argument, log=log, device=options.device)

    return build


def _pretrained(name: str) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.clip import HPS, Aesthetic, ClipScore, PickScore
        from diffrl.images.rewards.hpsv3 import HPSv3
        from diffrl.images.rewards.imagereward import ImageReward
        from diffrl.images.rewards.richhf import RichReward

        kinds: dict[str, Callable[..., Reward]] = {
            "clip": ClipScore,
            "pickscore": PickScore,
            "hps": HPS,
            "hpsv3": HPSv3,
            "aesthetic": Aesthetic,
            "imagereward": ImageReward,
            "richhf": RichReward,
        }
        return kinds[name](argument, device=options.device)

    return build


def _python(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.python import from_file

    return from_file(argument)


def _human(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.human import Human, Votes

    if argument.isdecimal():
        return Human(int(argument), f"human:{argument}")
    return Votes(Path(argument)) if argument else Human()


def _remote(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.remote import Remote

    return Remote(argument, timeout=options.timeout)


def _ocr(argument: str, options: Options) -> Reward:
    from diffrl.images.rewards.ocr import OCR

    return OCR(argument)


def _judge(kind: str, *, unified: bool = False) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.judge import parse_judge

        return parse_judge(kind, argument, options.timeout, unified=unified)

    return build


def _geneval(name: str, *, partly: bool = False) -> Build:
    def build(argument: str, options: Options) -> Reward:
        from diffrl.images.rewards.geneval import GenEval
        from diffrl.images.rewards.python import loaded

        return GenEval(loaded(argument, name), f"{name}:{argument}", partly=partly)

    return build


REWARDS: dict[str, Entry] = {
    "jpeg": Entry(
        "jpeg[:QUALITY]",
        "compressibility: -kB of the JPEG's scan, quality 95",
        "optional",
        _jpeg("jpeg"),
        companion="png",
        gradient=False,
    ),
    "jpeg-file": Entry(
        "jpeg-file[:QUALITY]",
        "-kB of the whole JPEG file, as DDPO",
        "optional",
        _jpeg("jpeg-file", whole_file=True),
        companion="png",
        gradient=False,
    ),
    "incompressible": Entry(
        "incompressible[:QUALITY]",
        "the negative of jpeg",
        "optional",
        _jpeg("incompressible", 1),
        companion="-1*png",
        gradient=False,
    ),
    "png": Entry("png", "-kB of the PNG's data: another codec, to hold out", "none", _png, gradient=False),
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
    "emoji": Entry(
        "emoji[:PROMPT]",
        "probability of the prompt's object and colour, or of PROMPT's (emoji:blue heart)",
        "optional",
        _emoji(held_out=False),
        companion="emoji-held-out[:ARGUMENT]",
    ),
    "emoji-held-out": Entry(
        "emoji-held-out[:PROMPT]", "the same by another network, on other drawings", "optional", _emoji(held_out=True)
    ),
    "emoji-clip": Entry(
        "emoji-clip[:PROMPT]",
        "100 times the cosine of image and prompt, or PROMPT, by two small towers",
        "optional",
        _emoji_clip,
        companion="emoji[:ARGUMENT]",
    ),
    "colour": Entry("colour:HUE", "how much of a hue: red, blue, ..., or degrees (colour:210)", "required", _colour),
    "symmetry": Entry("symmetry", "correlation of the image with its mirror image", "none", _symmetry),
    "classifier": Entry(
        "classifier:PATH[#LABEL]",
        "log-probability of LABEL, or of the prompt, by a transformers image classifier",
        "required",
        _classifier(log=True),
    ),
    "classifier-probability": Entry(
        "classifier-probability:PATH[#LABEL]", "the probability itself", "required", _classifier(log=False)
    ),
    "clip": Entry("clip:PATH", "100 cos of CLIP's image and prompt", "required", _pretrained("clip")),
    "pickscore": Entry("pickscore:PATH", "PickScore: exp(logit scale) cos", "required", _pretrained("pickscore")),
    "hps": Entry("hps:PATH", "HPSv2: cos", "required", _pretrained("hps")),
    "hpsv3": Entry(
        "hpsv3:PATH", "HPSv3: the mean that its head on Qwen2-VL predicts", "required", _pretrained("hpsv3")
    ),
    "aesthetic": Entry(
        "aesthetic:PATH[#HEAD]", "LAION's aesthetic predictor on CLIP", "required", _pretrained("aesthetic")
    ),
    "imagereward": Entry("imagereward:PATH", "ImageReward: BLIP and a head", "required", _pretrained("imagereward")),
    "richhf": Entry(
        "richhf:PATH[#WEIGHT]",
        "rich feedback: overall score less WEIGHT (1) times the artifact map's mean",
        "required",
        _pretrained("richhf"),
    ),
    "ocr": Entry(
        "ocr[:TEXT]",
        'how well TEXT, or what the prompt has in "quotation marks", can be read',
        "optional",
        _ocr,
        gradient=False,
    ),
    "geneval": Entry(
        "geneval:FILE.py#NAME",
        "1 where your detector finds what GenEval's metadata ask for, else 0",
        "required",
        _geneval("geneval"),
        gradient=False,
    ),
    "geneval-part": Entry(
        "geneval-part:FILE.py#NAME",
        "how much of it your detector finds (Flow-GRPO)",
        "required",
        _geneval("geneval-part", partly=True),
        companion="geneval[:ARGUMENT]",
        gradient=False,
    ),
    "vlm": Entry(
        "vlm:URL#MODEL[#FILE]",
        "a vision-language model as the judge, behind an OpenAI-compatible endpoint",
        "required",
        _judge("vlm"),
        gradient=False,
    ),
    "unifiedreward": Entry(
        "unifiedreward:URL#MODEL",
        "UnifiedReward behind such an endpoint",
        "required",
        _judge("unifiedreward", unified=True),
        gradient=False,
    ),
    "human": Entry(
        "human[:VOTES]",
        "you, of VOTES (4) groups a round (nft, grpo, d3po); or human:RUN/votes.json, kept votes",
        "optional",
        _human,
        gradient=False,
    ),
    "python": Entry("python:FILE.py#NAME", "a function of yours", "required", _python),
    "remote": Entry(
        "remote:URL",
        "a scorer over HTTP and JSON (python -m diffrl.images.rewards.serve)",
        "required",
        _remote,
        gradient=False,
    ),
}
"""diffrl's own rewards by name."""
