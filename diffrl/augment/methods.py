"""Methods that other packages bring to `diffrl augment`: entry points of the group `diffrl.augmenters`. No torch.

The name of an entry point is the verb: `diffrl augment NAME`. Its object is a dataclass of the method's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffrl.augment.config import Request
from diffrl.support import plugins
from diffrl.support.errors import shown
from diffrl.support.plugins import Plugin

if TYPE_CHECKING:
    from diffrl.augment.augmenter import Augmenter

GROUP: plugins.Group = "diffrl.augmenters"


@dataclass(frozen=True)
class Method(Request, ABC):
    """What a method is asked for: a data set to enlarge and where the larger one goes, and the method's own options.

    A package derives from it, with a field for each option of its own; their docstrings are their help, and that of the
    class is the verb's.
    """

    @abstractmethod
    def augmenter(self) -> Augmenter:
        """The method with these options, for one call: its `verb` is the name of the entry point."""

    def write(self, *, quiet: bool = False) -> Path:
        """Train and write as asked, by `diffrl.augment.job.augment`; give the path of the new data set.

        Raises UserError where the package's method cannot be used, and as `augment` does.
        """
        from diffrl.augment.job import augment

        plugin = plugins.bringing(GROUP, type(self).__mro__)  # the verb's class is made of the package's
        if plugin is None:  # in Python, without an entry point: of the package that its class is in
            return augment(self, self.augmenter(), quiet=quiet, by=type(self).__module__.partition(".")[0])
        from diffrl.augment.contract import blame

        blame(made := _made(plugin, self), plugin)
        return augment(self, made, quiet=quiet, by=plugin.release)


def _made(plugin: Plugin, method: Method) -> Augmenter:
    """The augmenter of a package's method, which is called by the package's name. Raises UserError where it is none."""
    from diffrl.augment.augmenter import Augmenter

    with plugin.blamed(call := f"{type(method).__name__}(...).augmenter()"):
        made = method.augmenter()
    if not isinstance(made, Augmenter):
        raise plugin.broken(f"{call} gives {shown(made)}; expected a diffrl.augment.augmenter.Augmenter")
    if made.verb != plugin.name:
        raise plugin.broken(f"{type(made).__name__}.verb is {made.verb!r}; expected {plugin.name!r}")
    return made


def find(name: str, own: Collection[str]) -> type[Method] | None:
    """The options of the method that another package brings under a name; None where none does, or it is one of `own`.

    Raises UserError where it cannot be used.
    """
    plugin = plugins.find(GROUP, name, own)
    return None if plugin is None else checked(plugin)


def checked(plugin: Plugin) -> type[Method]:
    """The options that a package brings. Raises UserError where they are none."""
    schema: type[Method]
    schema = plugin.schema(Method, "diffrl.augment.methods.Method", "`augmenter`, which gives the Augmenter")
    return schema


def tried_out(plugin: Plugin, own: Collection[str]) -> None:
    """Raise UserError where what a package brings cannot be used: its options, its augmenter, or its name."""
    plugins.check_name(plugin, own)
    schema = checked(plugin)
    with plugin.blamed(f"{schema.__name__}('DATASET', 'OUT.hdf5')"):
        method = schema("DATASET", "OUT.hdf5")
    _made(plugin, method)


def names(own: Collection[str]) -> list[str]:
    """The names that other packages alone bring, each once; nothing is loaded."""
    return list(dict.fromkeys(plugin.name for plugin in plugins.found(GROUP) if plugin.name not in own))
