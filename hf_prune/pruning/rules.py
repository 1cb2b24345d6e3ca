"""Matching a config to a model and a run: which units each rule prunes and when. Everything is checked before the first step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..condense.infer import learn_architecture
from ..model import Block, find_blocks
from ..model.families.refused import HEADS_STAY
from ..model.sharding import is_sharded, is_tensor_parallel
from ..model.targets import Target, body_prefixes, check_names, names_module, selector, weights
from ..model.units import UnitGroup
from ..model.wrappers import transformers_models
from ..settings.config import LOCAL_SCOPES, PruningConfig, with_pairs
from ..settings.errors import ConfigError
from ..settings.patterns import Pattern
from .allocation import least_removed, most_removable
from .costs import WEIGHTS, Costs, model_costs
from .criteria import CRITERIA, Criterion
from .patterns import build_groups
from .reconstruction import Moments
from .schedules import Stages, Timeline, phases, spacing, stages
from .statistics import Activations
from .updates import UPDATES, Update

#: With fewer mask updates than this, sparsity rises too abruptly.
_FEW_UPDATES = 3

#: The settings in which rules that share a target in costs agree: how scores compare, and when masks change.
_OF_A_BUDGET = (
    *("criterion", "reduction", "normalization", "update", "schedule", "frequency", "updates"),
    *(f"{phase}_{unit}" for phase in ("warmup", "cooldown") for unit in ("steps", "epochs")),
)

#: Warn if rounding to whole units misses the requested share by more than this.
_NOTICEABLE = 0.005


@dataclass
class Rule:
    """A rule matched to a model, with its state.

    Attributes:
        name: `"rules[0]"` and so on, or `"config"` for the config's own settings.
        settings: a complete config without rules.
        pattern: what is removed together.
        is_open: whether it has no target of its own and shares that of the config.
        groups: the units it ranks.
        criterion: how it scores them.
        seen: the activation statistics that its criterion and its update read.
        timeline: when its masks change, and to what sparsity.
        costs: of what its target is a share.
        kept: the remaining units, bool `[units]` for each group.
        removed_any: whether any unit is removed, so that there is something to mask.
    """

    name: str
    settings: PruningConfig
    pattern: Pattern
    is_open: bool
    groups: list[UnitGroup]
    criterion: Criterion
    seen: Activations
    timeline: Timeline | Stages
    costs: Costs = WEIGHTS
    kept: list[Tensor] = field(default_factory=list)
    removed_any: bool = False

    def keep(self, kept: list[Tensor]) -> None:
        """Set the remaining units."""
        self.kept = kept
        self.removed_any = not all(bool(keep.all()) for keep in kept)

    def summary(self) -> str:
        """Pattern, target, steps and number of updates, in words."""
        updates, settings = self.timeline.updates, self.settings
        target = f"scores up to {settings.threshold:g}" if settings.scope == "threshold" else f"{settings.sparsity:.2%}"
        when = f"from step {updates[0]} to {updates[-1]} in {len(updates)} updates" if updates else "never"
        return f"{self.pattern} {target}, {when}"

    @property
    def concerns(self) -> list[str]:
        """Warnings about settings that are allowed but perhaps not intended: abrupt schedules, targets that rounding misses."""
        settings, found = self.settings, []
        for start, end in pairwise((0, *self.timeline.ends)):
            found += self._concerns_of([step for step in self.timeline.updates if start < step <= end], end)
        for group in self.groups if settings.scope == "global" else ():
            number, floor = group.num_units, settings.min_sparsity_per_module
            gone = least_removed(group, floor)
            if floor - gone / number > _NOTICEABLE:
                found.append(
                    f"{self.name}: min_sparsity_per_module={floor} rounds to {gone} of the {number} units of {group.name}; the "
                    f"nearest possible values are {gone / number:.4g} and {(gone + 1) / number:.4g}."
                )
        for group in self.groups if settings.scope in LOCAL_SCOPES else ():
            number, target = group.num_units, settings.sparsity
            if target and round(target * number) == 0:
                found.append(
                    f"{self.name}: target_sparsity={target} rounds to none of the {number} units of {group.name}; the smallest "
                    f"possible value above 0 is {1 / number:.4g}."
                )
        return found

    def _concerns_of(self, updates: list[int], end: int) -> list[str]:
        """Warnings about the mask updates of a stage that ends after step `end`."""
        settings, found = self.settings, []
        few = min(_FEW_UPDATES, -(-settings.updates // len(self.timeline.ends)) if settings.updates else _FEW_UPDATES)
        if updates and settings.schedule != "constant" and len(updates) < few:
            given = f"updates={settings.updates}" if settings.updates else f"frequency={settings.frequency}"
            found.append(
                f"{self.name}: {given} makes {len(updates)} mask update{'s' * (len(updates) > 1)} (at step "
                f"{', '.join(map(str, updates))} of {end}), so each removes a lot at once; more and smaller updates harm a model "
                "less. Prune more often, or train longer."
            )
        if updates and updates[-1] >= end:
            found.append(
                f"{self.name}: the last mask update is after the last of {end} steps, so no step is left for the model to recover. "
                "Give cooldown_steps, or train longer."
            )
        return found

    @property
    def removed(self) -> list[Tensor]:
        """The units that cannot come back, bool `[units]` for each group."""
        return [torch.zeros_like(kept) if self.criterion.regrows else ~kept for kept in self.kept]

    def apply(self, gradients: bool = False) -> None:
        """Zero what is masked, in the parameters or in their gradients."""
        if self.removed_any:
            for group, kept in zip(self.groups, self.kept):
                group.apply(kept, gradients)

    @property
    def update(self) -> Update:
        """How the remaining weights are updated when units are removed."""
        return UPDATES[self.settings.update]

    def compensate(self, before: list[Tensor], after: list[Tensor]) -> None:
        """Let the weights by which units leave their block make up for those that go now.

        Where a unit owns whole rows there is nothing left to make up for it; that is done where its columns are.
        """
        for group, was, stays in zip(self.groups, before, after):
            for view in group.weights if bool((was & ~stays).any()) else ():
                if view.owns_rows:
                    continue
                weight = view.target.weight()
                precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
                moments = None
                if self.update.reads_second_moments:
                    moments = Moments.of(precise, self.seen.mean("second_moments", view.target))
                changed = self.update.compute(precise, moments, ~view.spread(stays)).to(weight.dtype)
                view.target.parameter.copy_(view.target.from_matrix(changed))

    @property
    def targets(self) -> list[Target]:
        """The weights and biases that the rule masks."""
        return [view.target for group in self.groups for view in (*group.weights, *group.biases)]

    @property
    def weight_names(self) -> list[str]:
        """The names of the weights that the rule prunes, each once."""
        return list(dict.fromkeys(view.target.name for group in self.groups for view in group.weights))


def match_rules(
    model: nn.Module,
    config: PruningConfig,
    total_steps: int,
    steps_per_epoch: float | None,
    layer_by_layer: bool = False,
    costs: Mapping[str, Tensor] | None = None,
) -> tuple[list[Rule], dict[str, str]]:
    """Match a config's rules to the model and the run.

    Args:
        model: the model.
        config: the config.
        total_steps, steps_per_epoch: of the run.
        costs: see [`Pruner`].
        layer_by_layer: the driver takes second moments itself, of one layer at a time, so that the rules collect none.

    Returns:
        The rules, and what is left out: module or block name → reason.

    Raises:
        ConfigError: the config does not fit the model or the run.
    """
    known_weights = list(weights(model))
    modules = {weight.name: weight.module for weight in known_weights if not weight.left_out}
    others = {weight.name: weight.left_out for weight in known_weights if weight.left_out}
    if not modules:
        raise ConfigError("model", type(model).__name__, "has no linear or convolutional layer to prune.")
    resolved, open_rules = config.resolved_rules(), config.open_rules()
    patterns = {name: settings.units for name, settings in resolved.items()}
    structural = any(pattern.is_structural for pattern in patterns.values())
    if structural:
        learn_architecture(model)
    blocks = find_blocks(model) if structural else []
    body = body_prefixes(model)
    known = [*modules, *others, *(block.name for block in blocks)]
    model_type = next((str(inside.config.model_type) for inside in transformers_models(model).values()), "")
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    tied = {parameter for parameter, count in owners.items() if count > 1}
    matched: list[tuple[str, PruningConfig, list[UnitGroup]]] = []
    left_out = dict(others)
    named: dict[str, dict[int, str]] = {}
    for name, settings in resolved.items():
        check_names(settings.target_modules, known, f"{name}.target_modules", model_type)
        check_names(settings.exclude_modules, known, f"{name}.exclude_modules", model_type)
        taken = set(named) if name == "config" else set()
        selects = selector(model, settings.target_modules, settings.exclude_modules, f"{name}.target_modules")
        selected = {key: module for key, module in modules.items() if selects(key) and key not in taken}
        named_others = {key: reason for key, reason in others.items() if selects(key) and key not in taken}
        chosen = [block for block in blocks if _selects_block(settings, block, taken)]
        if CRITERIA[settings.criterion].activations and is_tensor_parallel(model):
            allowed = "reads activations, which tensor parallelism splits over ranks; use one that reads weights or gradients."
            raise ConfigError(f"{name}.criterion", settings.criterion, allowed)
        groups, reasons = _groups(name, settings, patterns[name], selected, chosen, tied, named_others)
        left_out |= reasons
        if not groups and name == "config" and taken:
            continue
        if not groups:
            absent = HEADS_STAY.get(model_type, "") if settings.pattern == "head" else ""
            why = "; ".join(f"{module}: {reason}" for module, reason in reasons.items()) or absent or "no such module in this model"
            raise ConfigError(f"{name}.pattern", settings.pattern, f"finds nothing to prune ({why}).")
        level = patterns[name].level
        for module in dict.fromkeys(view.target.module_name for group in groups for view in group.weights):
            if (other := named.setdefault(module, {}).get(level)) is not None:
                allowed = f"{other} already names {module!r} with a pattern of the same level; exclude it from one of them."
                raise ConfigError(f"{name}.target_modules", settings.target_modules, allowed)
            if name in open_rules and (rivals := sorted(open_rules & set(named[module].values()))):
                allowed = f"must be given, since {rivals[0]} names {module!r} too and has none."
                raise ConfigError(f"{name}.target_sparsity", None, allowed)
            named[module][level] = name
        matched.append((name, settings, groups))
    open_ones = [(settings, groups) for name, settings, groups in matched if name in open_rules]
    shared, shares = _shared_costs(model, config, open_ones, costs)
    rules = []
    for name, settings, groups in matched:
        is_open = name in open_rules
        if is_open and shares:
            settings = replace(settings, **with_pairs({"target_sparsity": shares[-1]}))
        targets = shares if is_open and shares else [settings.sparsity]
        timeline = _timeline(name, settings, targets, total_steps, steps_per_epoch)
        costs_of = shared if is_open else WEIGHTS
        rules.append(_rule(model, name, settings, patterns[name], is_open, groups, timeline, costs_of, layer_by_layer))
    for module in modules:
        if module not in named and module not in left_out:
            left_out[module] = (
                "no rule names it" if module.startswith(body) else "it is not part of the model's body, and no rule names it"
            )
    return rules, left_out


def _shared_costs(
    model: nn.Module,
    config: PruningConfig,
    matched: Sequence[tuple[PruningConfig, list[UnitGroup]]],
    measured: Mapping[str, Tensor] | None,
) -> tuple[Costs, list[float]]:
    """Of what the config's target is a share, and that share if it follows from the model: of a family, one for each.

    Raises:
        ConfigError: the target cannot be reached.
    """
    if config.cost_target is None:
        return WEIGHTS, []
    name, value = config.cost_target, getattr(config, config.cost_target)
    if not matched:
        raise ConfigError(name, value, "needs a rule without a target of its own.")
    differing = [field for field in _OF_A_BUDGET if len({getattr(settings, field) for settings, _ in matched}) > 1]
    if differing:
        raise ConfigError(name, value, f"is one budget, so its rules need the same {', '.join(differing)}.")
    groups = [group for _, groups in matched for group in groups]
    costs = model_costs(model, config, groups, measured)
    caps = [settings.max_sparsity_per_module for settings, groups in matched for _ in groups]
    return costs, costs.shares(config.cost_targets, groups, caps)


def _rule(
    model: nn.Module,
    name: str,
    settings: PruningConfig,
    pattern: Pattern,
    is_open: bool,
    groups: list[UnitGroup],
    timeline: Timeline | Stages,
    costs: Costs,
    layer_by_layer: bool,
) -> Rule:
    if costs is WEIGHTS:
        _check_reachable(name, settings, groups)
    _check_score_rate(name, settings, timeline)
    if settings.initial_sparsity != "from_model" and costs is WEIGHTS:
        _check_rounding(name, settings, groups)
    criterion = CRITERIA[settings.criterion](settings)
    if criterion.scores_absences and not layer_by_layer:
        allowed = "tries out what the model loses without each unit, which prune() does; while it trains, nothing is tried out."
        raise ConfigError(f"{name}.criterion", settings.criterion, allowed)
    for group in groups:
        if obstacle := criterion.obstacle(group):
            allowed = f"{obstacle} (pattern {settings.pattern!r} in {group.name!r})."
            raise ConfigError(f"{name}.criterion", settings.criterion, allowed)
        if UPDATES[settings.update].whole_columns and [view.owns_columns for view in group.compensated] != [True]:
            allowed = f"needs units that leave {group.name!r} through whole columns, as heads, groups, neurons and 'channelx1' do."
            raise ConfigError(f"{name}.update", settings.update, allowed)
    watched = _watched(criterion, UPDATES[settings.update], groups, layer_by_layer)
    seen = Activations(model, watched)
    rule = Rule(name, settings, pattern, is_open, groups, criterion, seen, timeline, costs)
    rule.keep(alive_units(groups) if settings.initial_sparsity == "from_model" else all_units(groups))
    criterion.attach(groups, seen)
    return rule


def _watched(criterion: Criterion, update: Update, groups: Iterable[UnitGroup], layer_by_layer: bool) -> dict[str, list[Target]]:
    """The statistics that are read of activations, with the weights whose layers they are of."""
    groups = list(groups)
    if layer_by_layer and criterion.scores_remainders:
        return {}
    watched = {name: [view.target for group in groups for view in criterion.watched(group)] for name in criterion.activations}
    if update.reads_second_moments and not layer_by_layer:
        watched["second_moments"] = [view.target for group in groups for view in group.weights if not view.owns_rows]
    return watched


def all_units(groups: Iterable[UnitGroup]) -> list[Tensor]:
    """Every unit, bool `[units]` for each group."""
    return [torch.ones(group.num_units, dtype=torch.bool, device=group.device) for group in groups]


def alive_units(groups: Iterable[UnitGroup]) -> list[Tensor]:
    """The units with at least one nonzero weight, bool `[units]` for each group."""
    return [group.reduce(lambda target: target.weight() != 0, "max") > 0 for group in groups]


def _groups(
    name: str,
    settings: PruningConfig,
    pattern: Pattern,
    modules: Mapping[str, nn.Module],
    blocks: list[Block],
    tied: set[int],
    others: Mapping[str, str],
) -> tuple[list[UnitGroup], dict[str, str]]:
    """The unit groups of a rule, and what it leaves out.

    Args:
        tied: ids of the parameters that several modules share.
        others: the weights that the rule names but that cannot be pruned, with the reason; structural patterns name blocks instead.
    """
    try:
        groups, left_out = build_groups(pattern, modules.items(), blocks)
    except ValueError as error:
        raise ConfigError(f"{name}.target_modules", settings.target_modules, f"names what cannot be pruned. {error}") from None
    for target in (view.target for group in groups for view in group.weights):
        if not target.parameter.is_floating_point():
            allowed = f"names {target.module_name!r}, whose weight is quantized ({target.parameter.dtype}); dequantize it first."
            raise ConfigError(f"{name}.target_modules", settings.target_modules, allowed)
        if target.adapter is not None and is_sharded(target.parameter):
            allowed = f"names {target.module_name!r}, which has a LoRA adapter and is sharded over ranks; do one of the two."
            raise ConfigError(f"{name}.target_modules", settings.target_modules, allowed)
        if target.adapter is not None and id(target.parameter) in tied:
            allowed = f"names {target.module_name!r}, whose weight another module shares, but not its adapter; untie it first."
            raise ConfigError(f"{name}.target_modules", settings.target_modules, allowed)
    for target in (view.target for group in groups for view in group.weights) if settings.update != "zero" else ():
        if target.adapter is not None:
            allowed = f"must be 'zero' under LoRA: {target.module_name!r} computes with the sum of two weights, and one is changed."
            raise ConfigError(f"{name}.update", settings.update, allowed)
        if target.parameter.ndim > 2 and UPDATES[settings.update].reads_second_moments:
            allowed = f"reads second moments of inputs, which {target.module_name!r}, a convolution, has for each kernel position."
            raise ConfigError(f"{name}.update", settings.update, allowed)
    if CRITERIA[settings.criterion].reads_gradients:
        frozen = [group for group in groups if group.size and not all(view.target.requires_grad for view in group.weights)]
        left_out |= {group.name: f"it is frozen and criterion {settings.criterion!r} needs its gradient" for group in frozen}
        groups = [group for group in groups if group not in frozen]
    if not pattern.is_structural:
        left_out |= others
    if left_out and settings.target_modules is not None:
        module, reason = next(iter(left_out.items()))
        raise ConfigError(f"{name}.target_modules", settings.target_modules, f"names {module!r}, but {reason}.")
    return groups, left_out


def _selects_block(settings: PruningConfig, block: Block, taken: set[str]) -> bool:
    """Whether a rule selects a block, by its own name or that of any of its projections; exclusion works the same way."""
    names = [block.name, *(projection.name for projection in block.projections)]
    if any(name in taken for name in names) or any(names_module(settings.exclude_modules, name) for name in names):
        return False
    return settings.target_modules is None or any(names_module(settings.target_modules, name) for name in names)


def _in_steps(name: str, settings: PruningConfig, phase: str, total_steps: int, steps_per_epoch: float | None) -> int | None:
    """The steps of a phase, or None if the config does not give them."""
    epochs: float | None = getattr(settings, f"{phase}_epochs")
    steps: float | None = getattr(settings, f"{phase}_steps")
    if epochs:
        if steps_per_epoch is None:
            raise ConfigError(f"{name}.{phase}_epochs", epochs, f"needs steps_per_epoch; pass it, or give {phase}_steps.")
        return round(epochs * steps_per_epoch)
    if steps is None:
        return None if epochs is None else 0
    return round(steps * total_steps) if steps < 1 else int(steps)


def _timeline(
    name: str, settings: PruningConfig, targets: Sequence[float], total_steps: int, steps_per_epoch: float | None
) -> Timeline | Stages:
    """The schedule of a rule in steps of this run.

    Args:
        targets: the final sparsity of each stage.

    Raises:
        ConfigError: warm-up and cool-down leave no step for pruning.
    """
    given = [_in_steps(name, settings, phase, total_steps, steps_per_epoch) for phase in ("warmup", "cooldown")]
    begin, cooldown = phases(total_steps, *given)
    number = len(targets)
    parts = stages(total_steps, begin, cooldown, number)
    if any(end <= start for start, end, _ in parts):
        phase = "warmup" if given[0] else "cooldown"
        field = f"{phase}_epochs" if getattr(settings, f"{phase}_epochs") else f"{phase}_steps"
        allowed = (
            f"warm-up ({begin} steps) and cool-down ({cooldown} steps) must leave at least one of the run's {total_steps} steps"
            f"{f' to each of {number} targets' if number > 1 else ''}."
        )
        raise ConfigError(f"{name}.{field}", getattr(settings, field), allowed)
    updates = settings.updates and -(-settings.updates // number)
    made = [
        Timeline(
            total=last,
            begin=start + (place > 0 and settings.schedule == "constant"),  # which prunes at its begin, and not before
            end=end,
            frequency=spacing(end - start, settings.schedule, settings.frequency, updates),
            schedule=settings.schedule,
            initial=0.0 if settings.initial_sparsity == "from_model" else float(settings.initial_sparsity),
            target=targets[0],
        )
        for place, (start, end, last) in enumerate(parts)
    ]
    return made[0] if number == 1 else Stages(tuple(made)).aimed_at(targets)


def _check_reachable(name: str, settings: PruningConfig, groups: list[UnitGroup]) -> None:
    """Raise if the caps make the target unreachable under global scope."""
    if settings.scope != "global":
        return
    cap, target = settings.max_sparsity_per_module, settings.sparsity
    total = sum(group.num_units * group.unit_size for group in groups)
    most = sum(most_removable(group, cap) * group.unit_size for group in groups)
    if target * total - most >= max(group.unit_size for group in groups):
        allowed = (
            f"cannot be reached: with max_sparsity_per_module={cap} at most {most / total:.4f} of these modules can be removed "
            f"(a module of {groups[0].num_units} units keeps at least one); raise the cap or lower the target."
        )
        raise ConfigError(f"{name}.target_sparsity", target, allowed)


def _check_rounding(name: str, settings: PruningConfig, groups: list[UnitGroup]) -> None:
    """Raise if the target is less than half a unit everywhere, so that nothing would be removed."""
    target = settings.sparsity
    if settings.scope == "threshold" or not target:
        return
    if settings.scope in LOCAL_SCOPES:
        wanted = max(target * group.num_units for group in groups)
        smallest = 1 / max(group.num_units for group in groups)
    else:
        size, total = min(group.unit_size for group in groups), sum(group.size for group in groups)
        wanted, smallest = target * total / size, size / total
    if round(wanted) == 0:
        number = round(1 / smallest)
        allowed = (
            f"is {wanted:.2g} of {number} units and rounds to none; the smallest possible value above 0 is {smallest:.4g} "
            f"(1 unit of {number}{' in a module' if settings.scope in LOCAL_SCOPES else ''})."
        )
        raise ConfigError(f"{name}.target_sparsity", target, allowed)


def _check_score_rate(name: str, settings: PruningConfig, timeline: Timeline | Stages) -> None:
    """Raise if movement scores, which start at 0 and move by about their learning rate per step, cannot reach the threshold."""
    if settings.regularization != "auto" or settings.threshold is None:
        return
    way, steps = abs(math.log(settings.threshold / (1 - settings.threshold))), timeline.last_update - timeline.begin
    if steps * settings.score_learning_rate < 2 * way:
        allowed = f"must be at least {2 * way / steps:.2g} to bring scores to threshold={settings.threshold} in {steps} steps."
        raise ConfigError(f"{name}.score_learning_rate", settings.score_learning_rate, allowed)
