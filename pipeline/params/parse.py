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

_T = typing.TypeVar("_T")


def pick(table: Mapping[str, _T], name: str, kind: str, where: str) -> _T:
    """`table[name]`, or a ValueError that lists the nearest known names."""
    if name not in table:
        raise ValueError(f"{where}: no {kind} is called {name!r}; {_nearest(name, table)}")
    return table[name]


def parse(kind: type[_T], value: Any, where: str, *, in_file: bool = False) -> _T:
    """One of this project's frozen dataclasses from parsed JSON or YAML; ValueError says which key is wrong.

    `where`: what messages call the value; `in_file`: that is a file, and its keys are named after a colon.
    """
    parsed: _T = _build_dataclass(kind, value, where, ": " if in_file else ".")
    return parsed


def parse_part(kind: Any, value: Mapping[str, Any], where: str) -> None:
    """ValueError where `value`, some of the entries of a dataclass and of those in it, has a wrong or unknown one."""
    kinds = _known_kinds(kind, value, where)
    for key, entry in value.items():
        if dataclasses.is_dataclass(kinds[key]) and isinstance(entry, Mapping):
            parse_part(kinds[key], entry, f"{where}.{key}")
        else:
            _build(kinds[key], entry, f"{where}.{key}")


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, a container of known types, or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, ".")
    if origin is Literal:
        if isinstance(value, bool):
            known = ", ".join(f'"{argument}"' for argument in arguments)
            raise ValueError(f"{where} is {value!r}; write one of {known} (YAML reads a bare off as false)")
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; {_nearest(str(value), map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {value!r}; expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where} has {len(value)} entries; expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; expected a mapping")
        return {_key(arguments[0], k, where): _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; expected a finite number")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is a number of {len(str(value))} digits, which is too large") from None
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if kind is float and isinstance(value, str) else ""
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}{hint}")
    return value


def _key(kind: Any, key: Any, where: str) -> Any:
    """A mapping's key: text, or a whole number, which JSON holds as text."""
    if kind is not int:
        return str(key)
    with contextlib.suppress(TypeError, ValueError):
        if str(int(key)) == str(key):
            return int(key)
    raise ValueError(f"{where} has the key {key!r}; expected int")


def _build_dataclass(kind: Any, value: Any, where: str, separator: str) -> Any:
    """`separator`: between `where` and a key, in messages."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; expected the keys {names_given(kind)}")
    kinds = _known_kinds(kind, value, where)
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in value:
            raise ValueError(f"{where}: {entry.name!r} is missing")
    return kind(**{key: _build(kinds[key], entry, f"{where}{separator}{key}") for key, entry in value.items()})


def _known_kinds(kind: Any, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a dataclass and their types; ValueError where `value` has a key that is none of them."""
    kinds = _kinds(kind)
    for key in value:
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; {_nearest(str(key), kinds)}")
    return kinds


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types; class variables are none."""
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def names_given(kind: Any) -> str:
    return ", ".join(entry.name for entry in dataclasses.fields(kind))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else "none are defined"
