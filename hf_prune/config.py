"""What to prune, how much, how and when: `PruningConfig`, its `PruningRule`s, and the flat `PruningArguments` of scripts.

Plain dataclasses with JSON in and out. Everything that can be checked without a model is checked on construction; what needs
the model (names that match nothing, targets that caps make unreachable, a run that is too short) is checked by `Pruner` before
the first step. This module imports neither torch nor transformers: it knows the names of patterns, criteria and schedules only.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import regex

from .files import write_text

CONFIG_NAME = "pruning_config.json"
_T = TypeVar("_T")

#: Structural patterns and the level at which they nest: a unit of a higher level contains units of lower ones.
STRUCTURAL_PATTERNS: dict[str, int] = {"auto": 0, "head": 2, "kv_group": 2, "neuron": 2, "block": 3, "layer": 4}
#: Criteria, by name; the classes are in `criteria.py`.
CRITERIA: set[str] = {
    "magnitude",
    "gradient",
    "snip",
    "snip_momentum",
    "taylor",
    "movement",
    "soft_movement",
    "fpgm",
    "apoz",
    "mean_activation",
    "wanda",
    "fisher",
    "random",
}
#: Criteria that read gradients, so their weights must be trained.
GRADIENT_CRITERIA: set[str] = {"gradient", "snip", "snip_momentum", "taylor", "movement", "soft_movement", "fisher"}
#: Schedules, by name; the functions are in `schedules.py`. `polynomial(k)` takes its exponent.
SCHEDULES: tuple[str, ...] = ("constant", "linear", "cubic", "exp", "cos", "cube", "polynomial(k)", "lottery")
SCOPES: tuple[str, ...] = ("local", "global", "threshold")
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "l2", "max")
NORMALIZATIONS: tuple[str, ...] = ("none", "mean", "l2")

#: Settings that make no sense together: (field, its values, other field, the values it does not go with, reason).
CONFLICTS: tuple[tuple[str, frozenset[str], str, frozenset[str], str], ...] = (
    (
        "criterion",
        frozenset({"fpgm", "apoz", "mean_activation"}),
        "pattern",
        frozenset({"NxM", "N:M", "channelx1", "auto", "block", "layer"}),
        "scores output rows, so it needs a pattern whose units own some: 1xchannel, head, kv_group or neuron",
    ),
    (
        "scope",
        frozenset({"local"}),
        "pattern",
        frozenset({"block", "layer"}),
        "has one unit in each module, so no module can reach a share by itself; use scope 'global' or 'threshold'",
    ),
    (
        "schedule",
        frozenset({"lottery"}),
        "criterion",
        frozenset({"movement", "soft_movement"}),
        "lets weights come back, which a rewind to earlier values contradicts",
    ),
)


class PruningConfigError(ValueError):
    """A setting that cannot be used. The message names the field, the value, what is allowed and the closest match."""

    def __init__(self, name: str, value: object, allowed: str, match: str | None = None) -> None:
        hint = f" Did you mean {match!r}?" if match else ""
        super().__init__(f"{name}={_shown(value)}: {allowed}{hint}")
        self.name, self.value, self.allowed, self.match = name, value, allowed, match

    def within(self, prefix: str) -> PruningConfigError:
        """The same error about a field of a larger structure."""
        return PruningConfigError(prefix + self.name, self.value, self.allowed, self.match)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Errors inside are about a field of a larger structure; see [`PruningConfigError.within`]."""
    try:
        yield
    except PruningConfigError as error:
        raise error.within(prefix) from None


def _shown(value: object) -> str:
    """A value as an error shows it: its `repr`, the middle left out of a long one."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of too many digits
        return f"({type(value).__name__})"
    return text if len(text) <= 400 else f"{text[:300]} … {text[-50:]}"


def closest(value: object, known: Iterable[str]) -> str | None:
    """The known name most like `value`, if any is."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5) if isinstance(value, str) else []
    return matches[0] if matches else None


