"""The one validator: what a field of a dataclass may hold stands in its annotation, and is checked here.

`steps: Count = 1000` is a whole number in `Count`'s range; `Annotated[int, Range(2, 10)]` states a range of its own. To
mypy and to tyro's --help both are an int. `check(self)` in `__post_init__` holds a configuration to its annotations;
`read` makes one of what a file holds; `held` is for the arguments of functions. What concerns several fields is said in
`__post_init__`, through `refusal`.

The upper ends catch slips of the finger: they lie far above what anyone trains with, and keep `layers: 200000` or a
batch of 10^12 from hanging or filling the memory. Each is of one field alone: a network of the greatest width and depth
still does not fit, and running out of memory has a sentence of its own.

Why no library does this. pydantic would: but importing it takes 0.24 to 0.32 s on a busy machine, where a verb's --help
has 1 s in all; its strict mode refuses a list for a tuple, its other one takes text for a number; and each sentence
would be made here from its error codes. msgspec and cattrs check what they decode, not what is made in Python or by
tyro. annotated-types, the usual vocabulary for ranges, takes 0.03 s to say what `Range` says in ten lines.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from diffrl.support.errors import UserError, nearest, said_by, shown

T = TypeVar("T")


class Range(NamedTuple):
    """The numbers that a field may hold, as mathematics writes it; of a tuple, how many entries it may have."""

    low: float = -math.inf
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    """Which ends belong to it; of an infinite one, whether infinity itself may be given."""

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def expected(self, value: float) -> str:
        """What an error says of the range to whoever gave a value outside of it."""
        low = f"{'at least' if self.ends[0] == '[' else 'more than'} {self.low:,}" if math.isfinite(self.low) else ""
        high = f"{'at most' if self.ends[1] == ']' else 'less than'} {self.high:,}" if math.isfinite(self.high) else ""
        sides = " and ".join(side for side in (low, high) if side)
        if -math.inf < value < math.inf or high:
            return sides
        number = "a number" if self.ends[1] == "]" else "a finite number"
        return f"{number}, {sides}" if sides else number


FINITE = Range(ends="()")
"""Of a float with no range of its own."""

Count = Annotated[int, Range(1, 10**12)]
"""Steps, images, episodes: what is gone through one after the other, or told of."""
Natural = Annotated[int, Range(0, 10**12)]
"""As `Count`, or none."""
Rows = Annotated[int, Range(1, 10**10)]
"""Transitions that are kept or made."""
Batch = Annotated[int, Range(1, 10**7)]
"""Rows that are in a network at once."""
Width = Annotated[int, Range(1, 2**16)]
"""Units of a layer."""
Depth = Annotated[int, Range(1, 1000)]
"""Layers, or residual blocks."""
SamplingSteps = Annotated[int, Range(1, 10_000)]
"""Steps of a denoising chain, a solver or a flow."""
Many = Annotated[int, Range(1, 10**7)]
"""What is held in memory as one piece for each, but small: steps of a segment, noise levels."""
Several = Annotated[int, Range(1, 10_000)]
"""Networks, actions, environments or processes side by side."""
SEEDS = Range(0, 2**64 - 1)
"""What PyTorch's generators take."""
Seed = Annotated[int, SEEDS]
"""What random numbers come from."""
Positive = Annotated[float, Range(0, ends="()")]
"""A finite number above 0."""
NotNegative = Annotated[float, Range(0, ends="[)")]
"""A finite number, 0 or more."""
Limit = Annotated[float, Range(0, ends="[]")]
"""A bound, or infinity for none; what 0 means the field says."""
PositiveLimit = Annotated[float, Range(0, ends="(]")]
"""A bound above 0, or infinity for none."""
Rate = Annotated[float, Range(0, 1, "(]")]
"""Above 0, at most 1: how far something moves in one step."""
Share = Annotated[float, Range(0, 1, "[)")]
"""From 0 to below 1."""
Fraction = Annotated[float, Range(0, 1)]
"""From 0 to 1, both included."""


