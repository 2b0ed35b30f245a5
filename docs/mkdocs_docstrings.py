"""Extension of Griffe, which reads the code for the site's reference: what it shows, and docstrings as Markdown.

Docstrings explain arguments as `name: what it is`, on a line of their own with a hanging indentation, or one after the
other in a paragraph. Google's style, which mkdocstrings assumes by default, makes a box of the former and drops the
name. Here each is an item of a list. Signs that mean something in Markdown, such as in `*shape`, stay as they are.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import griffe

NAMES = r"\*{0,2}\w+(?:, \*{0,2}\w+)*"
"""One name, or several that are explained together."""

BOLD = re.compile(r"(?<![\w*])\*\*(?=\w)([^*]+?)(?<=[\w.:,;)])\*\*(?![\w*])")
"""Words between double asterisks, as `**kwargs` and powers are not."""


class Docstrings(griffe.Extension):
    """Docstrings as Markdown; of a module what its package offers, where that says so; values that one can read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Once a package has been read, with all that is in it."""
        for one in walk(pkg):
            if isinstance(one, griffe.Module):
                _leave_what_is_offered(one)
        for one in walk(pkg):
            if isinstance(one, griffe.Class) and "NamedTuple" in map(str, one.bases):
                _show_fields(one)
            if one.docstring is not None:
                one.docstring.value = markdown(one.docstring.value, arguments(one))
            if isinstance(one, griffe.Attribute):
                one.value = _readable(one, loader)


def walk(one: griffe.Object) -> Iterator[griffe.Object]:
    """An object, and all that is defined in it."""
    yield one
    for member in one.members.values():
        if isinstance(member, griffe.Object):
            yield from walk(member)


def arguments(one: griffe.Object) -> set[str]:
    """The names that a docstring may explain: of a function its arguments, of a class those that it is made with."""
    if isinstance(one, griffe.Function):
        return {parameter.name for parameter in one.parameters} - {"self", "cls"}
    if not isinstance(one, griffe.Class):
        return set()
    fields = {name for name, member in one.members.items() if isinstance(member, griffe.Attribute)}
    made_by = one.members.get("__init__")
    return fields | (arguments(made_by) if isinstance(made_by, griffe.Function) else set())


def markdown(docstring: str, names: Collection[str]) -> str:
    """A docstring as Markdown. names: of the arguments that it may explain."""
    return "\n\n".join(_paragraph(part, names) for part in re.split(r"\n(?:[ \t]*\n)+", docstring))


def _paragraph(text: str, names: Collection[str]) -> str:
    """A paragraph; where it explains arguments, a list of them; where it is set in, or of Python, a block."""
    if text.startswith("    "):
        return text
    if text.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if _explained(line, names)]
    marked = "".join(("\n" if n in starts else " ") + line.strip() for n, line in enumerate(lines))
    parts = [part for line in marked.splitlines() for part in _each_explained(line.strip(), names)]
    if not any(_explained(part, names) for part in parts):
        return _literal("\n".join(lines))
    shown = ""
    for part in filter(None, parts):
        found = _explained(part, names)
        if found is None:
            shown += f"\n{_literal(part)}\n\n"
        else:
            named = ", ".join(f"`{name}`" for name in found[1].split(", "))
            shown += f"- {named}: {_literal(part[found.end() :])}\n"
    return shown.strip()


def _explained(text: str, names: Collection[str]) -> re.Match[str] | None:
    """The arguments that a text begins by naming, and a colon: group 1 of the match."""
    found = re.match(rf"({NAMES}): ", f"{text} ")
    return found if found and {name.lstrip("*") for name in found[1].split(", ")} <= {*names} else None


def _each_explained(line: str, names: Collection[str]) -> Iterator[str]:
    """A line cut before each argument that it explains, behind a full stop or a semicolon, and before errors."""
    begun = 0
    for end in re.finditer(rf"(?<=[.;)]) (?={NAMES}: |Raises )", line):
        if line.startswith("Raises ", end.end()) or _explained(line[end.end() :], names):
            yield line[begun : end.start()]
            begun = end.end()
    yield line[begun:]


def _literal(text: str) -> str:
    """A text in which, outside of `code`, no sign means anything to Markdown, but the asterisks around bold words."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if n % 2 else _prose(part) for n, part in enumerate(parts))


def _prose(text: str) -> str:
    """Of `_literal`, a part without code."""
    parts = [re.sub(r"([\\*<\[\]$]|(?<!\w)_|_(?!\w))", _escaped, part) for part in BOLD.split(text)]
    return "".join(f"**{part}**" if n % 2 else part for n, part in enumerate(parts))


def _escaped(sign: re.Match[str]) -> str:
    return {"<": "&lt;", "$": "&#36;"}.get(sign[0], f"\\{sign[0]}")


def _leave_what_is_offered(module: griffe.Module) -> None:
    """Take out of a module the functions and constants that its package does not offer, in whose `__all__` others are.

    Classes stay: what is offered may derive from them, or hold them.
    """
    offered = module.parent.exports if isinstance(module.parent, griffe.Module) else None
    if offered is None or not module.members.keys() & {*map(str, offered)}:
        return
    for name in module.members.keys() - {*map(str, offered)}:
        if isinstance(module.members[name], griffe.Function | griffe.Attribute):
            del module.members[name]


def _show_fields(kind: griffe.Class) -> None:
    """Have all fields of a NamedTuple shown: no signature names them, and without a docstring they are left out."""
    for member in kind.members.values():
        if isinstance(member, griffe.Attribute) and member.docstring is None:
            member.docstring = griffe.Docstring("\u200b", parent=member)


def _readable(one: griffe.Attribute, loader: griffe.GriffeLoader) -> Any:
    """The value that is shown of an attribute: of a constant of another file what it is; none that `__init__` makes."""
    if "instance-attribute" in one.labels and "class-attribute" not in one.labels:
        return None
    for _ in range(5):
        if not isinstance(one.value, griffe.ExprName | griffe.ExprAttribute):
            break
        try:
            named = loader.modules_collection[one.value.canonical_path]
        except (KeyError, griffe.GriffeError):
            break
        one = named.target if isinstance(named, griffe.Alias) else named
        if not isinstance(one, griffe.Attribute):
            break
    return one.value
