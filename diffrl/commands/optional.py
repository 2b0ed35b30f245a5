"""Options that may also be None: `--steps INT` in help, where tyro has `--steps {None}|INT`."""

import dataclasses
import functools
import operator
import types
from typing import Any, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

registry = ConstructorRegistry()
"""To be entered (`with registry:`) where the words of a command are parsed."""


@registry.primitive_rule
def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse `T | None` as T is parsed, or the word None as None; help shows T alone. None for any other type."""
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    kinds = get_args(info.type)
    others = tuple(kind for kind in kinds if kind is not types.NoneType)
    if len(others) in (0, len(kinds)):
        return None
    inner_type: Any = functools.reduce(operator.or_, others)
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner_type, info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None

    def parse(words: list[str]) -> Any:
        if words == ["None"]:
            return None
        if inner.choices is not None and (wrong := [word for word in words if word not in inner.choices]):
            raise ValueError(f"invalid choice {wrong[0]!r}: expected one of {', '.join(inner.choices)}")
        return inner.instance_from_str(words)

    return dataclasses.replace(
        inner,
        instance_from_str=parse,
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else inner.str_from_instance(value),
        choices=None,  # else None would be refused before it is parsed
    )
