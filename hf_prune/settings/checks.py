"""Checks of single values and of plain data, each with an error that names the field."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import regex

from .errors import ConfigError, closest, closest_path

_T = TypeVar("_T")
#: Schedules, by name; the functions are in `pruning/schedules.py`. `polynomial(k)` takes its exponent.
SCHEDULES: tuple[str, ...] = ("constant", "linear", "cubic", "exp", "cos", "cube", "polynomial(k)", "lottery")


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold; true and false are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


#: What a value of a type is called.
_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "null",
    dict: "an object",
    list: "a list",
}


def check_type(name: str, value: object, hint: Any) -> None:
    """Raise unless a value is of the type that a field is declared with; types that JSON does not have are taken as they are.

    Raises:
        ConfigError: it is of another.
    """
    if not fits(value, hint):
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        called = [_CALLED.get(get_origin(option) or option, str(option)) for option in options]
        raise ConfigError(name, value, f"must be {' or '.join(called)}.")


def check_installed(wanted: str, packages: Iterable[str], extra: str) -> None:
    """Raise unless some packages are installed, which are found without being imported.

    Args:
        wanted: what needs them, as given: `"runtime='onnx'"`.
        packages: their names.
        extra: what `pip install hf-prune[…]` calls them.

    Raises:
        ImportError: some are not; says what to install.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{wanted}: needs {', '.join(missing)}; `pip install hf-prune[{extra}]`.")


