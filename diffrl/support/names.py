"""Long names of runs, as a sweep gives them, on pages and in pictures."""

import html
import re
from collections.abc import Iterable, Sequence


def apart(names: Sequence[str]) -> tuple[list[str], str]:
    """The names without the parts between commas that all of them have, and these parts; "" where that cannot be.

    `bc-maze2d,lr=1,seed=0` and `bc-maze2d,lr=2,seed=0` become `lr=1` and `lr=2`. One name, names without such a part,
    and names that would be empty or alike stay whole.
    """
    parts = [name.split(",") for name in names]
    shared = [part for part in parts[0] if part and all(part in others for others in parts)] if len(names) > 1 else []
    short = [",".join(part for part in own if part not in shared) for own in parts]
    if not shared or not all(short) or len(set(short)) < len(set(names)):
        return list(names), ""
    return short, ",".join(shared)


def tells(name: str, agent: str, known: Iterable[str] = ()) -> bool:
    """Whether the name of a run has that of its agent in it, as a word: `my-iql` has iql, and `abcd` not bc.

    known: the agents' names there are. The longest of them is read: with td3_bc known, `td3_bc-maze2d` has no bc.
    """
    longest_first = "|".join(re.escape(one) for one in sorted({agent, *known}, key=len, reverse=True))
    return agent in re.findall(rf"(?<![A-Za-z])(?:{longest_first})(?![A-Za-z])", name)


def with_agents(
    names: Sequence[str], whole: Sequence[str], agents: Sequence[str], known: Iterable[str] = ()
) -> list[str]:
    """The names of runs with their agents in brackets, `full (iql)`, unless each run's whole name tells its agent.

    known: see `tells`; the agents of the runs themselves are known.
    """
    known = {*known, *agents}
    if all(tells(name, agent, known) for name, agent in zip(whole, agents, strict=True)):
        return list(names)
    return [f"{name} ({agent})" for name, agent in zip(names, agents, strict=True)]


_WORDS = r"[^,=\-_. ]*[,=\-_. ]?"


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, which end after a comma; else after =, -, _, a dot or a blank."""
    lines = [""]
    parts = re.findall("[^,]*,?", name)
    for piece in [one for part in parts for one in ([part] if len(part) <= width else re.findall(_WORDS, part))]:
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        while len(piece) > width:
            lines[-1], piece = piece[:width], piece[width:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(line for line in lines if line)


def breakable(name: str) -> str:
    """A name as HTML, which a browser may break after a comma, =, an underscore."""
    return re.sub(r"([,=_])", r"\1<wbr>", html.escape(name))