def closest_path(path: str | os.PathLike[str], there: Iterable[Path]) -> str | None:
    """The path whose own name, without its folder, is most like that of `path`, if any is."""
    names = {other.name: str(other) for other in there}
    matches = difflib.get_close_matches(Path(path).name, list(names), n=1)
    return names[matches[0]] if matches else None


# ---------------------------------------------------------------------------------------------------------------- patterns


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern string.

    Attributes:
        kind: `"NxM"` (rows and columns included), `"N:M"`, or a name in `STRUCTURAL_PATTERNS`.
        n, m: block height (along outputs) and width (along inputs), `None` for the whole extent; for `"N:M"`, n zeros in every m
            neighbouring inputs.
    """

    kind: str
    n: int | None = 1
    m: int | None = 1

    @property
    def level(self) -> int:
        """Nesting level: 0 weights and blocks of weights, 1 rows and columns, 2 heads, groups of heads and neurons."""
        if self.kind in STRUCTURAL_PATTERNS:
            return STRUCTURAL_PATTERNS[self.kind]
        return 1 if self.n is None or self.m is None else 0

    @property
    def max_sparsity(self) -> float:
        """The largest share of zeros that the pattern allows."""
        return self.n / self.m if self.kind == "N:M" and self.n and self.m else 1.0

    @property
    def form(self) -> str:
        """The form it belongs to, as `CONFLICTS` names it."""
        if self.kind != "NxM" or (self.n and self.m):
            return self.kind
        return "1xchannel" if self.n else "channelx1"


_PATTERN_HELP = (
    "must be 'NxM' (a block of N outputs by M inputs, such as '1x1' or '4x1'), 'N:M' (N zeros in every M neighbouring inputs, "
    "such as '2:4'), '1xchannel' (an output row), 'channelx1' (an input column), 'auto' (tiles as high as a head in attention, "
    "rows and columns in the feed-forward block), 'head', 'kv_group' (a key and value head with all the heads that share it), "
    "'neuron', 'block' (a whole attention or feed-forward sublayer) or 'layer'."
)


def parse_pattern(text: str, name: str = "pattern") -> Pattern:
    """Parse a pattern string.

    Raises:
        PruningConfigError: it is not one of the known forms.
    """
    if isinstance(text, str):
        if text == "1xchannel":
            return Pattern("NxM", 1, None)
        if text == "channelx1":
            return Pattern("NxM", None, 1)
        if text in STRUCTURAL_PATTERNS:
            return Pattern(text)
        if match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text):
            return Pattern("NxM", int(match[1]), int(match[2]))
        match = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", text)
        if match and int(match[1]) < int(match[2]):
            return Pattern("N:M", int(match[1]), int(match[2]))
    known = ("1x1", "4x1", "2:4", "1xchannel", "channelx1", *STRUCTURAL_PATTERNS)
    raise PruningConfigError(name, text, _PATTERN_HELP, closest(text, known))


# -------------------------------------------------------------------------------------------------------------- validation


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold; true and false are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


#: What a value of a type is called.
_CALLED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
_CALLED |= {dict: "an object", list: "a list"}


def check_type(name: str, value: object, hint: Any) -> None:
    """Raise unless a value is of the type that a field is declared with; types that JSON does not have are taken as they are.

    Raises:
        PruningConfigError: it is of another.
    """
    if not _fits(value, hint):
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        called = [_CALLED.get(get_origin(option) or option, str(option)) for option in options]
        raise PruningConfigError(name, value, f"must be {' or '.join(called)}.")


def check_types(instance: Any) -> None:
    """[`check_type`] of every field of a dataclass."""
    for name, hint in get_type_hints(type(instance)).items():
        check_type(name, getattr(instance, name), hint)


def _fits(value: object, hint: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is dict:
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    return kind not in _CALLED or type(value) is kind


def check_share(name: str, value: object, upper_open: bool = True) -> None:
    """A finite number in [0, 1), or in [0, 1]."""
    allowed = f"must be a number in [0, 1{')' if upper_open else ']'}."
    if not is_number(value) or not (0 <= value < 1 or (value == 1 and not upper_open)):  # type: ignore[operator]
        raise PruningConfigError(name, value, allowed)


def _check_name(name: str, value: object, known: Iterable[str]) -> None:
    known = sorted(known) if isinstance(known, set) else tuple(known)
    if value not in known:
        raise PruningConfigError(name, value, f"must be one of {', '.join(known)}.", closest(value, known))


#: The product of all counts such as `{3}` in a regular expression: what compiling it costs.
_MOST_REPEATS = 1_000_000


def _check_modules(name: str, value: Any) -> None:
    """None, a regular expression, or a list of name suffixes, as in PEFT."""
    allowed = "must be a regular expression that matches whole module names, or a list of module names or name suffixes."
    if value is None:
        return
    if isinstance(value, str):
        if math.prod(float(count) for count in re.findall(r"(\d+),?\}", value)) > _MOST_REPEATS:
            raise PruningConfigError(name, value, f"repeats something more than {_MOST_REPEATS:,} times; it {allowed}")
        try:
            regex.compile(value)
        except (regex.error, RecursionError) as error:
            raise PruningConfigError(name, value, f"is no valid regular expression ({error}); it {allowed}") from None
    elif not (isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value)):
        raise PruningConfigError(name, value, allowed)


def _check_duration(name: str, value: object, whole: bool) -> None:
    """Steps: an integer, or a ratio of the run below 1. Epochs: any number from 0."""
    allowed = (
        "must be a whole number of steps, or a ratio of the run in [0, 1)." if whole else "must be a number of epochs, 0 or more."
    )
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise PruningConfigError(name, value, allowed)
    if whole and value >= 1 and value != int(value):  # type: ignore[operator, call-overload]
        raise PruningConfigError(name, value, allowed)


def dataclass_from_dict(cls: type[_T], data: object) -> _T:
    """Build `cls` from plain data, with an error for a key that is not one of its fields, and for one that is missing."""
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise PruningConfigError(cls.__name__, data, f"must be an object with the fields {', '.join(known)}.")
    for key, value in data.items():
        if key not in known:
            allowed = f"is not a field of {cls.__name__}; known are {', '.join(known)}."
            raise PruningConfigError(key, value, allowed, closest(key, known))
    for item in fields(cls):  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING and item.name not in data:
            raise PruningConfigError(item.name, None, f"must be given in each {cls.__name__}.")
    return cls(**data)


def dataclass_from_json_file(cls: type[_T], path: str | os.PathLike[str]) -> _T:
    """Build `cls` from a JSON file.

    Raises:
        PruningConfigError: there is no such file, it is not JSON, or it holds a key that is not a field of `cls`.
    """
    file = Path(path)
    if not file.is_file():
        near = closest_path(path, sorted(file.parent.glob("*.json")))
        raise PruningConfigError(f"{cls.__name__} file", str(path), "must be a JSON file that is there.", near)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested too deeply
        raise PruningConfigError(f"{cls.__name__} file", str(path), f"is not valid JSON ({error}).") from None
    return dataclass_from_dict(cls, data)


def _check_initial(name: str, value: object) -> None:
    if value != "from_model":
        if isinstance(value, str):
            raise PruningConfigError(name, value, "must be a number in [0, 1) or 'from_model'.", closest(value, ("from_model",)))
        check_share(name, value)


def _check_number(name: str, value: object) -> None:
    if not is_number(value):
        raise PruningConfigError(name, value, "must be a number.")


def _check_weight(name: str, value: object) -> None:
    _check_number(name, value)
    if float(value) < 0:  # type: ignore[arg-type]
        raise PruningConfigError(name, value, "must be 0 or more.")


def _check_regularization(name: str, value: object) -> None:
    if value != "auto":
        if isinstance(value, str):
            raise PruningConfigError(name, value, "must be a number, 0 or more, or 'auto'.", closest(value, ("auto",)))
        _check_weight(name, value)


def _check_positive(name: str, value: object) -> None:
    _check_number(name, value)
    if float(value) <= 0:  # type: ignore[arg-type]
        raise PruningConfigError(name, value, "must be greater than 0.")


def _check_schedule(name: str, value: object) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"polynomial\([1-9]\d{0,8}\)", value)):
        _check_name(name, value, SCHEDULES[:-2] + SCHEDULES[-1:] + ("polynomial(k) with a whole k",))


def _check_frequency(name: str, value: object, unit: str = "steps") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PruningConfigError(name, value, f"must be a whole number of {unit}, 1 or more.")


#: The check of each field that a config and a rule share.
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "target_sparsity": check_share,
    "initial_sparsity": _check_initial,
    "pattern": lambda name, value: parse_pattern(value, name),
    "criterion": partial(_check_name, known=CRITERIA),
    "scope": partial(_check_name, known=SCOPES),
    "reduction": partial(_check_name, known=REDUCTIONS),
    "normalization": partial(_check_name, known=NORMALIZATIONS),
    "regularization": _check_regularization,
    "score_learning_rate": _check_positive,
    "threshold": _check_number,
    "schedule": _check_schedule,
    "warmup_steps": partial(_check_duration, whole=True),
    "warmup_epochs": partial(_check_duration, whole=False),
    "cooldown_steps": partial(_check_duration, whole=True),
    "cooldown_epochs": partial(_check_duration, whole=False),
    "frequency": _check_frequency,
    "updates": partial(_check_frequency, unit="updates"),
    "target_modules": _check_modules,
    "exclude_modules": _check_modules,
    "min_sparsity_per_module": check_share,
    "max_sparsity_per_module": partial(check_share, upper_open=False),
}


def _check_settings(settings: PruningConfig | PruningRule) -> None:
    """Check each field by itself; `None` in a rule means inherited."""
    for name, check in _CHECKS.items():
        if (value := getattr(settings, name)) is not None:
            check(name, value)


def _check_together(config: PruningConfig) -> None:
    """Check fields against each other."""
    target, low, high = config.target_sparsity, config.min_sparsity_per_module, config.max_sparsity_per_module
    if isinstance(config.initial_sparsity, float | int) and config.initial_sparsity > target:
        raise PruningConfigError("initial_sparsity", config.initial_sparsity, f"must not exceed target_sparsity={target}.")
    if low > target:
        raise PruningConfigError("min_sparsity_per_module", low, f"must not exceed target_sparsity={target}.")
    if high < target and config.scope == "global":
        allowed = f"makes target_sparsity={target} unreachable; it must be at least {target}."
        raise PruningConfigError("max_sparsity_per_module", high, allowed)
    if config.pattern is not None and target > (limit := parse_pattern(config.pattern).max_sparsity) + 1e-12:
        raise PruningConfigError("target_sparsity", target, f"pattern {config.pattern!r} allows at most {limit:g}.")
    if config.regularization and config.criterion != "soft_movement":
        allowed = f"belongs to criterion 'soft_movement', not to {config.criterion!r}."
        raise PruningConfigError("regularization", config.regularization, allowed)
    if (config.scope == "threshold") != (config.threshold is not None):
        raise PruningConfigError("threshold", config.threshold, "must be given with scope 'threshold', and only with it.")
    if config.regularization == "auto" and not (config.threshold is not None and 0 < config.threshold < 1):
        allowed = "needs scope 'threshold' and a threshold between 0 and 1, below which σ(S) is brought by the end."
        raise PruningConfigError("regularization", "auto", allowed)
    for name, values, other, others, reason in CONFLICTS:
        value, other_value = getattr(config, name), getattr(config, other)
        form = parse_pattern(other_value).form if other == "pattern" and other_value else other_value
        if value in values and form in others:
            raise PruningConfigError(name, value, f"does not go with {other}={other_value!r}: {reason}.")
    for phase in ("warmup", "cooldown"):
        if getattr(config, f"{phase}_steps") and getattr(config, f"{phase}_epochs"):
            value = getattr(config, f"{phase}_epochs")
            raise PruningConfigError(f"{phase}_epochs", value, f"give {phase}_steps or {phase}_epochs, not both.")


def _with_pairs(given: dict[str, Any]) -> dict[str, Any]:
    """The settings given over others: steps and epochs of a phase replace the other's as a pair, and a frequency `updates`."""
    pairs = [(f"{phase}_steps", f"{phase}_epochs") for phase in ("warmup", "cooldown")]
    replaced: dict[str, Any] = {key: None for pair in pairs if any(key in given for key in pair) for key in pair}
    return replaced | ({"updates": None} if "frequency" in given else {}) | given


