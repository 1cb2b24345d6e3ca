"""What to prune, how much, how and when: `PruningConfig` and its `PruningRule`s.

Plain dataclasses with JSON in and out. Everything that can be checked without a model is checked on construction; what needs
the model (names that match nothing, targets that caps make unreachable, a run that is too short) is checked by `Pruner` before
the first step. This module imports neither torch nor transformers: it knows the names of patterns, criteria and schedules only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_text
from .checks import (
    SCHEDULES,
    check_count,
    check_duration,
    check_flag,
    check_initial,
    check_modules,
    check_number,
    check_positive,
    check_regularization,
    check_schedule,
    check_share,
    check_speedup,
    check_target,
    check_text,
    dataclass_from_dict,
    dataclass_from_json_file,
    fields_checked,
)
from .errors import ConfigError, within
from .fields import check_fields, documented, open_fields, setting
from .patterns import FORMS, Pattern, check_pattern, parse_pattern

CONFIG_NAME = "pruning_config.json"
#: Criteria, by name; the classes are in `pruning/criteria`.
CRITERIA: set[str] = {
    "auto",
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
    "obs",
    "flap",
    "kprune",
    "block_influence",
    "removal",
    "greedy_removal",
}
#: What criteria declare that other settings have to fit, attributes of `Criterion` → the names of those of which it is true.
DECLARED: dict[str, set[str]] = {
    "scores_rows": {"fpgm", "apoz", "mean_activation"},
    "regrows": {"movement", "soft_movement"},
    "scores_layers": {"block_influence"},
    "scores_absences": {"removal", "greedy_removal"},
    "regularizes": {"soft_movement"},
    "scores_inputs": {"obs", "flap", "kprune"},
    "scores_columns": {"flap", "kprune"},
}
#: Updates, by name; the functions are in `pruning/updates.py`.
UPDATES: set[str] = {"auto", "zero", "bias", "least_squares", "obs", "sparsegpt"}
#: What `"auto"` stands for: in a `Pruner`, while a model trains, and in `prune()`.
WHILE_TRAINING: dict[str, str] = {"criterion": "snip_momentum", "update": "zero"}
WITHOUT_TRAINING: dict[str, str] = {"criterion": "obs", "update": "least_squares"}
SCOPES: tuple[str, ...] = ("row", "local", "global", "threshold")
#: Those under which every module reaches the target by itself.
LOCAL_SCOPES: frozenset[str] = frozenset({"row", "local"})
#: `target_sparsity` where nothing else is the target.
DEFAULT_SPARSITY = 0.5
#: Targets in what the whole model costs.
COST_TARGETS: tuple[str, ...] = ("target_speedup", "target_parameters", "target_flops", "target_bytes")
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "l2", "max")
NORMALIZATIONS: tuple[str, ...] = ("none", "mean", "l2")

#: Settings that do not go together: (field, its values, other field, the values it does not go with, reason).
CONFLICTS: tuple[tuple[str, Set[str], str, Set[str], str], ...] = (
    (
        "criterion",
        DECLARED["scores_rows"],
        "pattern",
        frozenset({"NxM", "N:M", "channelx1", "auto", "block", "layer"}),
        "scores output rows, so it needs a pattern whose units own some: 1xchannel, head, kv_group or neuron",
    ),
    (
        "criterion",
        DECLARED["scores_inputs"],
        "pattern",
        frozenset({"1xchannel", "auto", "block", "layer"}),
        "scores inputs by what the others can make up for, so it needs a pattern whose units leave through inputs of one weight",
    ),
    (
        "criterion",
        DECLARED["scores_columns"],
        "pattern",
        frozenset({"NxM", "N:M"}),
        "scores inputs of a layer, so it needs a pattern whose units hold whole ones: head, kv_group, neuron or channelx1",
    ),
    (
        "criterion",
        DECLARED["scores_layers"],
        "pattern",
        frozenset({"NxM", "N:M", "1xchannel", "channelx1", "auto", "head", "kv_group", "neuron", "block"}),
        "scores layers as a whole, so it needs pattern 'layer'",
    ),
    (
        "criterion",
        DECLARED["scores_absences"],
        "pattern",
        frozenset({"NxM", "N:M", "1xchannel", "channelx1", "auto", "neuron"}),
        "tries out what the model loses without each unit, so it needs a pattern with few of them: head, kv_group, block or layer",
    ),
    (
        "scope",
        frozenset({"row"}),
        "pattern",
        frozenset({"1xchannel", "channelx1", "auto", "head", "kv_group", "neuron", "block", "layer"}),
        "compares what lies in one output row, so it needs a pattern with several units in each: NxM or N:M",
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
        DECLARED["regrows"],
        "lets weights come back, which a rewind to earlier values contradicts",
    ),
)


_check_kept = partial(check_target, one=check_positive, rises=False)

# ----------------------------------------------------------------------------------------------------------------- classes


@dataclass
class PruningSettings:
    """What a [`PruningConfig`] and its [`PruningRule`]s have in common."""

    target_sparsity: float | None = setting(
        None,
        "Share of zeros in the pruned weights at the end, in [0, 1); 0.5 unless the config has another target. Rules without a "
        "target of their own share the config's: under scope 'global' their units are ranked together, and the share is of all "
        "their weights.",
        check_share,
    )
    pattern: str | None = setting(None, f"What is removed together: {FORMS}.", check_pattern)
    criterion: str = setting(
        "auto", "How units are scored; 'auto' is 'snip_momentum' while training and 'obs' in `prune()`.", choices=CRITERIA
    )
    reduction: str = setting(
        "mean",
        "How scores of elements become the score of a unit; the mean makes units of different sizes comparable.",
        choices=REDUCTIONS,
    )
    normalization: str = setting(
        "none",
        "What the scores of a module are divided by before modules are ranked together: nothing, their mean or their L2 norm.",
        choices=NORMALIZATIONS,
    )
    regularization: float | str = setting(
        0.0,
        "Weight λ of the mean of σ(S) that criterion 'soft_movement' adds to the loss; it rises with the schedule. 'auto': λ is "
        "steered so that target_sparsity of the heads and neurons (or other units) end below threshold.",
        check_regularization,
    )
    score_learning_rate: float = setting(1e-2, "Learning rate of movement scores, which Adam trains.", check_positive)
    scope: str = setting(
        "global",
        "'local': every module reaches the target; 'row': so does every output row of its weight; "
        "'global': all modules of the rule are ranked together, counted in weights; "
        "'threshold': units whose score is at most threshold are removed, and target_sparsity only shapes the schedule.",
        choices=SCOPES,
    )
    threshold: float | None = setting(
        None,
        "The score at or below which units are removed at the end, under scope 'threshold'; it rises with the schedule.",
        check_number,
    )
    update: str = setting(
        "auto",
        "How the remaining weights are updated when others are removed; 'zero': not at all, training recovers the loss. 'auto' is "
        "'zero' while training and 'least_squares' in `prune()`.",
        choices=UPDATES,
    )
    schedule: str = setting(
        "cubic", f"How sparsity rises between warm-up and cool-down. One of {', '.join(SCHEDULES)}.", check_schedule
    )
    initial_sparsity: float | str = setting(
        0.0,
        "Sparsity at the first update; 'from_model': the units that are zero already stay so and are counted.",
        check_initial,
    )
    warmup_steps: float | None = setting(
        None,
        "Optimizer steps before pruning starts; below 1, a ratio of the run, as in transformers. By default a tenth of the run "
        "(without its cool-down, where that is given).",
        partial(check_duration, whole=True),
    )
    warmup_epochs: float | None = setting(
        None, "Epochs before pruning starts, instead of warmup_steps.", partial(check_duration, whole=False)
    )
    cooldown_steps: float | None = setting(
        None,
        "Optimizer steps at the end with frozen masks, in which the model recovers; below 1, a ratio of the run. By default a "
        "third of what comes after warm-up. A family shares them out over its targets.",
        partial(check_duration, whole=True),
    )
    cooldown_epochs: float | None = setting(
        None, "Epochs at the end with frozen masks, instead of cooldown_steps.", partial(check_duration, whole=False)
    )
    frequency: int | None = setting(
        None, "Optimizer steps between mask updates. By default 50, or fewer, so that a short run has 20 updates.", check_count
    )
    updates: int | None = setting(
        None,
        "Number of mask updates, spread evenly between warm-up and cool-down, instead of a frequency. By default 5 under "
        "schedule 'lottery', which trains anew after each. A family shares them out over its targets.",
        partial(check_count, unit="updates"),
    )
    target_modules: str | list[str] | None = setting(
        None,
        "As in PEFT, a regular expression that matches whole module names, or a list of names or suffixes. By default every linear "
        "layer of the model's body; the output head is left out unless named. Under PEFT names are those of the model without "
        "adapters.",
        check_modules,
    )
    exclude_modules: str | list[str] | None = setting(None, "Modules left out, in the same form.", check_modules)
    min_sparsity_per_module: float = setting(
        0.0, "Floor for each module under scope 'global'; it rises with the schedule.", check_share
    )
    max_sparsity_per_module: float = setting(
        0.98, "Cap for each module under scope 'global'.", partial(check_share, upper_open=False)
    )

    def __post_init__(self) -> None:
        check_fields(self)


@documented
@fields_checked
@open_fields
class PruningRule(PruningSettings):
    """Settings for the modules it names. A field that is None, as all are by default, is inherited from the [`PruningConfig`].

    Several rules may name the same module when their units nest (heads, then 2:4 inside the heads that are left): their masks
    multiply. Two rules at the same level on one module are an error.

    Raises:
        ConfigError: a field cannot be used; the message names it, its value, what is allowed and the closest match.
    """


@documented
@fields_checked
@dataclass
class PruningConfig(PruningSettings):
    """How a model is pruned while it trains.

    The settings below hold for the modules in `target_modules` that no rule names; each rule in `rules` overrides them for the
    modules it names. With `pattern=None` only what the rules name is pruned.

    Raises:
        ConfigError: a field cannot be used; the message names it, its value, what is allowed and the closest match.
    """

    target_speedup: float | list[float] | None = setting(
        None,
        "How many times faster than now the whole model shall be, by the latency table; instead of target_sparsity. A list makes "
        "a family in one run: the model is pruned to one after the other, and at each a condensed copy is saved.",
        partial(check_target, one=check_speedup, rises=True),
    )
    target_parameters: float | list[float] | None = setting(
        None,
        "How many parameters the whole model shall keep at most, embeddings and heads included; below 1, which share of them. "
        "Instead of target_sparsity. A list makes a family.",
        _check_kept,
    )
    target_flops: float | list[float] | None = setting(
        None,
        "How many floating point operations one row shall take at most, a row of latency_length tokens; below 1, which share of "
        "them. Instead of target_sparsity. A list makes a family.",
        _check_kept,
    )
    target_bytes: float | list[float] | None = setting(
        None,
        "How many bytes the parameters of the whole model shall take at most; below 1, which share of them. Instead of "
        "target_sparsity. A list makes a family.",
        _check_kept,
    )
    latency_table: str | None = setting(
        None,
        "A file with what the blocks cost on the machine that the model is for, as `hf-prune latency` writes it; by default they "
        "are measured here, in batches of latency_batch_size rows of latency_length tokens.",
        check_text,
    )
    latency_batch_size: int = setting(8, "Rows of a batch for which speed is measured.", partial(check_count, unit="rows"))
    latency_length: int = setting(
        128, "Tokens of a row for which speed is measured and operations are counted.", partial(check_count, unit="tokens")
    )
    keep_zeros: bool = setting(
        False,
        "Weights that are zero when training starts stay zero; alone (without pattern and rules) it lets a sparse model be "
        "fine-tuned as it is.",
        check_flag,
    )
    rules: list[PruningRule] = field(
        default_factory=list,
        metadata={
            "help": "Settings that override these for the modules that they name, each a [`PruningRule`].",
            "not_flat": "each rule has settings of its own; they are given in the file of --pruning_config",
        },
    )

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
        super().__post_init__()
        if self.pattern is None and not self.rules and not self.keep_zeros:
            raise ConfigError("pattern", None, f"must be given unless rules are. It must be {FORMS}.")
        _check_together(self)
        self.resolved_rules()

    @property
    def cost_target(self) -> str | None:
        """The field of the target in what the whole model costs, or None where target_sparsity is the target.

        Raises:
            ConfigError: there are two targets.
        """
        given = [name for name in ("target_sparsity", *COST_TARGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(given[1], getattr(self, given[1]), f"is a second target beside {given[0]}; give one of them.")
        return given[0] if given and given[0] in COST_TARGETS else None

    @property
    def cost_targets(self) -> list[float]:
        """The values of the target in costs, in the order in which they are reached; none where target_sparsity is the target."""
        value = None if self.cost_target is None else getattr(self, self.cost_target)
        return value if isinstance(value, list) else [] if value is None else [value]

    @property
    def is_family(self) -> bool:
        """Whether the target is a list, so that one run makes several models."""
        return self.cost_target is not None and isinstance(getattr(self, self.cost_target), list)

    @property
    def sparsity(self) -> float:
        """`target_sparsity` as a number: its default where nothing else is given, 0 where costs are the target."""
        return self._default or 0.0

    @property
    def requested(self) -> str:
        """The target in words, `field=value`."""
        name = self.cost_target
        return f"target_sparsity={self.sparsity}" if name is None else f"{name}={getattr(self, name)}"

    @property
    def units(self) -> Pattern:
        """The pattern as a value.

        Raises:
            ConfigError: there is none, only rules have.
        """
        return parse_pattern(self.pattern)

    def filled(self, **choices: str) -> PruningConfig:
        """The config with nothing left to defaults: `"auto"` replaced by the choices of the driver (the Trainer's callback or
        `prune()`), in rules too, and `target_sparsity` by what it is where nothing else is the target.

        Raises:
            ConfigError: a choice does not fit the other settings.
        """

        def missing(settings: PruningSettings) -> dict[str, str]:
            return {name: choice for name, choice in choices.items() if getattr(settings, name) == "auto"}

        rules = [replace(rule, **missing(rule)) for rule in self.rules]  # type: ignore[arg-type]
        return replace(self, rules=rules, target_sparsity=self._default, **missing(self))  # type: ignore[arg-type]

    def resolved_rules(self) -> dict[str, PruningConfig]:
        """Every rule as a complete config without rules, by a name for messages: first `rules`, then the config's own settings.

        A field that a rule leaves open is taken from the config, warm-up and cool-down as a pair of steps and epochs. A rule that
        names no modules means every module its pattern fits, not those that the config names for itself.

        Raises:
            ConfigError: the fields of a rule do not go together.
        """
        resolved = {}
        for index, rule in enumerate(self.rules):
            given = with_pairs({key: value for key, value in asdict(rule).items() if value is not None})
            inherited: dict[str, Any] = {"rules": [], "keep_zeros": False, "target_modules": None, "target_sparsity": self._default}
            with within(f"rules[{index}]."):
                resolved[f"rules[{index}]"] = replace(self, **inherited | given)
        if self.pattern is not None:
            is_complete = not self.rules and self.target_sparsity == self._default
            resolved["config"] = self if is_complete else replace(self, rules=[], target_sparsity=self._default)
        return resolved

    @property
    def _default(self) -> float | None:
        """`target_sparsity`, or its default where that is the target."""
        return DEFAULT_SPARSITY if self.cost_target is None and self.target_sparsity is None else self.target_sparsity

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


# ------------------------------------------------------------------------------------------------------- fields together


def _check_together(config: PruningConfig) -> None:
    """Check fields against each other."""
    _check_cost_target(config)
    target = config.sparsity if config.cost_target is None else 1.0
    low, high = config.min_sparsity_per_module, config.max_sparsity_per_module
    if isinstance(config.initial_sparsity, float | int) and config.initial_sparsity > target:
        raise ConfigError("initial_sparsity", config.initial_sparsity, f"must not exceed target_sparsity={target}.")
    if low > target:
        raise ConfigError("min_sparsity_per_module", low, f"must not exceed target_sparsity={target}.")
    if config.target_sparsity is not None and high < target and config.scope == "global":
        allowed = f"makes target_sparsity={target} unreachable; it must be at least {target}."
        raise ConfigError("max_sparsity_per_module", high, allowed)
    if config.pattern is not None and config.sparsity > (limit := config.units.max_sparsity) + 1e-12:
        raise ConfigError("target_sparsity", target, f"pattern {config.pattern!r} allows at most {limit:g}.")
    if config.regularization and config.criterion not in DECLARED["regularizes"]:
        known = " or ".join(repr(name) for name in sorted(DECLARED["regularizes"]))
        allowed = f"belongs to criterion {known}, not to {config.criterion!r}."
        raise ConfigError("regularization", config.regularization, allowed)
    if (config.scope == "threshold") != (config.threshold is not None):
        raise ConfigError("threshold", config.threshold, "must be given with scope 'threshold', and only with it.")
    if config.regularization == "auto" and not (config.threshold is not None and 0 < config.threshold < 1):
        allowed = "needs scope 'threshold' and a threshold between 0 and 1, below which σ(S) is brought by the end."
        raise ConfigError("regularization", "auto", allowed)
    if config.update not in ("auto", "zero") and (config.schedule == "lottery" or config.criterion in DECLARED["regrows"]):
        allowed = "makes removal final; lottery schedules and movement bring weights back, so they need 'zero'."
        raise ConfigError("update", config.update, allowed)
    for name, values, other, others, reason in CONFLICTS:
        value, other_value = getattr(config, name), getattr(config, other)
        form = config.units.form if other == "pattern" and other_value else other_value
        if value in values and form in others:
            raise ConfigError(name, value, f"does not go with {other}={other_value!r}: {reason}.")
    for phase in ("warmup", "cooldown"):
        if getattr(config, f"{phase}_steps") and getattr(config, f"{phase}_epochs"):
            value = getattr(config, f"{phase}_epochs")
            raise ConfigError(f"{phase}_epochs", value, f"give {phase}_steps or {phase}_epochs, not both.")


def _check_cost_target(config: PruningConfig) -> None:
    """Check what goes with a target in costs, or with none."""
    name = config.cost_target
    if config.latency_table is not None and name != "target_speedup":
        raise ConfigError("latency_table", config.latency_table, "is for target_speedup; give that, or leave the table out.")
    if name is None:
        return
    if config.scope != "global":
        raise ConfigError(name, getattr(config, name), f"is one budget for all modules, not with scope {config.scope!r}.")
    if config.pattern is not None and not config.units.is_structural:
        allowed = f"needs units that make the model smaller, such as head and neuron, not pattern {config.pattern!r}."
        raise ConfigError(name, getattr(config, name), allowed)
    if isinstance(config.initial_sparsity, float | int) and config.initial_sparsity:
        raise ConfigError("initial_sparsity", config.initial_sparsity, f"does not go with {name}; give 0 or 'from_model'.")


def with_pairs(given: dict[str, Any]) -> dict[str, Any]:
    """The settings given over others: steps and epochs of a phase replace the other's as a pair, a frequency `updates`, and a
    target all other targets and the latency table of another."""
    pairs = [(f"{phase}_steps", f"{phase}_epochs") for phase in ("warmup", "cooldown")]
    replaced: dict[str, Any] = {key: None for pair in pairs if any(key in given for key in pair) for key in pair}
    targets = ("target_sparsity", *COST_TARGETS)
    if any(given.get(name) is not None for name in targets):
        replaced |= dict.fromkeys(targets if given.get("target_speedup") is not None else (*targets, "latency_table"))
    return replaced | ({"updates": None} if "frequency" in given else {}) | given