def check_types(instance: Any) -> None:
    """[`check_type`] of every field of a dataclass."""
    for name, hint in get_type_hints(type(instance)).items():
        check_type(name, getattr(instance, name), hint)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type that a field is declared with; see [`check_type`]."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is dict:
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if kind is list:
        return isinstance(value, (list, tuple)) and all(fits(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    return kind not in _CALLED or type(value) is kind


def check_share(name: str, value: object, upper_open: bool = True) -> None:
    """A finite number in [0, 1), or in [0, 1]."""
    allowed = f"must be a number in [0, 1{')' if upper_open else ']'}."
    if not is_number(value) or not (0 <= value < 1 or (value == 1 and not upper_open)):  # type: ignore[operator]
        raise ConfigError(name, value, allowed)


def check_name(name: str, value: object, known: Iterable[str]) -> None:
    """One of these names."""
    known = sorted(known) if isinstance(known, set) else tuple(known)
    if value not in known:
        raise ConfigError(name, value, f"must be one of {', '.join(known)}.", closest(value, known))


#: The product of all counts such as `{3}` in a regular expression: what compiling it costs.
_MOST_REPEATS = 1_000_000


def check_modules(name: str, value: Any) -> None:
    """None, a regular expression, or a list of name suffixes, as in PEFT."""
    allowed = "must be a regular expression that matches whole module names, or a list of module names or name suffixes."
    if value is None:
        return
    if isinstance(value, str):
        if math.prod(float(count) for count in re.findall(r"(\d+),?\}", value)) > _MOST_REPEATS:
            raise ConfigError(name, value, f"repeats something more than {_MOST_REPEATS:,} times; it {allowed}")
        try:
            regex.compile(value)
        except (regex.error, RecursionError) as error:
            raise ConfigError(name, value, f"is not a valid regular expression ({error}); it {allowed}") from None
    elif not (isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value)):
        raise ConfigError(name, value, allowed)


def check_duration(name: str, value: object, whole: bool) -> None:
    """Steps: an integer, or a ratio of the run below 1. Epochs: any number from 0."""
    allowed = (
        "must be a whole number of steps, or a ratio of the run in [0, 1)." if whole else "must be a number of epochs, 0 or more."
    )
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise ConfigError(name, value, allowed)
    if whole and value >= 1 and value != int(value):  # type: ignore[operator, call-overload]
        raise ConfigError(name, value, allowed)


def _check_known(cls: type, data: Mapping[str, object]) -> None:
    """All keys must be fields of a dataclass."""
    known = [item.name for item in fields(cls)]
    for key, value in data.items():
        if key not in known:
            allowed = f"is not a field of {cls.__name__}; known are {', '.join(known)}."
            raise ConfigError(key, value, allowed, closest(key, known))


def fields_checked(cls: type[_T]) -> type[_T]:
    """A dataclass that raises a ConfigError for an argument which is not one of its fields."""
    made = cls.__init__

    @functools.wraps(made)
    def checked(self: _T, *values: Any, **named: Any) -> None:
        _check_known(type(self), named)
        made(self, *values, **named)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


def dataclass_from_dict(cls: type[_T], data: object) -> _T:
    """Build `cls` from plain data, with an error for a key that is not one of its fields, and for one that is missing."""
    if not isinstance(data, Mapping):
        known = ", ".join(item.name for item in fields(cls))  # type: ignore[arg-type]
        raise ConfigError(cls.__name__, data, f"must be an object with the fields {known}.")
    _check_known(cls, data)
    for item in fields(cls):  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING and item.name not in data:
            raise ConfigError(item.name, None, f"must be given in each {cls.__name__}.")
    return cls(**data)


def dataclass_from_json_file(cls: type[_T], path: str | os.PathLike[str]) -> _T:
    """Build `cls` from a JSON file.

    Raises:
        ConfigError: there is no such file, it is not JSON, or it holds a key that is not a field of `cls`.
    """
    file = Path(path)
    if not file.is_file():
        near = closest_path(path, sorted(file.parent.glob("*.json")))
        raise ConfigError(f"{cls.__name__} file", str(path), "must be a JSON file that is there.", near)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested too deeply
        raise ConfigError(f"{cls.__name__} file", str(path), f"is not valid JSON ({error}).") from None
    return dataclass_from_dict(cls, data)


def check_initial(name: str, value: object) -> None:
    """A share, or `"from_model"`."""
    if value != "from_model":
        if isinstance(value, str):
            raise ConfigError(name, value, "must be a number in [0, 1) or 'from_model'.", closest(value, ("from_model",)))
        check_share(name, value)


def check_number(name: str, value: object) -> None:
    """A finite number."""
    if not is_number(value):
        raise ConfigError(name, value, "must be a number.")


def check_at_least_zero(name: str, value: object) -> None:
    """A finite number, 0 or more."""
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise ConfigError(name, value, "must be 0 or more.")


def check_regularization(name: str, value: object) -> None:
    """A number, 0 or more, or `"auto"`."""
    if value != "auto":
        if isinstance(value, str):
            raise ConfigError(name, value, "must be a number, 0 or more, or 'auto'.", closest(value, ("auto",)))
        check_at_least_zero(name, value)


def check_positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigError(name, value, "must be greater than 0.")


def check_speedup(name: str, value: object) -> None:
    """A finite number above 1."""
    if not is_number(value) or value <= 1:  # type: ignore[operator]
        raise ConfigError(name, value, "must be greater than 1: how many times faster.")


def check_target(name: str, value: object, one: Callable[[str, object], None], rises: bool) -> None:
    """A target in costs, or a list of them, each more than the one before it: speed-ups rise, and what is kept falls. Where shares
    and numbers are mixed, the model tells."""
    if not isinstance(value, list):
        return one(name, value)
    if not value:
        raise ConfigError(name, value, "must be a number, or a list with one or more.")
    for place, each in enumerate(value):
        one(f"{name}[{place}]", each)
    for before, after in pairwise(value):
        if (after <= before) if rises else (after >= before and (after < 1) == (before < 1)):
            order = "rise" if rises else "fall"
            raise ConfigError(
                name, value, f"must {order} from one to the next, since one model is pruned on; {after} follows {before}."
            )
    return None


def check_text(name: str, value: object) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(name, value, "must be a text.")


def check_schedule(name: str, value: object) -> None:
    """One of [`SCHEDULES`], or `polynomial(k)` with a whole k."""
    if not (isinstance(value, str) and re.fullmatch(r"polynomial\([1-9]\d{0,8}\)", value)):
        check_name(name, value, SCHEDULES[:-2] + SCHEDULES[-1:] + ("polynomial(k) with a whole k",))


def check_flag(name: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(name, value, "must be true or false.")


def check_count(name: str, value: object, unit: str = "steps", least: int = 1) -> None:
    """A whole number of something, `least` or more."""
    if not (is_number(value) and isinstance(value, int) and value >= least):
        raise ConfigError(name, value, f"must be a whole number of {unit}, {least} or more.")
