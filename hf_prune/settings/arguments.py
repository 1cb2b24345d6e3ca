"""Configs as flat command line arguments for transformers' `HfArgumentParser`, derived from the fields of the configs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .checks import fits
from .config import COST_TARGETS, PruningConfig, with_pairs
from .errors import ConfigError
from .fields import default_of, help_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class FlatArguments:
    """The settings of a config as arguments, each None until it is given.

    A list of names or numbers is given as one or more values. A single number is a number, and a single value that is not a plain
    name is a text, such as a regular expression. Other values of text settings, such as numbers or lists of pairs, are given as
    JSON. A setting that cannot be flat gives the reason in its metadata, as `not_flat`.

    Args:
        config: a dataclass whose fields have a `help` in their metadata.
        prefix: of the arguments' names.
        bare: words that make the prefix unnecessary.
        aliases: name of a setting → another name of its argument.
    """

    config: type
    prefix: str
    bare: tuple[str, ...] = ()
    aliases: Mapping[str, str] | None = None

    def name(self, setting: str) -> str:
        """What the argument of a setting is called."""
        return setting if any(word in setting for word in self.bare) else self.prefix + setting

    def __call__(self, cls: type[_T]) -> type[_T]:
        """As a class decorator: make `cls` a dataclass with a field for each setting, after its own."""
        hints = get_type_hints(self.config)
        for item in self._flat_fields():
            name, flat = self.name(item.name), _flat_type(hints[item.name])
            metadata: dict[str, Any] = {"help": _escaped(item), "aliases": [alias] if (alias := self._alias(item)) else []}
            if flat is bool:
                metadata |= {"nargs": "?", "const": True}
            setattr(cls, name, field(default=None, metadata=metadata))
            cls.__annotations__[name] = flat | None
        return dataclass(cls)

    def given(self, arguments: object) -> dict[str, Any]:
        """The settings that were given, by their names in the config."""
        hints = get_type_hints(self.config)
        values = {item.name: getattr(arguments, self.name(item.name)) for item in self._flat_fields()}
        return {name: _parsed(value, hints[name]) for name, value in values.items() if value is not None}

    def _flat_fields(self) -> list[Field[Any]]:
        return [item for item in fields(self.config) if "not_flat" not in item.metadata]

    def _alias(self, item: Field[Any]) -> str | None:
        return None if self.aliases is None else self.aliases.get(item.name)


def _flat_type(hint: Any) -> Any:
    """The type of the argument for a setting of a type."""
    options = [part for part in _options(hint) if part is not NoneType]
    if len(options) == 1:
        return options[0]
    return next((option for option in options if get_origin(option) is list and get_args(option)[0] in options), str)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _parsed(value: Any, hint: Any) -> Any:
    """A value as it is given, as the setting has it."""
    options = _options(hint)
    if isinstance(value, list) and len(value) == 1 and _stands_alone(value[0]):
        (value,) = value
    readers: tuple[Callable[[str], Any], ...] = (float, json.loads) if isinstance(value, str) and len(options) > 1 else ()
    for read in readers:
        try:
            number_or_list = read(value)
        except (ValueError, RecursionError):
            continue
        if fits(number_or_list, hint):
            return number_or_list
    return value


def _stands_alone(value: Any) -> bool:
    """Whether a value that was given alone is no list of one: a number, or a regular expression, which no plain name is."""
    return isinstance(value, (int, float)) or (isinstance(value, str) and not re.fullmatch(r"[\w.]+", value))


def _escaped(item: Field[Any]) -> str:
    """The help of an argument, in which argparse takes a percent sign for a format."""
    default = default_of(item)
    return (help_of(item) + ("" if default is None else f" By default {default}.")).replace("%", "%%")


_FLAT = FlatArguments(
    PruningConfig,
    prefix="pruning_",
    bare=("sparsity", "latency", *COST_TARGETS),
    aliases={"warmup_epochs": "--sparsity_warm_epochs", "cooldown_epochs": "--cooldown_epochs"},
)


@_FLAT
class PruningArguments:
    """[`PruningConfig`] as flat command line arguments beside `TrainingArguments`.

    Each setting is an argument of its name, with the prefix `pruning_` unless it says `sparsity` or `latency` or is a target; rules
    come from `--pruning_config file.json`.
    """

    do_prune: bool = field(default=False, metadata={"help": "Prune the model while it trains."})
    pruning_config: str | None = field(
        default=None,
        metadata={"help": "A JSON file with a PruningConfig, rules included; arguments given beside it win over it."},
    )
    if TYPE_CHECKING:  # the settings, which are derived

        def __init__(self, do_prune: bool = False, pruning_config: str | None = None, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def to_config(self) -> PruningConfig | None:
        """The config these arguments describe, or None without `--do_prune`.

        Raises:
            ConfigError: a value cannot be used, or pruning arguments were given without `--do_prune`.
        """
        given = _FLAT.given(self)
        if not self.do_prune:
            if given or self.pruning_config:
                name = next(iter(given), "pruning_config")
                raise ConfigError("do_prune", False, f"must be set, since {name} was given.")
            return None
        data = PruningConfig.from_json_file(self.pruning_config).to_dict() if self.pruning_config else {}
        return PruningConfig.from_dict({**data, **with_pairs(given)})
