"""What stands behind the colon of rewards: of few values held to these, files and folders looked for. No torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffrl.images.emoji_words import words_of
from diffrl.support.errors import UserError, nearest

HUES = {
    "red": 0,
    "orange": 30,
    "yellow": 60,
    "green": 120,
    "cyan": 180,
    "blue": 240,
    "purple": 270,
    "magenta": 300,
    "pink": 330,
}
"""Hues by name, in degrees on the circle of red, green and blue."""


def degrees_of(hue: str) -> int:
    """The degrees of a name of HUES, or of degrees such as "210". Raises UserError for another."""
    if re.fullmatch(r"\d{1,3}", hue, re.ASCII):
        return int(hue)
    if hue not in HUES:
        raise UserError(f"expected a colour or a hue in degrees, not {hue!r}; {nearest(hue, HUES)}")
    return HUES[hue]


def jpeg_quality(quality: str) -> int:
    """JPEG's quality. Raises UserError for what is no whole number from 1 to 100."""
    if not (quality.isdecimal() and 1 <= int(quality) <= 100):
        raise UserError("the argument is JPEG's quality, a whole number from 1 to 100")
    return int(quality)


def digit_of(digit: str) -> int:
    """The digit. Raises UserError for what is none."""
    if digit not in list("0123456789"):
        raise UserError("the argument is one digit, 0 to 9")
    return int(digit)


def named_digit(prompt: str) -> int:
    """The digit a prompt names, such as "7" or "a 7". Raises UserError where it names none, or several."""
    found = re.findall(r"\d+", prompt, re.ASCII)
    if len(found) != 1 or len(found[0]) != 1:
        raise UserError(f"the prompt {prompt!r} does not name one digit; expected one such as '7', or use digit:7")
    return int(found[0])


def model_folder(name: str) -> Path | None:
    """The folder of a model; None where the name is a hub's id. Raises UserError for what is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise UserError(f"{name!r} is no folder; expected a model's folder, or a hub id such as 'owner/model'")
    return None


def folder_and_label(argument: str) -> tuple[Path | None, str]:
    """The model of PATH#LABEL, as `model_folder` gives it, and the label, "" for none. Raises UserError as it does."""
    path, _, label = argument.partition("#")
    return model_folder(path), label


def artifacts_weight(weight: str) -> float:
    """The weight of artifacts, 1 for "". Raises UserError for what is no finite number."""
    try:
        value = float(weight or 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError("what follows '#' is the weight of artifacts, a number")
    return value


def folder_and_weight(argument: str) -> tuple[Path | None, float]:
    """The model and the weight of artifacts of PATH#WEIGHT. Raises UserError where one of them is none."""
    path, _, text = argument.partition("#")
    weight = artifacts_weight(text)
    return model_folder(path), weight


def file_and_function(argument: str) -> tuple[Path, str]:
    """The file and the name of FILE.py#NAME. Raises UserError where there is no such file. It is not run."""
    file, _, name = argument.partition("#")
    if not name:
        raise UserError("which function of it? Expected FILE.py#NAME")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no Python file {file}")
    return path, name


FIRST = (
    *("python", "geneval", "geneval-part", "clip", "pickscore", "hps", "hpsv3", "imagereward"),
    *("classifier", "classifier-probability", "aesthetic", "richhf", "human"),
)
"""The rewards of ours whose argument begins with a path; behind it may be # and more."""


SERVED = ("remote", "vlm", "unifiedreward")
"""Those whose argument begins with a server's address; behind it may be # and more."""


def path_in(name: str, argument: str, there: bool = True) -> tuple[int, int] | None:
    """Where in a reward's argument the path of a file or folder stands, from and to; None: it has none.

    there: whether there must be such a file or folder.
    """
    if name in FIRST and not argument.isdecimal():  # human:4
        start, end = 0, len(argument.partition("#")[0])
    elif name == "vlm" and argument.count("#") > 1:
        start, end = len(argument) - len(argument.split("#", 2)[2]), len(argument)
    else:
        return None
    text = argument[start:end]
    return (start, end) if text and (not there or Path(text).expanduser().exists()) else None


def server_in(name: str, argument: str) -> tuple[int, int] | None:
    """Where in a reward's argument a server's scheme, host and port stand, from and to; None: it has none."""
    match = re.match(r"https?://[^/?#\s]+", argument) if name in SERVED else None
    return None if match is None else match.span()


def votes_of(argument: str) -> int | Path:
    """How many votes a person gives in a round, or the file of kept ones. Raises UserError for what is neither."""
    path = Path(argument)
    if argument.isdecimal() and int(argument) > 0:
        return int(argument)
    if path.is_dir():
        raise UserError(f"{argument} is a folder; the votes of a run are human:{path / 'votes.json'}")
    if path.exists() or not re.fullmatch(r"[+-]?[\d.,]+", argument, re.ASCII):
        return path
    raise UserError(f"the number of votes is a whole number from 1, not {argument}")


def judge_of(kind: str, argument: str) -> tuple[str, str, str]:
    """The URL, the model and the file ("" for none) of the judge `kind`: see `judge.parse_judge`. Raises UserError."""
    url, _, rest = argument.partition("#")
    model, _, file = rest.partition("#")
    if not model or (file and kind == "unifiedreward"):
        form = f"{kind}:URL#MODEL" if kind == "unifiedreward" else f"{kind}:URL#MODEL[#FILE]"
        raise UserError(f"expected {form}, such as {kind}:http://localhost:8000/v1#MODEL")
    return url, model, file


CHECKS: Mapping[str, Callable[[str], object]] = {
    "colour": degrees_of,
    "jpeg": jpeg_quality,
    "jpeg-file": jpeg_quality,
    "incompressible": jpeg_quality,
    "digit": digit_of,
    "digit-held-out": digit_of,
    **dict.fromkeys(("emoji", "emoji-held-out", "emoji-clip"), words_of),
    "human": votes_of,
    "vlm": functools.partial(judge_of, "vlm"),
    "unifiedreward": functools.partial(judge_of, "unifiedreward"),
    **dict.fromkeys(("clip", "pickscore", "hps", "hpsv3", "imagereward"), model_folder),
    **dict.fromkeys(("classifier", "classifier-probability", "aesthetic"), folder_and_label),
    "richhf": folder_and_weight,
    **dict.fromkeys(("python", "geneval", "geneval-part"), file_and_function),
}
"""By the name of a reward of ours: what raises UserError for an argument that it cannot use."""
PROMPTS: Mapping[str, Callable[[str], object]] = {
    **dict.fromkeys(("emoji", "emoji-held-out", "emoji-clip"), words_of),
    **dict.fromkeys(("digit", "digit-held-out"), named_digit),
}
"""By the name of a reward of ours that reads prompts, without an argument: what raises UserError for one it cannot."""
