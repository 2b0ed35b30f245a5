"""Words of the command line: those read before a verb's options are, and the options themselves."""

import contextlib
import dataclasses
import difflib
import io
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, get_type_hints

from diffrl.support.errors import UserError, closest, joined, shortened

T = TypeVar("T")


def parse(
    schema: type[T],
    words: Sequence[str],
    prog: str,
    *,
    before: Sequence[str] = (),
    elsewhere: Callable[[str], str] = lambda name: "",
    help_of: str = "",
    **options: Any,
) -> T:
    """What tyro makes of a verb's words. Raises UserError, a line, for what it does not take.

    Of an option that there is not it names the nearest. prog: the verb's command; before: options that were taken out
    of the words before, and are known too; elsewhere: of an option that there is not, where it would be one ("": no
    one knows); help_of: words that --help needs beside the verb, to show these options; options: `tyro.cli`'s.
    """
    import tyro

    given: T
    verb = re.sub(r" \[.*", "", prog)
    shown = f"{verb} {help_of}".rstrip()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given, unknown = tyro.cli(schema, args=words, prog=prog, return_unknown_args=True, **options)
    except SystemExit as leaving:
        if leaving.code != 2:
            raise
        raise UserError(f"{in_a_line(said.getvalue(), verb, words)} `{shown} --help` explains all.") from None
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())
    if not unknown:
        return given
    name = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
    if name is None:
        raise UserError(f"`{verb}` has no place for {shortened(unknown[0])!r}; its options begin with --.")
    if where := elsewhere(name):
        raise UserError(f"`{verb}` has no option {shortened(name)} here: {where}")
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(schema, args=["--help"], prog=prog, **options)
    known = re.findall(r"^[│ ]{1,4}(?:-\w, )?(--[a-z][\w.-]*)", help_text.getvalue(), re.MULTILINE)
    raise no_option(verb, name, [*before, *known], shown)


def no_option(verb: str, name: str, known: Sequence[str], shown: str = "") -> UserError:
    """What is said of an option that a verb does not have. shown: whose --help shows what it has, if not it."""
    meant = near_options(name, known)
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return UserError(f"`{verb}` has no option {shortened(name)}: {hint}`{shown or verb} --help` explains all.")


def in_a_line(box: str, verb: str, words: Sequence[str]) -> str:
    """What tyro says of words that it cannot read, which is a box of several lines, as one or two sentences.

    words: those that were typed. The box breaks what is long, so a value is taken from them; it is not said where they
    do not have it.
    """
    parts = _parts(box)
    lines = parts[0] if parts else []
    mistake = " ".join(line.strip() for line in lines)
    if mistake.startswith("Missing from "):
        return f"`{verb}` needs {_missing(lines[1:])}"
    if empty := re.match(r"Missing value for argument '(.+?)'", mistake):
        return f"{empty[1]} needs a value."
    if choice := re.match(r"invalid choice (.+) for argument '(.+?)'\. Expected one of \((.+)\)", mistake):
        expected = [word.strip("' ") for word in choice[3].split(",") if word.strip("' ") not in ("", "None")]
        typed = _typed(choice[1], words)
        near = closest(typed, expected) if typed is not None and len(expected) > 3 else None
        hint = f" Did you mean {near}?" if near is not None else ""
        return f"{choice[2]}{_is(typed)} expected {_either(expected)}.{hint}"
    if wrong := re.match(r"Error parsing (\S+): (.*)", mistake):
        if value := re.search(r"(?:base 10|to float): (['\"].+)", wrong[2]):
            kind = KINDS["INT" if "int()" in wrong[2] else "FLOAT"][0]
            return f"{wrong[1]}{_is(_typed(value[1], words))} expected {kind}."
        usage = next((line.strip() for part in parts[1:] for line in part if line.strip().startswith(wrong[1])), None)
        if usage is not None and (values := re.search(r"arguments: \[(.*)\]", wrong[2])):
            given = _typed_in_a_row(values[1], words)
            said = ":" if given is None else f" is {shlex.join(given)};"
            return f"{wrong[1]}{said} expected {_kind(usage.partition(' ')[2])}."
        return f"{wrong[1]}: {wrong[2].rstrip('.')}."
    return mistake if mistake.endswith(".") else f"{mistake}."


KINDS = {
    "INT": ("a whole number", "whole numbers"),
    "FLOAT": ("a number", "numbers"),
    "PATH": ("a path", "paths"),
    "STR": ("a word", "words"),
}
"""What tyro's words for a value mean: one of them, and several."""


