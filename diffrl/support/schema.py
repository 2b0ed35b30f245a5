"""Values read strictly into the fields of a dataclass, from YAML or JSON: what does not belong is an error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffrl.support.errors import UserError, nearest


def checked(schema: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values, by the name of a field of the dataclass `schema`, converted to the fields' types.

    A list becomes a tuple, an int a float, text a path, where the field is one. source: where the values are from, for
    errors. Raises UserError for a key that is no field (the nearest is named), or a value of the wrong type.
    """
    hints = typing.get_type_hints(schema)
    known = {f.name for f in dataclasses.fields(schema)}
    result = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{source}: unknown key {key!r}; {nearest(str(key), known)}")
        result[key] = _convert(value, hints[key], f"{source}: {key}")
    return result


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{where} is {value!r}; {nearest(str(value), map(str, arguments))}")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0], where) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    hint_text = " (write 3.0e-4, with a point: YAML reads 3e-4 as text)" if hint is float else ""
    raise UserError(f"{where} is {value!r}; expected {name}{hint_text}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError where it cannot be read, or holds something else."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = f" For a data set: --agent NAME --dataset {path}." if path.suffix not in (".yaml", ".yml") else ""
        raise UserError(f"{path} is not valid YAML: {error}.{hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration: expected keys such as `dataset` and `agent`.")
    return values
