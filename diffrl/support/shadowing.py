"""Whether the packages `agents`, `configs` and `envs` that Python finds are ours.

The names are common: other distributions have packages of the same name (openai-agents has `agents`), and so may the
folder that a program is started from. Which one is found depends on `sys.path`, and on the order of installation where
two were installed into one folder.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from diffrl.support.errors import UserError

PACKAGES = ("agents", "configs", "envs")
MARK = b'__part_of__ = "diffrl"'
"""What the `__init__.py` of each of our packages holds."""


class ShadowedError(UserError, ImportError):
    """A package of ours is hidden, overwritten or missing."""


def check() -> None:
    """Raise ShadowedError unless all `PACKAGES` that Python finds are those beside `diffrl`.

    Imports none of them. Where the command line is what imports diffrl, the error is printed without a traceback and
    the process ends.
    """
    for package in PACKAGES:
        complaint = _complaint(package)
        if complaint:
            if _is_command_line():
                print(f"diffrl: {complaint}", file=sys.stderr)
                sys.exit(UserError.exit_code)
            raise ShadowedError(complaint)


def _complaint(package: str) -> str | None:
    """What is wrong with the package that Python finds under this name, and what to do; None: it is ours."""
    ours = Path(__file__).absolute().parents[2] / package
    advice = "Install diffrl into a fresh virtual environment without the other one"
    found = _found(package)
    if found is not None and Path(found).resolve() != ours.resolve():
        return (
            f"diffrl needs its own package `{package}`, {ours}, but Python finds {found}{_others(package)} first. "
            f"{advice}; or, if that is of your own making, run from another folder or rename it."
        )
    beginning = ours / "__init__.py"
    try:
        if MARK in beginning.read_bytes():
            return None
        damage = "is another package's"
    except OSError:
        damage = "is missing"
    return (
        f"diffrl's package `{package}` is damaged: {beginning} {damage}, as happens where another distribution"
        f"{_others(package)} is installed into, or removed from, the same folder. {advice}."
    )


def _found(package: str) -> str | None:
    """The folder, or file, that `import PACKAGE` would take; None: there is none."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was made by hand, without a spec
        return str(getattr(sys.modules[package], "__file__", "a module made by hand"))
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    return places[0] if places else spec.origin


def _others(package: str) -> str:
    """The distributions beside ours that have a package of this name, in brackets."""
    from importlib.metadata import packages_distributions

    others = sorted(set(packages_distributions().get(package, [])) - {"diffrl"})
    return f" ({', '.join(others)})" if others else ""


def _is_command_line() -> bool:
    """Whether this process is `diffrl ...` or `python -m diffrl ...`."""
    if sys.argv[:1] == ["-m"]:  # so while Python looks for the module, which is when our package is imported
        return any(word.split(".")[0] == "diffrl" for word in sys.orig_argv)
    return Path(sys.argv[0]).stem == "diffrl"
