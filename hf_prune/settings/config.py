"""What to prune, how much, how and when: `PruningConfig` and its `PruningRule`s.

Plain dataclasses with JSON in and out. Everything that can be checked without a model is checked on construction; what needs
the model (names that match nothing, targets that caps make unreachable, a run that is too short) is checked by `Pruner` before
the first step. This module imports neither torch nor transformers: it knows the names of patterns, criteria and schedules only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_text
from .checks import (
    _check_duration,
    _check_frequency,
    _check_initial,
    _check_modules,
    _check_name,
    _check_number,
    _check_positive,
    _check_regularization,
    _check_schedule,
    check_share,
    dataclass_from_dict,
    dataclass_from_json_file,
)
from .errors import ConfigError, within
from .patterns import _PATTERN_HELP, parse_pattern

CONFIG_NAME = "pruning_config.json"
#: Criteria, by name; the classes are in `pruning/criteria`.
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
#: Criteria that score output rows, so that they need units that own some.
ROW_CRITERIA: set[str] = {"fpgm", "apoz", "mean_activation"}
#: Updates, by name; the functions are in `pruning/updates.py`.
UPDATES: set[str] = {"zero"}
SCOPES: tuple[str, ...] = ("local", "global", "threshold")
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "l2", "max")
NORMALIZATIONS: tuple[str, ...] = ("none", "mean", "l2")

#: Settings that make no sense together: (field, its values, other field, the values it does not go with, reason).
CONFLICTS: tuple[tuple[str, Set[str], str, Set[str], str], ...] = (
    (
        "criterion",
        ROW_CRITERIA,
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
    "update": partial(_check_name, known=UPDATES),
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
        raise ConfigError("initial_sparsity", config.initial_sparsity, f"must not exceed target_sparsity={target}.")
    if low > target:
        raise ConfigError("min_sparsity_per_module", low, f"must not exceed target_sparsity={target}.")
    if high < target and config.scope == "global":
        allowed = f"makes target_sparsity={target} unreachable; it must be at least {target}."
        raise ConfigError("max_sparsity_per_module", high, allowed)
    if config.pattern is not None and target > (limit := parse_pattern(config.pattern).max_sparsity) + 1e-12:
        raise ConfigError("target_sparsity", target, f"pattern {config.pattern!r} allows at most {limit:g}.")
    if config.regularization and config.criterion != "soft_movement":
        allowed = f"belongs to criterion 'soft_movement', not to {config.criterion!r}."
        raise ConfigError("regularization", config.regularization, allowed)
    if (config.scope == "threshold") != (config.threshold is not None):
        raise ConfigError("threshold", config.threshold, "must be given with scope 'threshold', and only with it.")
    if config.regularization == "auto" and not (config.threshold is not None and 0 < config.threshold < 1):
        allowed = "needs scope 'threshold' and a threshold between 0 and 1, below which σ(S) is brought by the end."
        raise ConfigError("regularization", "auto", allowed)
    if config.update != "zero" and (config.schedule == "lottery" or config.criterion in ("movement", "soft_movement")):
        allowed = "makes up for what goes once and for all; lottery schedules and movement bring weights back, so they take 'zero'."
        raise ConfigError("update", config.update, allowed)
    for name, values, other, others, reason in CONFLICTS:
        value, other_value = getattr(config, name), getattr(config, other)
        form = parse_pattern(other_value).form if other == "pattern" and other_value else other_value
        if value in values and form in others:
            raise ConfigError(name, value, f"does not go with {other}={other_value!r}: {reason}.")
    for phase in ("warmup", "cooldown"):
        if getattr(config, f"{phase}_steps") and getattr(config, f"{phase}_epochs"):
            value = getattr(config, f"{phase}_epochs")
            raise ConfigError(f"{phase}_epochs", value, f"give {phase}_steps or {phase}_epochs, not both.")


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
    update: str | None = None
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
        target_sparsity: share of zeros in the pruned weights at the end, in [0, 1). Rules without a target of their own share it:
            under `scope="global"` their units are ranked together, and the share is of all their weights.
        pattern: what is removed together: `"NxM"`, `"N:M"`, `"1xchannel"`, `"channelx1"`, `"auto"` (blocks by role, as in block
            movement pruning: square tiles as high as a head in attention, rows and columns of neurons in the feed-forward block),
            `"head"`, `"kv_group"` (a key and value head with all the heads that share it), `"neuron"`, `"block"`, `"layer"`.
        criterion: how units are scored, a name in `hf_prune.pruning.criteria.CRITERIA`.
        reduction: from elements to unit: `"mean"`, `"sum"`, `"l2"`, `"max"`. The mean makes units of different size comparable.
        normalization: of scores across modules before they are ranked together: `"none"`, or divided by their `"mean"` or `"l2"`
            norm.
        regularization: weight λ of the mean of σ(S) that `criterion="soft_movement"` adds to the loss; it rises with the schedule.
            `"auto"`: λ is steered so that `target_sparsity` of the heads and neurons (or other units) end below `threshold`.
        score_learning_rate: learning rate of movement scores, which Adam trains.
        scope: `"local"`: every module reaches the target; `"global"`: all modules of the rule are ranked together, counted in
            weights; `"threshold"`: units whose score is at most `threshold` go, and `target_sparsity` only shapes the schedule.
        threshold: the score at or below which units go at the end, under `scope="threshold"`; it rises with the schedule.
        update: what the weights that stay do when others go, a name in `hf_prune.pruning.updates.UPDATES`; `"zero"`: nothing,
            training repairs what is lost.
        schedule: how sparsity rises between warm-up and cool-down, a name in `hf_prune.pruning.schedules.SCHEDULES`.
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
        ConfigError: a field cannot be used; the message names it, its value, what is allowed and the closest match.
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
    update: str = "zero"
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
            raise ConfigError("rules", self.rules, "must be a list of PruningRule or of dictionaries with its fields.")
        rules = []
        for index, rule in enumerate(self.rules):
            with within(f"rules[{index}]."):
                rules.append(rule if isinstance(rule, PruningRule) else dataclass_from_dict(PruningRule, rule))
        self.rules = rules
        for item in fields(self):
            if item.default is not None and getattr(self, item.name) is None:
                raise ConfigError(item.name, None, "must be given; only a rule may leave it out.")
        _check_settings(self)
        if not isinstance(self.keep_zeros, bool):
            raise ConfigError("keep_zeros", self.keep_zeros, "must be true or false.")
        if self.pattern is None and not self.rules and not self.keep_zeros:
            raise ConfigError("pattern", None, f"must be given unless rules are. It {_PATTERN_HELP}")
        _check_together(self)
        self.resolved_rules()

    def resolved_rules(self) -> dict[str, PruningConfig]:
        """Every rule as a complete config without rules, by a name for messages: first `rules`, then the config's own settings.

        A field that a rule leaves open is taken from the config, warm-up and cool-down as a pair of steps and epochs. A rule that
        names no modules means every module its pattern fits, not those that the config names for itself.

        Raises:
            ConfigError: the fields of a rule do not go together.
        """
        resolved = {}
        for index, rule in enumerate(self.rules):
            given = _with_pairs({key: value for key, value in asdict(rule).items() if value is not None})
            with within(f"rules[{index}]."):
                resolved[f"rules[{index}]"] = replace(self, **{"rules": [], "keep_zeros": False, "target_modules": None, **given})
        if self.pattern is not None:
            resolved["config"] = replace(self, rules=[]) if self.rules else self
        return resolved

    def open_rules(self) -> set[str]:
        """The names of the rules that have no target of their own and share that of the config."""
        own = {f"rules[{index}]" for index, rule in enumerate(self.rules) if rule.target_sparsity is not None}
        return set(self.resolved_rules()) - own

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
