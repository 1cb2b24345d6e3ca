"""What a model costs, and its units: parameters, bytes, operations or milliseconds.

A target in costs is for the whole model. What nobody prunes is fixed; the rest is shared by the units, and a budget takes the share
of it that has to go.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..condense import sample_batch
from ..measure.flops import count_flops
from ..measure.latency_table import LatencyTable, latency_table, measured_speedup, table_setting
from ..model import find_blocks
from ..model.sharding import is_sharded, num_ranks, summed
from ..model.units import UnitGroup, View
from ..model.wrappers import transformers_model
from ..settings.config import PruningConfig
from ..settings.errors import ConfigError
from .allocation import Levels, allocate_levels, most_removable

#: How many sizes of the whole model are measured at most, for costs that meet a speed, and how near to it is near enough.
_TRIALS, _NEAR = 6, 0.01
#: How often sizes are measured that seem near enough; else, of many, those would be taken whose chance error is the right one.
_LOOKS = 3
#: When two scales of what units save are next to one another: what lies between is less than measurements tell apart.
_CLOSE = 0.005
#: How much smaller a share the last layer is taken to keep than the first, before units have scores.
_SPREAD = 32.0
#: So much of a speed is aimed at, since other processes find it a few hundredths higher or lower, and lower is worse.
_AIM = 1.01
#: By how much at most, either way: of a small speed-up little is left beside the noise of a measurement.
_LARGEST_CORRECTION = 1.5


@dataclass(frozen=True)
class Costs:
    """A cost of a model.

    Attributes:
        target: the field of the config that it is the target of.
        total: of the whole model as it is.
        levels: group → its levels.
        measured: what the levels were measured as, block by block; None if each unit of a group costs the same, so that any number
            of them is a level.
        layers: layer → its blocks, where whole layers are units.
        setting: at which they were timed, as a [`LatencyTable`] has it, if that was on this machine.
    """

    target: str
    total: float
    levels: Callable[[UnitGroup], Levels]
    measured: Mapping[str, Levels] | None = None
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    setting: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """What was measured, since it cannot be measured the same again; empty where costs follow from the model."""
        found = {f"blocks/{name}/{key}": value for name, part in (self.measured or {}).items() for key, value in vars(part).items()}
        return found | {"total": torch.tensor(self.total, dtype=torch.float64)} if found else {}

    def restored(self, state: Mapping[str, Tensor]) -> Costs:
        """The same as they were measured another time."""
        return _of_state(state, self.layers, self.setting)

    def saving(self, share: float) -> Costs:
        """The same where units save this share of what they did when they go."""
        levels = {name: level.saving(share) for name, level in (self.measured or {}).items()}
        return of_table(self.total, levels, self.layers, self.setting)

    def averaged(self, device: torch.device) -> Costs:
        """The same as they are on the mean of all processes, which talk on a device."""
        levels = {name: Levels(level.left, _mean(level.costs, device)) for name, level in (self.measured or {}).items()}
        total = float(_mean(torch.tensor(self.total, dtype=torch.float64), device))
        return of_table(total, levels, self.layers, self.setting)

    def saved(self, units: Mapping[str, int]) -> float:
        """What goes of the cost when so many units are left in some blocks, by name, where blocks were measured."""
        levels = [((self.measured or {})[name], left) for name, left in units.items()]
        return sum(float(level.costs[-1]) - level.cost(left) for level, left in levels)

    def needed(self, value: float) -> float:
        """The cost that has to go for a target: a factor for a speed-up, else what is to be kept, below 1 a share of the total."""
        if self.target == "target_speedup":
            return self.total * (1 - 1 / value)
        return self.total * (1 - value) if value < 1 else self.total - value

    def reached(self, removed: float) -> float:
        """What the target's field would be for a model without this cost: a factor, or what is kept."""
        left = self.total - removed
        return self.total / left if self.target == "target_speedup" else left

    def share(self, value: float, groups: Sequence[UnitGroup], caps: Sequence[float]) -> float:
        """The share of the groups' costs that has to go for a target.

        Raises:
            ConfigError: the model is small or fast enough already, or cannot become so; names what can be had.
        """
        removable = self.total_of(groups)
        most = sum(_most(self.levels(group), most_removable(group, cap)) for group, cap in zip(groups, caps))
        needed = self.needed(value)
        if needed <= 0:
            raise ConfigError(
                self.target, value, f"is reached already: the model has {self.reached(0.0):,.6g}; ask for less than that."
            )
        if needed > most * (1 + 1e-9):
            allowed = (
                f"cannot be reached: the units that the rules name cost {removable:,.4g} of the model's {self.total:,.4g}, and at "
                f"most {most:,.4g} may go; {self._limit(most)} Raise max_sparsity_per_module, name more modules, or ask for less."
            )
            raise ConfigError(self.target, value, allowed)
        return needed / removable

    def shares(self, values: Sequence[float], groups: Sequence[UnitGroup], caps: Sequence[float]) -> list[float]:
        """[`Costs.share`] of each of some targets, which are to be reached one after the other.

        Raises:
            ConfigError: one of them cannot be reached, or keeps no less than the one before it.
        """
        found = [self.share(value, groups, caps) for value in values]
        for place in range(1, len(found)):
            if found[place] <= found[place - 1]:
                allowed = f"must ask for more than {values[place - 1]:,.6g} before it, and keeps as much of this model or more."
                raise ConfigError(f"{self.target}[{place}]", values[place], allowed)
        return found

    def total_of(self, groups: Sequence[UnitGroup]) -> float:
        """What all units of some groups cost."""
        return sum(float(self.levels(group).costs[-1]) for group in groups)

    def _limit(self, most: float) -> str:
        return f"{self.target} can be at {'most' if self.target == 'target_speedup' else 'least'} {self.reached(most):,.6g}."


