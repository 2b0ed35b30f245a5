"""Words of the command line: those read before a verb's options are, and the options themselves."""

import contextlib
import difflib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from diffrl.support.errors import UserError, shortened

T = TypeVar("T")


def parse(schema: type[T], words: Sequence[str], prog: str, **options: Any) -> T:
    """What tyro makes of a verb's words. Raises UserError for an option that it does not have, naming the nearest.

    prog: the verb's command; options: `tyro.cli`'s.
    """
    import tyro

    given: T
    given, unknown = tyro.cli(schema, args=words, prog=prog, return_unknown_args=True, **options)
    if not unknown:
        return given
    verb = re.sub(r" \[.*", "", prog)
    name = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
    if name is None:
        raise UserError(f"`{verb}` has no place for {shortened(unknown[0])!r}; its options begin with --.")
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(schema, args=["--help"], prog=prog, **options)
    known = re.findall(r"^[│ ]{1,4}(?:-\w, )?(--[a-z][\w.-]*)", help_text.getvalue(), re.MULTILINE)
    meant = near_options(name, known)
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    raise UserError(f"`{verb}` has no option {shortened(name)}: {hint}`{verb} --help` explains all.")


def near_options(name: str, known: Sequence[str]) -> list[str]:
    """At most three of the known options, the nearest to `name` first; of equal ones the verb's own, without a dot."""
    asked_group, _, asked = name.replace("_", "-").removeprefix("--").rpartition(".")

    def nearness(option: str) -> float:
        """Of the words behind the last dots; and of those before them, where they are two."""
        group, _, own = option.removeprefix("--").rpartition(".")
        near = difflib.SequenceMatcher(a=asked, b=own).ratio()
        return min(near, difflib.SequenceMatcher(a=asked_group, b=group).ratio()) if asked_group else near

    ranked = sorted(
        {option: nearness(option) for option in known}.items(), key=lambda one: (-one[1], one[0].count("."))
    )
    return [option for option, near in ranked[:3] if near > 0.75]


def take(words: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the words and give the value."""
    for i, word in enumerate(words):
        if word == flag:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise UserError(f"{flag} needs a value.")
            value = words[i + 1]
            del words[i : i + 2]
            return value
        if word.startswith(flag + "="):
            del words[i]
            return word.split("=", 1)[1]
    return None


def flag_values(words: list[str]) -> list[str]:
    """The words with `--compile` and `--no-compile` as values True and False of a field that may also be None."""
    result: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word in ("--no-compile", "--no_compile"):
            result += ["--compile", "False"]
        elif word == "--compile" and following not in ("True", "False", "None"):
            result += ["--compile", "True"]
        else:
            result.append(word)
    return result
