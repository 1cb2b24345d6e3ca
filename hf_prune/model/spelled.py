"""Specs spelled out: as Python, ready to be a record, and as JSON, as the config of a condensed model has them."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..settings.errors import closest
from .spec import ArchitectureSpec


def _said(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass that are not default, with their values."""
    fields = dataclasses.fields(value)
    defaults = {each.name: each.default for each in fields}
    defaults |= {each.name: each.default_factory() for each in fields if each.default_factory is not dataclasses.MISSING}
    return [(name, own) for name, default in defaults.items() if (own := getattr(value, name)) != default]


def as_source(value: Any, indent: str = "") -> str:
    """A spec, or a value in one, as source text without what is default, in lines of 132 characters where it can be."""
    if dataclasses.is_dataclass(value):
        said = _said(value)
        names = [each.name for each in dataclasses.fields(value)]
        given = next((place for place, (name, _) in enumerate(said) if name != names[place]), len(said))  # these need no names
        items = [("" if place < given else f"{name}=", own) for place, (name, own) in enumerate(said)]
        start, end = f"{type(value).__name__}(", ")"
    elif isinstance(value, tuple) and value:
        start, items, end = "(", [("", item) for item in value], ",)"
    else:
        return repr(value)
    line = start + ", ".join(name + as_source(item) for name, item in items) + end
    if len(indent) + len(line) <= 132:
        return line
    inner, rows = f"{indent}    ", [""]
    for name, item in items:
        text = f"{name}{as_source(item, inner)},"
        if "\n" in rows[-1] + text or len(inner) + len(rows[-1]) + 1 + len(text) > 132:
            rows.append(text)
        else:
            rows[-1] = f"{rows[-1]} {text}".strip()
    return start + "".join(f"\n{inner}{row}" for row in rows if row) + f"\n{indent}{end[-1]}"


def as_json(value: Any) -> Any:
    """A spec, or a value in one, without what is default."""
    if dataclasses.is_dataclass(value):
        return {name: as_json(own) for name, own in _said(value)}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    return {name: as_json(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def from_json(written: Any, where: str = "config.hf_prune['architecture']") -> ArchitectureSpec:
    """The spec that [`as_json`] wrote.

    Args:
        written: the JSON value.
        where: what errors call it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    spec: ArchitectureSpec = _read(written, ArchitectureSpec, where)
    return spec


def _read(written: Any, kind: Any, where: str) -> Any:
    """A JSON value as a value of a type that a field of a spec has."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if written is None else _read(written, inside[0], where)
    if dataclasses.is_dataclass(kind) and isinstance(written, dict):
        hints = typing.get_type_hints(kind)
        for name in written.keys() - hints.keys():
            near = closest(name, hints)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(f"{where} has an unknown key {reprlib.repr(name)}; allowed: {', '.join(hints)}.{hint}")
        try:
            make: Any = kind
            return make(**{name: _read(value, hints[name], f"{where}[{name!r}]") for name, value in written.items()})
        except TypeError:  # a field without a default is not there
            required = (dataclasses.MISSING, dataclasses.MISSING)
            needed = [each.name for each in dataclasses.fields(kind) if (each.default, each.default_factory) == required]
            raise ValueError(f"{where} is {reprlib.repr(written)}; it needs {', '.join(needed)}, at least.") from None
    if origin is tuple and isinstance(written, list):
        return tuple(_read(item, inside[0], f"{where}[{place}]") for place, item in enumerate(written))
    if origin is Mapping and isinstance(written, dict):
        return {name: _read(item, inside[1], f"{where}[{name!r}]") for name, item in written.items()}
    if kind is Any or type(written) is kind:
        return written
    raise ValueError(f"{where} is {reprlib.repr(written)}; allowed: {getattr(kind, '__name__', kind)}.")