def _most(levels: Levels, units: int) -> float:
    """The largest cost that goes with at most so many units."""
    allowed = levels.left >= levels.left[-1] - units
    return float(levels.costs[-1] - levels.costs[allowed].min())


def model_costs(
    model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup], measured: Mapping[str, Tensor] | None = None
) -> Costs:
    """What a model costs in terms of the config's target.

    Args:
        model: the model.
        config: the config, with a target in costs.
        groups: the units that are to meet it.
        measured: [`Costs.state_dict`] of the run that goes on; what it measured is not measured again.

    Raises:
        ConfigError: the cost of its units cannot be told.
    """
    name = config.cost_target
    assert name is not None
    most = {block.name: block.num_groups for block in find_blocks(model)}
    for group in groups:
        if group.num_units > most.get(group.name, group.num_units):
            allowed = f"needs pattern 'kv_group': heads of {group.name!r} share keys and values, so that one alone saves nothing."
            raise ConfigError(name, getattr(config, name), allowed)
        if any(view.target.adapter is not None for view in group.weights):
            allowed = f"is for models without adapters, and {group.name!r} has one; merge it first, or give target_sparsity."
            raise ConfigError(name, getattr(config, name), allowed)
    if measured and name == "target_speedup":
        return _of_state(measured, _layers(model), _setting(model, config))
    return COSTS[name](model, config, groups)


def counted(model: nn.Module, target: str, length: int) -> float:
    """What a model has, of what a target counts: parameters or bytes, each parameter once, or operations of a row of a length."""
    if target == "target_flops":
        inner: Any = transformers_model(model)
        return count_flops(inner, sample_batch(inner, 1, length, shortest=length))[0]
    return float(sum(part.numel() * (part.element_size() if target == "target_bytes" else 1) for part in model.parameters()))


def _each(target: str, total: float, unit: Callable[[UnitGroup], float]) -> Costs:
    """Costs of which each unit of a group has the same."""

    def levels(group: UnitGroup) -> Levels:
        left = torch.arange(group.num_units + 1)
        return Levels(left, left.double() * unit(group))

    return Costs(target, total, levels)