def _parts(box: str) -> list[list[str]]:
    """The lines of tyro's box, with their indentation, cut at its rules: first the mistake, then what helps.

    Where the output is not in UTF-8 there is no frame, and the title stands above a rule of its own.
    """
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines():
        inner = re.sub(r"^│|│\s*$", "", line).rstrip()
        if re.fullmatch(" *[─-]{5,}", inner):
            parts.append([])
        elif inner and inner[0] not in "╭╰":
            parts[-1].append(inner)
    return parts if "╭" in box else parts[1:]


def _missing(lines: Sequence[str]) -> str:
    """What is missing, as a sentence ends: of one thing also what its help says, of several their names.

    lines: of each thing its name, and its help indented further.
    """

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    names = [line.strip() for line in lines if depth(line) == depth(lines[0])]
    if len(names) > 1:
        return f"{joined(names)}."
    about = " ".join(line.strip() for line in lines[1:]).replace("(required)", "").strip().rstrip(".")
    return f"{names[0]}: {about}." if about else f"{names[0]}."


def _kind(metavar: str) -> str:
    """What may be given for tyro's metavar: of "[INT [INT ...]]" whole numbers. What is of no one kind stays itself."""
    if one := re.fullmatch(r"(\w+)|\[(\w+) \[\2 \.\.\.\]\]", metavar):
        single, several = KINDS.get(one[1] or one[2], (metavar, metavar))
        return single if one[1] else several
    return metavar


def _typed_in_a_row(shown: str, words: Sequence[str]) -> list[str] | None:
    """The words that tyro shows as Python's literals with commas, found by them without blanks; None: not there."""
    wanted, given = _squeezed(shown), _values(words)
    literals = [_squeezed(repr(word)) for word in given]
    for i in range(len(given)):
        row = literals[i]
        for j in range(i + 1, len(given) + 1):
            if row == wanted:
                return given[i:j]
            if j == len(given) or not wanted.startswith(row):
                break
            row += f",{literals[j]}"
    return None


def _typed(shown: str, words: Sequence[str]) -> str | None:
    """The one word that tyro shows as Python's literal; None: it is not there.

    Of a word that is too long Python's int() shows the first 200 characters.
    """
    wanted = _squeezed(shown)
    cut = wanted[-1] != wanted[0]
    literals = {word: _squeezed(repr(word)) for word in _values(words)}
    return next((word for word, own in literals.items() if own == wanted or (cut and own.startswith(wanted))), None)


def _values(words: Sequence[str]) -> list[str]:
    """The words, and of --NAME=VALUE the value too."""
    return [part for word in words for part in ([word, word.partition("=")[2]] if word.startswith("--") else [word])]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is(typed: str | None) -> str:
    """What follows an option's name, before what is expected: its value, where that is known."""
    return ":" if typed is None else f" is {typed!r};"


def _either(words: Sequence[str]) -> str:
    """The words as a sentence lists what may be chosen: "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def near_options(name: str, known: Sequence[str]) -> list[str]:
    """At most three of the known options, the nearest to `name` first; of equal ones the verb's own, without a dot.

    Where `name` has a group that no option has, as --agent.lr for `diffrl finetune`, its last word alone counts.
    """
    asked_group, _, asked = name.replace("_", "-").removeprefix("--").rpartition(".")

    def alike(a: str, b: str) -> float:
        """Of two words, from 0 to 1; the same letters in another order are near."""
        ratio = difflib.SequenceMatcher(a=a, b=b).ratio()
        return max(ratio, 0.9) if sorted(a) == sorted(b) else ratio

    def nearness(option: str) -> float:
        """Of the words behind the last dots; and of those before them, where they are two."""
        group, _, own = option.removeprefix("--").rpartition(".")
        near = alike(asked, own)
        return min(near, alike(asked_group, group)) if asked_group else near

    ranked = sorted(
        {option: nearness(option) for option in known}.items(), key=lambda one: (-one[1], one[0].count("."))
    )
    found = [option for option, near in ranked[:3] if near > 0.75]
    return near_options(f"--{asked}", known) if asked_group and not found else found


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


def flag_values(words: Sequence[str], switches: Collection[str] = ("compile",)) -> list[str]:
    """The words with `--NAME` and `--no-NAME` as values True and False of fields that may also be None.

    switches: the names of those fields.
    """
    result: list[str] = []
    names = {f"--{name.replace('_', '-')}" for name in switches}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        plain = word.replace("_", "-")
        if plain.startswith("--no-") and (name := plain.replace("--no-", "--", 1)) in names:
            result += [name, "False"]
        elif plain in names and following not in ("True", "False", "None"):
            result += [plain, "True"]
        else:
            result.append(word)
    return result


def switches(schema: type) -> list[str]:
    """The names of a verb's own fields that are True, False or None, which `flag_values` reads."""
    types = get_type_hints(schema)
    return [field.name for field in dataclasses.fields(schema) if types[field.name] == bool | None]
