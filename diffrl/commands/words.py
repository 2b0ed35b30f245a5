"""Words of the command line: those read before a verb's options are, and the options themselves."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from diffrl.support.errors import UserError, closest, shortened

T = TypeVar("T")


def parse(
    schema: type[T],
    words: Sequence[str],
    prog: str,
    *,
    before: Sequence[str] = (),
    elsewhere: Callable[[str], str] = lambda name: "",
    **options: Any,
) -> T:
    """What tyro makes of a verb's words. Raises UserError, a line, for what it does not take.

    Of an option that there is not it names the nearest. prog: the verb's command; before: options that were taken out
    of the words before, and are known too; elsewhere: of an option that there is not, where it would be one ("": no
    one knows); options: `tyro.cli`'s.
    """
    import tyro

    given: T
    verb = re.sub(r" \[.*", "", prog)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given, unknown = tyro.cli(schema, args=words, prog=prog, return_unknown_args=True, **options)
    except SystemExit as leaving:
        if leaving.code != 2:
            raise
        raise UserError(f"{in_a_line(said.getvalue(), verb)} `{verb} --help` explains all.") from None
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
    raise no_option(verb, name, [*before, *known])


def no_option(verb: str, name: str, known: Sequence[str]) -> UserError:
    """What is said of an option that a verb does not have."""
    meant = near_options(name, known)
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return UserError(f"`{verb}` has no option {shortened(name)}: {hint}`{verb} --help` explains all.")


def in_a_line(box: str, verb: str) -> str:
    """What tyro says of words that it cannot read, which is a box of several lines, as one or two sentences.

    The box's first part is the mistake; under a rule may follow the option with what it takes, as in its help. Where
    the output is not in UTF-8 the title stands above a rule of its own.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[─-]{5,}", line):
            parts.append([])
        elif line and line[0] not in "╭╰":
            parts[-1].append(line)
    parts = parts if "╭" in box else parts[1:]
    mistake = " ".join(parts[0]) if parts else ""
    if missing := re.match(r"Missing from .*?: *(\S+(?: [A-Z]+(?=\s|$))?)(.*)", mistake):
        what = missing[2].replace("(required)", "").strip()
        return f"`{verb}` needs {missing[1]}{what and ': ' + what[0].lower() + what[1:]}"
    if empty := re.match(r"Missing value for argument '(.+?)'", mistake):
        return f"{empty[1]} needs a value."
    if choice := re.match(r"invalid choice (.+) for argument '(.+?)'\. Expected one of \((.+)\)", mistake):
        expected = [word.strip("' ") for word in choice[3].split(",") if word.strip("' ") not in ("", "None")]
        near = closest(choice[1].strip("'"), expected) if len(expected) > 3 else None
        hint = f" Did you mean {near}?" if near is not None else ""
        return f"{choice[2]} is {choice[1]}; expected {_either(expected)}.{hint}"
    if wrong := re.match(r"Error parsing (\S+): (.*)", mistake):
        value = re.search(r"(?:base 10|to float): ('.*')$", wrong[2])
        kind = "a whole number" if "int()" in wrong[2] else "a number"
        if value:
            return f"{wrong[1]} is {value[1]}; expected {kind}."
        usage = next((line for part in parts[1:] for line in part if line.startswith(wrong[1])), None)
        if usage is not None and (values := re.search(r"arguments: \[(.*)\]", wrong[2])):
            given = values[1].replace("'", "").replace(",", "")
            return f"{wrong[1]} is {given}; expected {usage}."
        return f"{wrong[1]}: {wrong[2].rstrip('.')}."
    return mistake if mistake.endswith(".") else f"{mistake}."


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