def _parameter_costs(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> Costs:
    """Parameters of the whole model, each once."""
    total = counted(model, "target_parameters", 0)
    return _each("target_parameters", total, lambda group: sum(view.height * view.width for view in _views(group)))


def _byte_costs(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> Costs:
    """Bytes of the parameters of the whole model."""

    def unit(group: UnitGroup) -> float:
        return sum(view.height * view.width * view.target.parameter.element_size() for view in _views(group))

    return _each("target_bytes", counted(model, "target_bytes", 0), unit)


def _flop_costs(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> Costs:
    """Operations of one row."""
    inner: Any = transformers_model(model)
    length, layers = config.latency_length, _layers(model)
    total, blocks = count_flops(inner, sample_batch(inner, 1, length, shortest=length), find_blocks(inner))

    def unit(group: UnitGroup) -> float:
        return sum(blocks[name] for name in _blocks_of(group, layers)) / group.num_units

    return _each("target_flops", total, unit)


def _layers(model: nn.Module) -> dict[str, list[str]]:
    """Layer → its blocks."""
    found: dict[str, list[str]] = {}
    for block in find_blocks(model):
        found.setdefault(block.layer, []).append(block.name)
    return found


def _blocks_of(group: UnitGroup, layers: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The blocks that the units of a group are of: those of a layer where that is the unit, else the block by its name."""
    return layers.get(group.name, [group.name])


def _views(group: UnitGroup) -> Sequence[View]:
    return (*group.weights, *group.biases)


def _time_costs(model: nn.Module, config: PruningConfig, groups: Sequence[UnitGroup]) -> Costs:
    """Milliseconds of a forward, from a latency table: the config's, or one that is measured now.

    Of several processes the mean counts, so that all choose the same units.

    Raises:
        ConfigError: there is no table, and the model is sharded, so that no process can run it alone.
    """
    if config.latency_table is None and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("latency_table", None, "must be given: the model is sharded over ranks, so it cannot be timed here.")
    table = _given_table(model, config) or latency_table(model, config.latency_batch_size, config.latency_length)
    blocks = {name: Levels.of(levels) for name, levels in table.blocks.items()}
    costs = of_table(table.total, blocks, _layers(model), table.setting if table.is_from_here(model) else None)
    return costs.averaged(next(model.parameters()).device)


def fitted(costs: Costs, model: nn.Module, values: Sequence[float], sizes: Callable[[Costs], Sequence[Mapping[str, int]]]) -> Costs:
    """Costs with which budgets come to sizes that are as fast as was asked, as near as some measurements of the whole model get.

    Costs of blocks do not quite add up, and a budget prefers the sizes whose timings happen to be low. So what units save is scaled
    by what the model is measured to save with the sizes that come out, which change with it; where that leads no further, by the
    middle between scales that were too fast and too slow, until these are next to one another. Of all that was tried the nearest
    counts, since its sizes are those that were measured; being too slow counts twice.

    Args:
        costs: of a speed-up, timed on this machine.
        model: the model.
        values: the speed-ups that are asked.
        sizes: from costs to the units left in each block that shrinks, for each of `values`; of no block where these costs allow no
            such speed.
    """
    assert costs.setting is not None
    aims = [_AIM * value for value in values]
    needed = sum(1 - 1 / value for value in values) / sum(1 - 1 / aim for aim in aims)
    tried: list[tuple[float, Costs]] = []
    share, low, high = 1.0, 1 / _LARGEST_CORRECTION, _LARGEST_CORRECTION  # the smaller the share, the more goes
    for _ in range(_TRIALS):
        trial = costs.saving(share)
        blocks = sizes(trial)
        predicted = sum(costs.saved(units) for units in blocks)
        if not predicted:
            break
        looks: list[list[float]] = []
        for _ in range(_LOOKS):
            looks.append([measured_speedup(model, costs.setting, units) for units in blocks])
            speeds = [statistics.mean(found) for found in zip(*looks)]
            farthest = max((speed / aim - 1 for speed, aim in zip(speeds, aims)), key=_distance)
            if _distance(farthest) > _NEAR:
                break
        tried.append((_distance(farthest), trial))
        if tried[-1][0] <= _NEAR:
            break
        low, high = (share, high) if farthest > 0 else (low, share)
        if high - low < _CLOSE:
            break
        share = needed * sum(costs.total * (1 - 1 / speed) for speed in speeds) / predicted
        if not low < share < high:  # as happens where one unit is much of the cost
            share = (low + high) / 2
    return min(tried, key=lambda pair: pair[0])[1] if tried else costs


def _distance(off: float) -> float:
    """How far a speed-up is from what was asked, from how much more it is as a share of it: twice as far where it is less."""
    return max(off, -2 * off)


def _given_table(model: nn.Module, config: PruningConfig) -> LatencyTable | None:
    """The config's table, if it has one.

    Raises:
        ConfigError: it cannot be read, or is of another model.
    """
    if config.latency_table is None:
        return None
    table = LatencyTable.load(config.latency_table)
    table.check(model, elsewhere=True)
    return table


def _setting(model: nn.Module, config: PruningConfig) -> Mapping[str, Any] | None:
    """How blocks are timed on this machine; None if they were timed elsewhere."""
    table = _given_table(model, config)
    if table is None:
        return table_setting(model, config.latency_batch_size, config.latency_length)
    return table.setting if table.is_from_here(model) else None


def _mean(value: Tensor, device: torch.device) -> Tensor:
    """The mean of a tensor over processes, which talk on a device."""
    return summed(value.to(device)).to(value.device) / num_ranks()


def likely_sizes(costs: Costs, value: float, groups: Sequence[UnitGroup], caps: Sequence[float]) -> dict[str, int]:
    """Sizes that blocks may have at a speed-up, by name, before units have scores; blocks that shrink only.

    Of encoders fine-tuned on a task (MiniLM on MRPC and SST-2) the first layers keep most and the last ones next to nothing, and
    such mixtures are slower than sizes that are alike, or than fewer layers. So the loss of a block of n units with k left is taken
    to be w·log((n + ½)/(k + ½)) times its cost, by which w says about what share of it stays; w falls from layer to layer, to
    1/[`_SPREAD`] of what it was.
    """
    places = {name: place for place, (layer, blocks) in enumerate(costs.layers.items()) for name in (layer, *blocks)}
    levels = [costs.levels(group) for group in groups]
    scores = []
    for group, level in zip(groups, levels):
        weight = _SPREAD ** (-places.get(group.name, 0) / max(len(costs.layers) - 1, 1))
        left = torch.arange(group.num_units, 0, -1, device=group.device)
        scores.append(weight * float(level.costs[-1]) * torch.log((left + 0.5) / (left - 0.5)))
    none = [torch.zeros(group.num_units, dtype=torch.bool, device=group.device) for group in groups]
    return sizes_of(costs, groups, allocate_levels(groups, scores, none, levels, costs.needed(value), [0.0] * len(groups), caps))


def sizes_of(costs: Costs, groups: Sequence[UnitGroup], removed: Sequence[Tensor]) -> dict[str, int]:
    """How many units are left in blocks, by name, when some go; blocks that shrink only."""
    units = {}
    for group, gone in zip(groups, removed):
        for name in _blocks_of(group, costs.layers) if bool(gone.any()) else ():
            whole = int((costs.measured or {})[name].left[-1])
            units[name] = whole // group.num_units * (group.num_units - int(gone.sum()))
    return units


def of_table(
    total: float,
    blocks: Mapping[str, Levels],
    layers: Mapping[str, Sequence[str]] | None = None,
    setting: Mapping[str, Any] | None = None,
) -> Costs:
    """The costs of a speed-up.

    Args:
        total: milliseconds of the whole model.
        blocks: block → milliseconds by the number of its heads or neurons.
        layers: layer → its blocks; what a layer costs beside them is not counted.
        setting: see [`Costs`].
    """
    layers = layers or {}

    def levels(group: UnitGroup) -> Levels:
        first, *others = (blocks[name].in_units(group.num_units) for name in _blocks_of(group, layers))
        return Levels(first.left, sum((level.costs for level in others), start=first.costs))

    return Costs("target_speedup", total, levels, blocks, layers, setting)


def _of_state(state: Mapping[str, Tensor], layers: Mapping[str, Sequence[str]], setting: Mapping[str, Any] | None) -> Costs:
    """The costs of a speed-up as [`Costs.state_dict`] has them."""
    names = dict.fromkeys(key.removeprefix("blocks/").rpartition("/")[0] for key in state if key != "total")
    blocks = {name: Levels(state[f"blocks/{name}/left"], state[f"blocks/{name}/costs"]) for name in names}
    return of_table(float(state["total"]), blocks, layers, setting)


#: What a budget of `target_sparsity` counts: the weights that the rules name.
WEIGHTS = _each("target_sparsity", 0.0, lambda group: group.unit_size)
#: Field of the target → the cost of a model.
COSTS: dict[str, Callable[[nn.Module, PruningConfig, Sequence[UnitGroup]], Costs]] = {
    "target_parameters": _parameter_costs,
    "target_bytes": _byte_costs,
    "target_flops": _flop_costs,
    "target_speedup": _time_costs,
}