# ----------------------------------------------------------------------------------------------------------------- classes


@dataclass
class PruningRule:
    """Settings for the modules it names. A field left at `None` is inherited from the [`PruningConfig`]; see there.

    Several rules may name the same module when their units nest (heads, then 2:4 inside the heads that are left): their masks
    multiply. Two rules at the same level on one module are an error.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    pattern: str | None = None
    target_sparsity: float | None = None
    initial_sparsity: float | str | None = None
    criterion: str | None = None
    reduction: str | None = None
    normalization: str | None = None
    regularization: float | str | None = None
    score_learning_rate: float | None = None
    scope: str | None = None
    threshold: float | None = None
    schedule: str | None = None
    warmup_steps: float | None = None
    warmup_epochs: float | None = None
    cooldown_steps: float | None = None
    cooldown_epochs: float | None = None
    frequency: int | None = None
    updates: int | None = None
    min_sparsity_per_module: float | None = None
    max_sparsity_per_module: float | None = None

    def __post_init__(self) -> None:
        _check_settings(self)


@dataclass
class PruningConfig:
    """How a model is pruned while it trains.

    The settings below hold for the modules in `target_modules` that no rule names; each rule in `rules` overrides them for the
    modules it names. With `pattern=None` only what the rules name is pruned.

    Args:
        target_sparsity: share of zeros in the pruned weights at the end, in [0, 1).
        pattern: what is removed together: `"NxM"`, `"N:M"`, `"1xchannel"`, `"channelx1"`, `"auto"` (blocks by role, as in block
            movement pruning: square tiles as high as a head in attention, rows and columns of neurons in the feed-forward block),
            `"head"`, `"kv_group"` (a key and value head with all the heads that share it), `"neuron"`, `"block"`, `"layer"`.
        criterion: how units are scored, a name in `hf_prune.criteria.CRITERIA`.
        reduction: from elements to unit: `"mean"`, `"sum"`, `"l2"`, `"max"`. The mean makes units of different size comparable.
        normalization: of scores across modules before they are ranked together: `"none"`, or divided by their `"mean"` or `"l2"`
            norm.
        regularization: weight λ of the mean of σ(S) that `criterion="soft_movement"` adds to the loss; it rises with the schedule.
            `"auto"`: λ is steered so that `target_sparsity` of the heads and neurons (or other units) end below `threshold`.
        score_learning_rate: learning rate of movement scores, which Adam trains.
        scope: `"local"`: every module reaches the target; `"global"`: all modules of the rule are ranked together, counted in
            weights; `"threshold"`: units whose score is at most `threshold` go, and `target_sparsity` only shapes the schedule.
        threshold: the score at or below which units go at the end, under `scope="threshold"`; it rises with the schedule.
        schedule: how sparsity rises between warm-up and cool-down, a name in `hf_prune.schedules.SCHEDULES`.
        initial_sparsity: sparsity at the first update; `"from_model"`: the units that are zero already stay so and are counted.
        warmup_steps, warmup_epochs: nothing is pruned before. A steps value below 1 is a ratio of the run, as in transformers.
            Default: a tenth of the run (without its cool-down, where that is given).
        cooldown_steps, cooldown_epochs: at the end, masks are frozen for so long and the model recovers. Default: a third of what
            comes after warm-up.
        frequency: optimizer steps between mask updates. Default: 50, or fewer, so that a short run has 20 updates.
        updates: number of mask updates, spread evenly between warm-up and cool-down, in the place of `frequency`. Default: 5 under
            `schedule="lottery"`, which trains anew after each.
        target_modules: as in PEFT, a regular expression that matches whole module names or a list of names or suffixes.
            Default: every linear layer of the model's body; the output head is left out unless named. Under PEFT names are those of
            the model without adapters.
        exclude_modules: modules left out, in the same form.
        min_sparsity_per_module, max_sparsity_per_module: floor and cap for each module under `scope="global"`. The floor rises with
            the schedule.
        keep_zeros: weights that are zero when training starts stay zero; alone (without `pattern` and `rules`) it lets a sparse
            model be fine-tuned as it is.
        rules: see [`PruningRule`].

    Raises:
        PruningConfigError: a field cannot be used; the message names it, its value, what is allowed and the closest match.
    """

    target_sparsity: float = 0.5
    pattern: str | None = None
    criterion: str = "snip_momentum"
    reduction: str = "mean"
    normalization: str = "none"
    regularization: float | str = 0.0
    score_learning_rate: float = 1e-2
    scope: str = "global"
    threshold: float | None = None
    schedule: str = "cubic"
    initial_sparsity: float | str = 0.0
    warmup_steps: float | None = None
    warmup_epochs: float | None = None
    cooldown_steps: float | None = None
    cooldown_epochs: float | None = None
    frequency: int | None = None
    updates: int | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    min_sparsity_per_module: float = 0.0
    max_sparsity_per_module: float = 0.98
    keep_zeros: bool = False
    rules: list[PruningRule] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.rules, (list, tuple)):
            raise PruningConfigError("rules", self.rules, "must be a list of PruningRule or of dictionaries with its fields.")
        rules = []
        for index, rule in enumerate(self.rules):
            with within(f"rules[{index}]."):
                rules.append(rule if isinstance(rule, PruningRule) else dataclass_from_dict(PruningRule, rule))
        self.rules = rules
        for item in fields(self):
            if item.default is not None and getattr(self, item.name) is None:
                raise PruningConfigError(item.name, None, "must be given; only a rule may leave it out.")
        _check_settings(self)
        if not isinstance(self.keep_zeros, bool):
            raise PruningConfigError("keep_zeros", self.keep_zeros, "must be true or false.")
        if self.pattern is None and not self.rules and not self.keep_zeros:
            raise PruningConfigError("pattern", None, f"must be given unless rules are. It {_PATTERN_HELP}")
        _check_together(self)
        self.resolved_rules()

    def resolved_rules(self) -> dict[str, PruningConfig]:
        """Every rule as a complete config without rules, by a name for messages: first `rules`, then the config's own settings.

        A field that a rule leaves open is taken from the config, warm-up and cool-down as a pair of steps and epochs. A rule that
        names no modules means every module its pattern fits, not those that the config names for itself.

        Raises:
            PruningConfigError: the fields of a rule do not go together.
        """
        resolved = {}
        for index, rule in enumerate(self.rules):
            given = _with_pairs({key: value for key, value in asdict(rule).items() if value is not None})
            with within(f"rules[{index}]."):
                resolved[f"rules[{index}]"] = replace(self, **{"rules": [], "keep_zeros": False, "target_modules": None, **given})
        if self.pattern is not None:
            resolved["config"] = replace(self, rules=[]) if self.rules else self
        return resolved

    # ------------------------------------------------------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what a rule inherits is left out."""
        data = asdict(self)
        data["rules"] = [{key: value for key, value in rule.items() if value is not None} for rule in data["rules"]]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Build from plain data; unknown keys are errors."""
        return dataclass_from_dict(cls, data)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the config to a JSON file."""
        write_text(path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> PruningConfig:
        """Read a config from a JSON file; unknown keys are errors."""
        return dataclass_from_json_file(cls, path)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `pruning_config.json` into a folder, which is made if needed."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / CONFIG_NAME)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> PruningConfig:
        """Read `pruning_config.json` from a folder."""
        return cls.from_json_file(Path(directory) / CONFIG_NAME)


@dataclass
class PruningArguments:
    """[`PruningConfig`] as flat command line arguments beside `TrainingArguments`; rules come from `--pruning_config file.json`."""

    do_prune: bool = field(default=False, metadata={"help": "Prune the model while it trains."})
    pruning_config: str | None = field(
        default=None,
        metadata={"help": "A JSON file with a PruningConfig, rules included; arguments given beside it win over it."},
    )
    pruning_pattern: str | None = field(
        default=None, metadata={"help": "NxM (4x1), N:M (2:4), 1xchannel, channelx1, auto, head, kv_group, neuron, block or layer."}
    )
    target_sparsity: float | None = field(default=None, metadata={"help": "Share of zeros at the end, in [0, 1)."})
    initial_sparsity: float | None = field(default=None, metadata={"help": "Share of zeros at the first update."})
    pruning_criterion: str | None = field(default=None, metadata={"help": f"One of {', '.join(sorted(CRITERIA))}."})
    pruning_scope: str | None = field(default=None, metadata={"help": f"One of {', '.join(SCOPES)}."})
    pruning_schedule: str | None = field(default=None, metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    pruning_frequency: int | None = field(
        default=None, metadata={"help": "Optimizer steps between mask updates; by default 50, or fewer in a short run."}
    )
    pruning_warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps before pruning starts; below 1, a ratio of the run; by default a tenth of it."}
    )
    pruning_warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs before pruning starts.", "aliases": ["--sparsity_warm_epochs"]}
    )
    pruning_cooldown_steps: float | None = field(
        default=None, metadata={"help": "Steps at the end with frozen masks; below 1, a ratio of the run; by default 0.3."}
    )
    pruning_cooldown_epochs: float | None = field(
        default=None, metadata={"help": "Epochs at the end with frozen masks.", "aliases": ["--cooldown_epochs"]}
    )
    pruning_target_modules: str | None = field(
        default=None, metadata={"help": "Regular expression that matches whole module names."}
    )
    pruning_exclude_modules: str | None = field(default=None, metadata={"help": "Modules left out, in the same form."})
    min_sparsity_per_module: float | None = field(default=None, metadata={"help": "Floor per module under global scope."})
    max_sparsity_per_module: float | None = field(default=None, metadata={"help": "Cap per module under global scope."})

    def to_config(self) -> PruningConfig | None:
        """The config these arguments describe, or None when pruning was not asked for.

        Raises:
            PruningConfigError: a value cannot be used, or pruning arguments were given without `--do_prune`.
        """
        given = {
            name.removeprefix("pruning_"): value
            for name, value in asdict(self).items()
            if value is not None and name not in ("do_prune", "pruning_config")
        }
        if not self.do_prune:
            if given or self.pruning_config:
                name = next(iter(given), "pruning_config")
                raise PruningConfigError("do_prune", False, f"must be set, since {name} was given.")
            return None
        data = PruningConfig.from_json_file(self.pruning_config).to_dict() if self.pruning_config else {}
        return PruningConfig.from_dict({**data, **_with_pairs(given)})
