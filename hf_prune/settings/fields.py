"""A setting is typed once, as a dataclass field: its type, default and help, and the check of its values.

Docstrings, checks, rules that leave settings open and command line arguments are derived from these fields.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from .checks import check_name

_T = TypeVar("_T")

#: `(name of the field, value)`; raises `ConfigError` where the value cannot be used.
Check = Callable[[str, Any], object]


def setting(default: Any, help: str, check: Check | None = None, choices: Iterable[str] | None = None) -> Any:
    """The field of a setting.

    Args:
        default: its default.
        help: what it does, for docstrings and `--help`.
        check: of its values; `None` is never checked where it is the default.
        choices: the names it can take, instead of `check`; a set may grow later.
    """
    check = check if choices is None else partial(check_name, known=choices)
    return field(default=default, metadata={"help": help, "check": check, "choices": choices})


def check_fields(settings: Any) -> None:
    """Check each setting of a dataclass by itself.

    Raises:
        ConfigError: a value cannot be used.
    """
    for item in fields(settings):
        value, check = getattr(settings, item.name), item.metadata.get("check")
        if check is not None and not (value is None and item.default is None):
            check(item.name, value)


def open_fields(cls: type[_T]) -> type[_T]:
    """Class decorator: a dataclass with the fields of its base, each None until it is given."""
    inherited = fields(cls)  # type: ignore[arg-type]
    cls.__annotations__ = {item.name: f"{item.type} | None" for item in inherited}
    for item in inherited:
        setattr(cls, item.name, field(default=None, metadata=item.metadata))
    return dataclass(cls)


def documented(cls: type[_T]) -> type[_T]:
    """Class decorator: the docstring of a dataclass lists its fields, with type, default and help, before what it raises."""
    text, raises, errors = (cls.__doc__ or "").partition("    Raises:")
    listed = (
        textwrap.fill(
            f"{item.name} (`{item.type}`, default `{default_of(item)!r}`): {help_of(item)}",
            width=120,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for item in fields(cls)  # type: ignore[arg-type]
    )
    cls.__doc__ = "\n".join([f"{text.rstrip()}\n\n    Args:", *listed, f"\n{raises}{errors}"])
    return cls


def default_of(item: Field[Any]) -> Any:
    """The default of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def help_of(item: Field[Any]) -> str:
    """The help of a setting, with the names it can take."""
    choices = item.metadata.get("choices")
    named = "" if choices is None else f" One of {', '.join(sorted(choices) if isinstance(choices, set) else choices)}."
    return str(item.metadata["help"]) + named
