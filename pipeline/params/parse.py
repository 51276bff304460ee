"""Values of YAML and JSON as dataclasses, with a sentence for everything unknown, missing or wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal

from pipeline.params.sentences import shown

_T = typing.TypeVar("_T")


def pick(table: Mapping[str, _T], name: str, what: str, where: str) -> _T:
    """`table[name]`, or a ValueError that lists the nearest known names."""
    if name not in table:
        raise ValueError(f"{where}: no {what} is called {shown(name)}; {_nearest(name, table)}")
    return table[name]


def parse(expected_type: type[_T], value: Any, where: str, *, in_file: bool = False) -> _T:
    """One of this project's frozen dataclasses from parsed JSON or YAML; ValueError says which key is wrong.

    `where`: what messages call the value; `in_file`: that is a file, and its keys are named after a colon.
    """
    parsed: _T = _build_dataclass(expected_type, value, where, ": " if in_file else ".")
    return parsed


def parse_part(expected_type: Any, value: Mapping[str, Any], where: str) -> None:
    """ValueError where `value`, some of the entries of a dataclass and of those in it, has a wrong or unknown one."""
    field_types = _known_field_types(expected_type, value, where)
    for key, entry in value.items():
        if dataclasses.is_dataclass(field_types[key]) and isinstance(entry, Mapping):
            parse_part(field_types[key], entry, f"{where}.{key}")
        else:
            _build(field_types[key], entry, f"{where}.{key}")


def _build(expected_type: Any, value: Any, where: str) -> Any:
    """`value` as `expected_type`: a dataclass, a container of known types, or a scalar."""
    origin, arguments = typing.get_origin(expected_type), typing.get_args(expected_type)
    if dataclasses.is_dataclass(expected_type):
        return _build_dataclass(expected_type, value, where, ".")
    if origin is Literal:
        if value is False and "off" in arguments:  # as YAML reads a bare off
            return "off"
        if isinstance(value, bool) or value not in arguments:
            names = list(map(str, arguments))
            nearest, every = _nearest(str(value), names), _nearest("", names)
            raise ValueError(f"{where} is {shown(value)}; {nearest}{'' if nearest == every else f' ({every})'}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(_alternative([each for each in arguments if each is not type(None)], value), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {shown(value)}; expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where} has {len(value)} entries; expected {len(arguments)}")
        item_types = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(item_types, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {shown(value)}; expected a mapping")
        return {_key(arguments[0], k, where): _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if expected_type is Any:
        return value
    if expected_type is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; expected a finite number")
    if expected_type is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is a number of {len(str(value))} digits, which is too large") from None
    if not isinstance(value, expected_type) or (expected_type is not bool and isinstance(value, bool)):
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if expected_type is float and isinstance(value, str) else ""
        raise ValueError(f"{where} is {shown(value)}; expected {expected_type.__name__}{hint}")
    return value


def _alternative(expected_types: list[Any], value: Any) -> Any:
    """Which of them `value` is meant as: the tuple if it is a list, else the first."""
    tuples = [each for each in expected_types if typing.get_origin(each) is tuple]
    return tuples[0] if tuples and isinstance(value, (list, tuple)) else expected_types[0]


def _key(expected_type: Any, key: Any, where: str) -> Any:
    """A mapping's key: text, or a whole number, which JSON holds as text."""
    if expected_type is not int:
        return str(key)
    with contextlib.suppress(TypeError, ValueError):
        if str(int(key)) == str(key):
            return int(key)
    raise ValueError(f"{where} has the key {shown(key)}; expected int")


def _build_dataclass(expected_type: Any, value: Any, where: str, separator: str) -> Any:
    """`separator`: between `where` and a key, in messages."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {shown(value)}; expected the keys {names_given(expected_type)}")
    field_types = _known_field_types(expected_type, value, where)
    for entry in dataclasses.fields(expected_type):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in value:
            raise ValueError(f"{where}: {entry.name!r} is missing")
    return expected_type(
        **{key: _build(field_types[key], entry, f"{where}{separator}{key}") for key, entry in value.items()}
    )


def _known_field_types(expected_type: Any, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a dataclass and their types; ValueError where `value` has a key that is none of them."""
    field_types = _field_types(expected_type)
    for key in value:
        if key not in field_types:
            raise ValueError(f"{where}: unknown key {shown(key)}; {_nearest(str(key), field_types)}")
    return field_types


@cache
def _field_types(expected_type: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types; class variables are none."""
    hints = typing.get_type_hints(expected_type)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(expected_type)}


def names_given(expected_type: Any) -> str:
    return ", ".join(entry.name for entry in dataclasses.fields(expected_type))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else "none are defined"