def check(config: Any, group: str = "", source: str = "") -> None:
    """Hold a dataclass that has just been made to its annotations; its values become of their types, as in `checked`.

    group: what its fields are part of, such as "agent."; source: see `checked`. Raises UserError.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in checked(type(config), values, source, group).items():
        object.__setattr__(config, name, value)


def checked(schema: type, values: Mapping[str, Any], source: str = "", group: str = "") -> dict[str, Any]:
    """The values, by the name of a field of the dataclass `schema`, converted to the fields' types.

    A list becomes a tuple, a whole number a float, text a path, where the field is one. source: the file that the
    values are from, for errors; without one, fields are named as the command line names them. Raises UserError for a
    key that is no field (the nearest is named), a value of the wrong type, or one out of its range.
    """
    hints = _hints(schema)
    result = {}
    for key, value in values.items():
        if key not in hints:
            hint = nearest(str(key)[:60], hints, group=group)
            raise UserError(f"{source}: unknown key {shown(f'{group}{key}')}; {hint}")
        result[key] = held(value, hints[key], _named(key, source, group))
    return result


def read(schema: type[T], values: Mapping[str, Any], source: str, group: str = "") -> T:
    """The dataclass `schema` made of what a file holds: see `checked`.

    Raises UserError besides for a key that is missing, and for whatever the dataclass itself refuses.
    """
    fields = checked(schema, values, source, group)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise UserError(f"{source}: the key `{group}{field.name}` is missing.")
    try:
        return schema(**fields)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error


def refuse_others(names: Iterable[object], what: str, *schemas: type) -> None:
    """Raise UserError for a name that none of the dataclasses has for a field, naming the nearest. what: of what.

    A name that is no text, such as the key 1, is one of these.
    """
    known = {name for schema in schemas for name in _hints(schema)}
    for name in names:
        if name not in known:
            raise UserError(f"There is no field {shown(name)} of {what}; {nearest(str(name)[:60], known)}")


def refusal(field: str, value: object, expected: str) -> UserError:
    """The error for a value that will not do. field: its full name, such as --agent.width."""
    return UserError(f"{field} is {shown(value)}; expected {expected}.")


def kwargs_words(given: Any) -> Any:
    """Arguments by name, a mapping, as the words KEY=VALUE that `parse_kwargs` reads; anything else as it is.

    Scalars of NumPy are taken as numbers. Raises UserError for values that JSON does not hold.
    """
    if not isinstance(given, Mapping):
        return given
    if odd := [key for key in given if not (isinstance(key, str) and key.isidentifier())]:
        raise UserError(f"env_kwargs has {shown(odd[0])}; expected names of arguments.")
    try:
        return tuple(f"{key}={json.dumps(value, default=_plain)}" for key, value in given.items())
    except (TypeError, ValueError) as error:
        raise refusal("env_kwargs", given, f"values that JSON holds ({said_by(error)})") from error


def _plain(value: Any) -> Any:
    """A scalar of NumPy's as Python's. Raises TypeError for what JSON does not hold."""
    found = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(found, bool | int | float | str):
        raise TypeError(f"{type(value).__name__} is no such value")
    return found


def parse_kwargs(words: Sequence[str], flag: str = "--env-kwargs") -> dict[str, Any]:
    """Arguments by name from words KEY=VALUE. A value is read as JSON (2.0, true, null, [1, 2]), else it is text.

    Raises UserError for a word of another form, and for a key that is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.DOTALL)
        if match is None:
            raise UserError(f"{flag} is {word[:60]!r}; expected KEY=VALUE, such as g=2.0.")
        key, text = match[1], match[2]
        if key in found:
            raise UserError(f"{flag} gives {key} twice: give it once.")
        try:
            found[key] = {"True": True, "False": False, "None": None}[text] if text in _PYTHON else json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


