"""Words of the command line that are read before a verb's options are: what names a configuration, and flags."""

from diffrl.support.errors import UserError


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
