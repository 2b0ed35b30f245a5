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

    return dataclasses.replace(
        inner,
        instance_from_str=lambda words: None if words == ["None"] else inner.instance_from_str(words),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else inner.str_from_instance(value),
        choices=None if inner.choices is None else (*inner.choices, "None"),
    )
