"""Options that may be left out: `--steps INT` in help, where tyro has `--steps {None}|INT ... (default: None)`."""

import dataclasses
import functools
import operator
import re
import types
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

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


_being_read: list[StructTypeInfo] = []


@registry.struct_rule
def options_in_words(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Read a dataclass as tyro does; in help, texts are paragraphs, and say themselves what is done by default.

    None for any other type, and for the dataclass that is being read.
    """
    if not dataclasses.is_dataclass(info.type) or any(info is one for one in _being_read):
        return None
    _being_read.append(info)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _being_read.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    return dataclasses.replace(spec, fields=tuple(map(_in_words, spec.fields)))


def _in_words(field: StructFieldSpec) -> StructFieldSpec:
    """A field whose help has its text's lines joined, and one default: the text's, if it says one, and its value here.

    A default of None, (), or "" is said by the text alone. A switch that may be None is shown as other switches are:
    --compile, --no-compile (`words.flag_values` reads it).
    """
    said: Any = field.helptext
    if dataclasses.is_dataclass(field.default):
        return field

    def text() -> str | None:
        return _paragraphs(said() if callable(said) else said)

    def hint(label: str) -> str:
        if field.default is None or field.default == () or field.default == "":
            return ""
        if not label:  # operands of which there may be any number, and none is filled in
            return "(required)"
        return f"({'here' if 'default' in (text() or '') else 'default'}: {label})"

    named: dict[str, Any] = {}
    if field.type == bool | None:
        named = {"name": f"no-{field.name}", "aliases": [f"--{field.name}"], "metavar": ""}
    kind: Any = Annotated[field.type, tyro.conf.arg(help_behavior_hint=hint, **named)]
    return dataclasses.replace(field, type=kind, helptext=text)


def _paragraphs(text: str | None) -> str | None:
    """A text without the line breaks of its source; empty lines and lines that are set in stay."""
    return None if text is None else re.sub(r"(?<!\n)\n(?![\n ])", " ", text)
