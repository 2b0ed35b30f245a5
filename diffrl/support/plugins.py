"""What other packages bring to diffrl: the entry points of four groups.

A package says in its pyproject.toml what it brings, by name, and where the object is:

    [project.entry-points."diffrl.agents"]
    my_agent = "my_package.config:MyAgent"

Entry points are found where Python finds packages, in worker processes as in the first one. Only an object that is
asked for by its name is loaded. A name that diffrl has itself goes on to mean diffrl's own, whatever packages bring.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from diffrl.support.errors import UserError, joined, out_of_memory, said_by, shown

Group = Literal["diffrl.agents", "diffrl.rewards", "diffrl.datasets", "diffrl.augmenters"]
WHAT: dict[Group, str] = {
    "diffrl.agents": "agent",
    "diffrl.rewards": "reward",
    "diffrl.datasets": "family of data sets",
    "diffrl.augmenters": "augmenter",
}
"""What the objects of a group are."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of another package."""

    group: Group
    entry: EntryPoint

    @property
    def name(self) -> str:
        """What the object is called on the command line."""
        return self.entry.name

    @property
    def distribution(self) -> str:
        """The name of the package's distribution, as pip knows it."""
        return self.entry.dist.name if self.entry.dist is not None else "another package"

    @property
    def release(self) -> str:
        """The distribution with its version, such as "mypackage 0.1"."""
        return self.distribution + (f" {self.entry.dist.version}" if self.entry.dist is not None else "")

    def load(self) -> Any:
        """The object. Raises UserError where it cannot be imported, whatever the import raises, or if it calls exit."""
        with self.blamed("its import"):
            return self.entry.load()

    def schema(self, base: type, named: str, method: str) -> type[Any]:
        """The object, a dataclass that derives from `base` and can be made. Raises UserError where it is none.

        named: what `base` is called where it is imported from. method: what it has to add, in words.
        """
        found = self.load()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise self.broken(f"it is {shown(found)}; expected a subclass of {named}")
        if "__dataclass_fields__" not in vars(found):
            raise self.broken("the class is not a @dataclass(frozen=True)")
        if inspect.isabstract(found):
            raise self.broken(f"the class has no method {method}")
        return found

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """A block that runs the package's code. Raises UserError for all that it raises, and where it calls sys.exit.

        what: which of the package's code runs, such as "build('', ...)". Two kinds of errors pass: a UserError, which
        says of itself what to do, and that of memory that runs out, which is no fault of the package.
        """
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
                raise
            raise self.broken(f"{what} fails with {said_by(error)}{_where(error)}") from error

    def broken(self, why: str) -> UserError:
        """An error that says why the object cannot be used, and whose it is."""
        return UserError(
            f"The {WHAT[self.group]} {self.name!r} of {self.distribution} ({self.entry.value}) cannot be used: "
            f"{why.rstrip('.')}. Mend, update or uninstall {self.distribution}."
        )


def _where(error: BaseException) -> str:
    """The last line of code that is not diffrl's own before an error, as " (FILE, line N)"; "" where it is unknown."""
    ours = [Path(__file__).parents[2] / name for name in ("diffrl", "agents", "envs")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<"):
            return ""
        if not any(Path(frame.filename).is_relative_to(path) for path in ours):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def found(group: Group) -> list[Plugin]:
    """All of a group by name, those that cannot be used among them; nothing is loaded."""
    finders = tuple(id(finder) for finder in sys.meta_path)
    return list(_found(group, (finders, *((folder, *_state(folder)) for folder in sys.path))))


@functools.lru_cache(maxsize=len(WHAT))
def _found(group: Group, path: tuple[tuple[str | int, ...], ...]) -> tuple[Plugin, ...]:
    """What `found` says as long as Python's path, its folders and its finders are the same: a search reads all names.

    A file of entry points that is rewritten in its place is not seen by a process that has read it.
    """
    return tuple(Plugin(group, entry) for entry in sorted(entry_points(group=group), key=lambda entry: entry.name))


def _state(folder: str) -> tuple[int, ...]:
    """A folder of Python's path and when it got or lost an entry; nothing where none is. "" is the current one."""
    try:
        state = Path(folder).stat()  # that of "" is the current folder
    except OSError:
        return ()
    return (state.st_dev, state.st_ino, state.st_mtime_ns)


def find(group: Group, name: str, own: Collection[str]) -> Plugin | None:
    """The plugin of that name; None where there is none, or the name is diffrl's. own: the names of diffrl's own.

    Raises UserError where several packages bring it: which is meant is not guessed.
    """
    if name in own:
        return None
    same = [plugin for plugin in found(group) if plugin.name == name]
    conflict = _conflict(same, own)
    if conflict:
        raise same[0].broken(conflict)
    return same[0] if same else None


def check_name(plugin: Plugin, own: Collection[str]) -> None:
    """Raise UserError where a plugin is left out for its name: it is one of `own`, or another package brings it too."""
    others = [one for one in found(plugin.group) if one.name == plugin.name and one.distribution != plugin.distribution]
    conflict = _conflict([plugin, *others], own)
    if conflict:
        raise plugin.broken(conflict)


def left_out(group: Group, names: Collection[str]) -> list[str]:
    """A sentence for each plugin that is left out, as its name is one of these, which diffrl has itself."""
    return [str(plugin.broken(_OURS)) for plugin in found(group) if plugin.name in names]


def bringing(group: Group, things: Collection[object], name: str | None = None) -> Plugin | None:
    """The plugin, of that name where one is given, whose object is imported and one of `things`; else None."""
    for plugin in found(group):
        if plugin.entry.module in sys.modules and name in (None, plugin.name):
            with contextlib.suppress(UserError):
                loaded = plugin.load()
                if any(loaded is thing for thing in things):
                    return plugin
    return None


def not_here(group: Group) -> str:
    """What is added where a name is unknown, and none that is known is near it."""
    return f" It may be of another package (entry point `{group}`), which is not installed here."


def listed(group: Group, own: Collection[str]) -> list[str]:
    """The plugins of a group for a list that people read: NAME (DISTRIBUTION), and why one is left out."""
    by_name: dict[str, list[Plugin]] = {}
    for plugin in found(group):
        by_name.setdefault(plugin.name, []).append(plugin)
    result = []
    for name, same in by_name.items():
        conflict = _conflict(same, own)
        said = f"{same[0].distribution}{f'; left out: {conflict}' if conflict else ''}"
        if len(same) > 1 and name not in own:
            said = f"left out: {joined([plugin.distribution for plugin in same])} bring one each"
        result.append(f"{name} ({said})")
    return result


_OURS = "the name is that of one of diffrl's own, which is used instead"


def _conflict(same: list[Plugin], own: Collection[str]) -> str | None:
    """Why plugins of one name cannot be used, where that is because of the name."""
    if same and same[0].name in own:
        return _OURS
    return f"{same[1].distribution} brings one of the same name" if len(same) > 1 else None
