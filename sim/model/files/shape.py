"""Whether values have the shape of a frozen type: its keys, its types, finite numbers, its limits.

The shape is read off the type itself, limits off the `msgspec.Meta` of its `Annotated` fields, so a new field of a
scenario needs nothing here. A complaint says what was expected and what was found; the caller knows the file and the
line.
"""

from __future__ import annotations

import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec

from sim.model.errors import UserError

Key = tuple[str | int, ...]
Fail = Callable[[Key, str], UserError]
StandsFor = Callable[[Any, Any, Fail, Key], Any]

NOTHING = (type(None), msgspec.UnsetType)
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a map", list: "a list"}
LIMITS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("gt", operator.gt, "more than {:.16g}"),
    ("ge", operator.ge, "{:.16g} or more"),
    ("lt", operator.lt, "less than {:.16g}"),
    ("le", operator.le, "at most {:.16g}"),
)


def dotted(key: Key) -> str:
    """A key as people write it: `load.users[2]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)


def known(name: str, names: Iterable[str], what: str, key: Key, fail: Fail) -> None:
    """Complain about a name that is none of `names`, with the nearest one."""
    names = list(names)
    if name not in names:
        hint = nearest(name, names)
        raise fail(
            key, f"unknown {what}; " + (f"did you mean {hint}?" if hint else f"expected one of {', '.join(names)}")
        )


def same(hint: Any, value: Any, fail: Fail, key: Key) -> Any:
    """No type stands for another one."""
    return hint


def check_shape(value: Any, hint: Any, fail: Fail, key: Key = (), stands_for: StandsFor = same) -> None:
    """Complain about unknown and missing keys, about values of another type than `hint`, and about those outside its
    limits.

    `stands_for` says which struct stands for a type that a value chooses itself.
    """
    options = [stands_for(h, value, fail, key) for h in alternatives(hint) if h not in NOTHING]
    struct = next((h for h in options if isinstance(h, type) and issubclass(h, msgspec.Struct)), None)
    if isinstance(value, dict) and struct is not None:
        hints, tag = typing.get_type_hints(struct, include_extras=True), struct.__struct_config__.tag_field
        for name, below in value.items():
            if name == tag:
                continue
            known(name, (*((tag,) if tag else ()), *struct.__struct_fields__), "key", (*key, name), fail)
            if below is not None:
                check_shape(below, hints[name], fail, (*key, name), stands_for)
        for field in msgspec.structs.fields(struct):
            optional = type(None) in alternatives(hints[field.name])
            if field.required and (field.name not in value or (value[field.name] is None and not optional)):
                raise fail((*key, field.name), f"missing; expected {expected(hints[field.name])}")
        return
    _check_limits(value, hint, fail, key)
    for option in options:
        if isinstance(value, dict) and typing.get_origin(option) is dict:
            for name, below in value.items():
                check_shape(below, typing.get_args(option)[1], fail, (*key, name), stands_for)
            return
        if isinstance(value, list) and (typing.get_origin(option) is list or Ellipsis in typing.get_args(option)):
            for i, below in enumerate(value):
                check_shape(below, typing.get_args(option)[0], fail, (*key, i), stands_for)
            return
        if isinstance(value, list) and typing.get_origin(option) is tuple and len(value) == len(option.__args__):
            for i, (below, part) in enumerate(zip(value, typing.get_args(option), strict=True)):
                check_shape(below, part, fail, (*key, i), stands_for)
            return
    try:
        msgspec.convert(value, hint, dec_hook=_no_map)
    except msgspec.ValidationError as e:
        raise fail(key, f"expected {expected(hint)}, found {found(value)}") from e


def _check_limits(value: Any, hint: Any, fail: Fail, key: Key) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and {int, float} & set(alternatives(hint)):
        if not math.isfinite(value):
            raise fail(key, f"expected a finite number, found {value}")
        for meta in _metas(hint):
            for name, holds, words in LIMITS:
                if (limit := getattr(meta, name)) is not None and not holds(value, limit):
                    raise fail(key, f"expected {words.format(limit)}, found {found(value)}")
    elif isinstance(value, list) and any(len(value) < (meta.min_length or 0) for meta in _metas(hint)):
        raise fail(key, f"expected at least one value, found {found(value)}")


def _metas(hint: Any) -> list[msgspec.Meta]:
    """The limits of a type, or of the members of a union."""
    if typing.get_origin(hint) is Annotated:
        return [meta for meta in hint.__metadata__ if isinstance(meta, msgspec.Meta)]
    return [meta for member in _members(hint) for meta in _metas(member)]


def _no_map(hint: type, value: Any) -> Any:
    raise TypeError(f"a map stands for {hint}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, without their limits; of anything else, itself."""
    if typing.get_origin(hint) is Annotated:
        return alternatives(typing.get_args(hint)[0])
    return tuple(option for member in _members(hint) for option in alternatives(member)) or (hint,)


def _members(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else ()


def expected(hint: Any) -> str:
    """A type in words."""
    words = []
    for option in alternatives(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option in NOTHING:
            continue
        if isinstance(option, type) and issubclass(option, StrEnum):
            words.append(f"one of {', '.join(option)}")
        elif origin is Literal:
            words.append(f"one of {', '.join(arguments)}")
        elif isinstance(option, type) and issubclass(option, msgspec.Struct):
            words.append(f"a map of {', '.join(option.__struct_fields__)}")
        elif origin is None and option not in NAMES:
            words.append("a map")
        elif origin is tuple and Ellipsis not in arguments:
            words.append(f"a list of {len(arguments)}, each {expected(arguments[0])}")
        elif origin in (list, tuple):
            words.append(f"a list, each {expected(arguments[0])}")
        else:
            words.append(NAMES[origin or option])
    return " or ".join(dict.fromkeys(words))


def found(value: Any) -> str:
    """A value in few words."""
    if value == []:
        return "an empty list"
    if isinstance(value, dict | list):
        return f"{NAMES[type(value)]} of {len(value)}"
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