_PYTHON = ("True", "False", "None")


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    """The annotation of each field."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _named(field: object, source: str, group: str) -> str:
    """A field's full name: as its file has it, or as the command line does."""
    return f"{source}: {group}{field}" if source else f"--{group}{field}".replace("_", "-")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}


def held(value: Any, hint: Any, where: str, allowed: Range | None = None) -> Any:
    """The value, converted to the type `hint`, such as `Count | None`. where: its full name, such as --agent.width.

    allowed: the range of a number whose hint names none. Raises UserError where it is not of that type and range.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = (extra for extra in arguments[1:] if isinstance(extra, Range))
        return held(value, arguments[0], where, next(ranges, allowed))
    if origin in (types.UnionType, typing.Union):
        return _one_of(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        text = shown(value)
        word = nearest(text.strip("'"), map(str, arguments))
        raise UserError(f"{where} is {text}; {word}")
    if origin is tuple:
        return _tuple(value, arguments, where, allowed or Range())
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        if not isinstance(value, bool) and isinstance(value, kind):  # NumPy's numbers too
            return _number(value, hint, where, allowed or (Range() if hint is int else FINITE))
    elif hint is str and isinstance(value, PurePath):
        return str(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    else:
        kind = origin or hint
        if hint is Any or not isinstance(kind, type) or isinstance(value, kind):  # of what is no type nothing is known
            return value
    raise refusal(where, value, _name(hint) + (_pointed(value) if hint is float and isinstance(value, str) else ""))


def group(value: T | None, schema: type[T], where: str) -> T:
    """An argument that is a whole dataclass of settings, its defaults where None. Raises UserError for another type."""
    given: T = schema() if value is None else held(value, schema, where)
    return given


def several_paths(paths: object, where: str) -> list[Path | str]:
    """Paths, or one, as a list; addresses stay text. Raises UserError for what are none."""
    one = isinstance(paths, str | PurePath) or not isinstance(paths, Iterable)
    given: list[Any] = [paths] if one else list(typing.cast("Iterable[Any]", paths))
    if not all(isinstance(path, str | PurePath) for path in given):
        raise refusal(where, paths, "a path, or a list of paths")
    return given


def _pointed(text: str) -> str:
    """How a number such as 3e-4, which YAML reads as text, is to be written; "" of what is no such number."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?)(\d+)", text.strip())
    if match is None:
        return ""
    digits, sign, exponent = match.groups()
    digits += "" if "." in digits else ".0"
    return f" (write {digits}e{sign or '+'}{exponent}, with a point and a sign: YAML reads {text.strip()} as text)"


def _name(hint: Any) -> str:
    """What an error calls a type."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if hint in _NAMES or not isinstance(hint, type):
        return _NAMES.get(hint, f"an instance of {hint}")
    top = hint.__module__.partition(".")[0]
    public = getattr(sys.modules.get(top), hint.__name__, None) is hint
    return f"an instance of {hint.__name__} ({top if public else hint.__module__})"


def _number(value: Any, kind: type, where: str, allowed: Range) -> Any:
    """A whole number or a float within its range."""
    try:
        number = kind(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not allowed.holds(number):
        raise refusal(where, number, allowed.expected(number))
    return number


def _one_of(value: Any, members: tuple[Any, ...], where: str) -> Any:
    """The value as the first of several types that takes it."""
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return held(value, members[0], where)
    for member in members:
        try:
            return held(value, member, where)
        except UserError:
            continue
    raise refusal(where, value, " or ".join(map(_name, members)))


def _tuple(value: Any, kinds: tuple[Any, ...], where: str, allowed: Range) -> tuple[Any, ...]:
    """The entries of a list, or of whatever else holds several."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise refusal(where, value, "a list")
    items = tuple(itertools.islice(value, None if math.isinf(allowed.high) else int(allowed.high) + 1))
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(items)
    else:
        allowed = Range(len(kinds), len(kinds))
    if not allowed.holds(len(items)):
        raise refusal(where, value, f"{allowed.expected(len(items))} entries")
    return tuple(held(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(items, kinds, strict=True)))
