"""The options of a script of this folder, read and explained as the package's own commands do it."""

from typing import Any, TypeVar

import tyro

from diffrl.commands.optional import registry

T = TypeVar("T")


def asked(schema: type[T], **options: Any) -> T:
    """What the command line asks for, as `schema` has it; options: `tyro.cli`'s.

    In --help what may be left out has no "(default: None)": its text says what is done without it.
    """
    with registry:
        return tyro.cli(schema, **options)
