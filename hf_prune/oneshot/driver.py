"""`prune()`: calibrate, score, allocate, update, one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..measure.sparsity import count_zeros
from ..model import spec_for
from ..model.blocks import layer_lists
from ..model.targets import Target, named_layers
from ..model.units import UnitGroup, View
from ..model.wrappers import transformers_model
from ..pruning.budget import Budget, make_budgets
from ..pruning.criteria.activations import kept_in_order, removal_costs
from ..pruning.reconstruction import Moments, aimed, damping, elimination, inverse
from ..pruning.rules import Rule, match_rules
from ..pruning.updates import DAMPING, zero
from ..settings.checks import check_count
from ..settings.config import LOCAL_SCOPES, PruningConfig
from ..settings.errors import ConfigError
from .calibration import at_once, calibration, check_model
from .database import Database, Measured, fingerprints
from .layers import Call, Stream, record, run
from .report import PrunedModule, PruneReport
from .search import search_weights
from .sensitivity import Importance, Prediction, divergence, importance, predictions, probe, token_weights
from .trials import score_absences
from .walk import Rows, Site, advance, find_site, moments_at, moments_during, same_inputs

#: On so many rows a search tries allocations out.
_SEARCH_ROWS = 256


@dataclass
class _Work:
    """A weight whose columns make up for the units of a group that go."""

    rule: Rule
    place: int
    view: View
    module: nn.Module

    @property
    def group(self) -> UnitGroup:
        """The group of units."""
        return self.rule.groups[self.place]

    @property
    def name(self) -> str:
        """The name of the weight's module."""
        return self.view.target.module_name

    @property
    def kept(self) -> Tensor:
        """The units that stay, bool `[units]`."""
        return self.rule.kept[self.place]

    @kept.setter
    def kept(self, kept: Tensor) -> None:
        self.rule.keep([kept if place == self.place else other for place, other in enumerate(self.rule.kept)])

    def matrix(self) -> Tensor:
        """The weight with its bias, if there is one, as the last column; `[out, in (+ 1)]`, float64."""
        weight, bias = self.view.target.weight().double(), self.bias
        return weight if bias is None else torch.cat([weight, bias.detach().double()[:, None]], dim=1)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the weight's module."""
        bias: nn.Parameter | None = getattr(self.module, "bias", None)
        return bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What changes: the weight, and the bias of its module."""
        return [self.view.target.parameter, *([] if self.bias is None else [self.bias])]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Put former values of the parameters in place."""
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    @property
    def is_measured(self) -> bool:
        """Whether its units compete with those of other weights by what their absence costs in the dense model.

        Where each weight loses a share of its own and chooses when its turn comes, there is nothing to compare.
        """
        in_turn = self.rule.update.in_order and self.rule.settings.scope in LOCAL_SCOPES
        return self.rule.criterion.scores_remainders and not in_turn

    @property
    def is_solved(self) -> bool:
        """Whether its units are chosen again, or its weights solved for."""
        return self.rule.update.reads_second_moments or (self.rule.criterion.scores_remainders and self.view.owns_columns)

    def fill(self, matrix: Tensor) -> None:
        """Put a changed weight and bias in place."""
        target, bias = self.view.target, self.bias
        inputs = target.shape[1]
        target.parameter.copy_(target.from_matrix(matrix[:, :inputs].to(target.parameter.dtype)))
        if bias is not None:
            bias.copy_(matrix[:, inputs].to(bias.dtype))

    def write(self, matrix: Tensor) -> None:
        """Put a changed weight and bias in place, and zero what goes."""
        self.fill(matrix)
        self.group.apply(self.kept)


def prune(
    model: Any,
    config: PruningConfig,
    dataloader: Iterable[Any],
    *,
    labels: bool = False,
    calibration_rows: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    search: int = 0,
    database: str | Path | None = None,
    offload_folder: str | Path | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> PruneReport:
    """Prune a model in place, without training: true zeros, and weights that make up for them.

    Of the config, everything counts but the schedule. Criterion and update are `"obs"` and `"least_squares"` unless it names
    others. Training or evaluation mode, `requires_grad`, gradients and the random state stay as they are; an error or Ctrl-C leaves
    the model as it was. Extra memory: a copy of the weights that change, the hidden states of the calibration rows before a layer,
    of the dense and of the pruned model, those at its projections, and the statistics of one projection (`report.extra_bytes`).

    Args:
        model: a transformers model, or what holds one (a SentenceTransformer); dense, or with zeros already.
        config: what to prune and how much.
        dataloader: batches as the model's forward takes them. Without `labels`, labels in them are not read.
        labels: criteria that need a loss take the model's own on the labels in the batches. By default they take a random sum of
            the model's logits whose squared gradient is, on the mean, the curvature of the KL divergence.
        calibration_rows: how many rows to take. By default enough for 32,768 tokens, at most 2,048: solving for weights takes some
            ten tokens for each input of a layer.
        held_out: share of the rows on which updates are judged. One that makes a projection's error on them larger than zeros
            alone is not taken.
        seed: of what is drawn: weights of logits, the rows that are held out, and what a search tries.
        search: so many allocations are tried out, each with the loss of every block weighed anew, on the model with the weights
            that it leads to (SPDY, Frantar and Alistarh 2022, https://arxiv.org/abs/2201.13096, section 3.3). A try takes about as
            long as solving for all weights that change and 256 rows through the model. Criterion `"obs"` only.
        database: a folder for what criterion `"obs"` measures in the dense model, which is the same for every budget: it is written
            the first time, and read by all other calls with the same model, rows and seed. Result and bits are the same without.
            Other criteria leave it alone.
        offload_folder: where hidden states go; by default they stay in memory.
        progress: wraps a range with a number for each layer of each pass, to show how far it is.

    Raises:
        ConfigError: the config, the model or the rows cannot be used, or there is nothing to search; NaN or infinity in what flows
            through the model. Nothing was changed.
        RuntimeError: sparsity was requested and none was reached.
    """
    started = time.perf_counter()
    model = transformers_model(model)
    check_model(model)
    check_count("search", search, "tries", least=0)
    settings = at_once(config)
    rules, skipped = match_rules(model, settings, 1, None, layer_by_layer=True)
    rows = calibration(model, dataloader, calibration_rows, held_out, labels, seed)
    work = _work(model, rules)
    _check_biases(model, work)
    units = {item.name: item.group.num_units for item in work if item.rule.criterion.scores_remainders}
    _check_search(search, rules, work)
    full = torch.autocast(model.device.type, enabled=False)  # which would round sums to half precision
    with ExitStack() as stack, _undone_on_error(rules, work) as copied, still(model), torch.no_grad(), full:
        if search and database is None:
            database = Path(stack.enter_context(TemporaryDirectory()), "database")
        levels = Database(database, fingerprints(model, rows, units, seed)) if database is not None and units else None
        before = predictions(model, rows)
        passes = _Passes(model, rules, rows, work, levels, offload_folder, progress)
        predicted, searched = _choose(model, rules, rows, passes, labels, seed, settings.cost_targets, search)
        modules = passes.update()
        for rule in rules:
            rule.apply()
        error = divergence(model, rows, before)
        zeros, elements = count_zeros({target.name: target for rule in rules for target in _weights(rule)}.values())
        if not zeros and any(rule.settings.sparsity for rule in rules):
            raise RuntimeError(f"{config.requested} was requested and no weight is zero.")
    return PruneReport(
        target=sum(rule.settings.sparsity * sum(group.size for group in rule.groups) for rule in rules)
        / sum(group.size for rule in rules for group in rule.groups),
        sparsity=zeros / elements,
        budget={name: value for budget in make_budgets(rules) for name, value in budget.metrics().items()},
        predicted_error=predicted,
        searched=searched,
        held_out_error=error,
        seconds=time.perf_counter() - started,
        extra_bytes=copied + passes.extra_bytes + sum(kept.nbytes for rule in rules for kept in rule.kept),
        modules=tuple(modules),
        skipped=skipped,
    )


def _check_search(search: int, rules: Sequence[Rule], work: Sequence[_Work]) -> None:
    """Raise if there is to be a search and no budget whose blocks can be weighed.

    Raises:
        ConfigError: there is none.
    """
    if search and not any(_is_searchable(budget, work) for budget in make_budgets(rules)):
        raise ConfigError("search", search, "is for blocks that share a budget, and whose units criterion 'obs' measures.")


def _is_searchable(budget: Budget, work: Sequence[_Work]) -> bool:
    """Whether what blocks count changes what goes of them, and all of it was measured."""
    measured = {item.group.name for item in work if item.is_measured}
    shared = budget.costs.measured is not None or budget.rules[0].settings.scope == "global"
    return shared and len(budget.groups) > 1 and all(group.name in measured for group in budget.groups)


def _weights(rule: Rule) -> Iterator[Target]:
    return (view.target for group in rule.groups for view in group.weights)


def _work(model: nn.Module, rules: Sequence[Rule]) -> list[_Work]:
    """The weights whose columns can make up for what goes."""
    modules = dict(named_layers(model))
    return [
        _Work(rule, place, view, modules[view.target.module_name])
        for rule in rules
        for place, group in enumerate(rule.groups)
        for view in group.compensated
    ]


def _check_biases(model: PreTrainedModel, work: Sequence[_Work]) -> None:
    """Raise if an update changes the bias of a layer that has none.

    Raises:
        ConfigError: it does; names the layer, and the settings of the model's config by which it would have one.
    """
    switches = [f"{name}=True" for name, value in model.config.to_dict().items() if name.endswith("_bias") and value is False]
    for item in work:
        if item.rule.update.moves_bias and item.bias is None:
            ways = "use 'least_squares' or 'obs'"
            if switches:
                ways += f", or load the model with {', '.join(switches)}, which gives it biases of zero"
            allowed = f"changes the bias, and {item.name!r} has none; {ways}."
            raise ConfigError(f"{item.rule.name}.update", item.rule.settings.update, allowed)


@contextmanager
def _undone_on_error(rules: Sequence[Rule], work: Sequence[_Work]) -> Iterator[int]:
    """Put all weights back if something goes wrong inside, Ctrl-C included. Gives the bytes of the copy that this takes."""
    changed = {id(target.parameter): target.parameter for rule in rules for target in rule.targets}
    changed |= {id(item.bias): item.bias for item in work if item.bias is not None}
    kept = [(parameter, parameter.detach().clone()) for parameter in changed.values()]
    try:
        yield sum(value.nbytes for _, value in kept)
    except BaseException:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        raise
    finally:
        for rule in rules:
            rule.seen.detach()


@contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and keeps no cache."""
    modes = {module: module.training for module in model.modules()}
    cached = getattr(model.config, "use_cache", None)
    model.eval()  # type: ignore[no-untyped-call]
    if cached is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if cached is not None:
            model.config.use_cache = cached


def _choose(
    model: PreTrainedModel,
    rules: list[Rule],
    rows: Rows,
    passes: _Passes,
    labels: bool,
    seed: int,
    cost_targets: Sequence[float],
    search: int,
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Score all units of the dense model and spend the budgets; one of time is fitted to the sizes that come out.

    Returns:
        What the scores of the units that go add up to; and of budgets that were searched the divergence before and after, by name.
    """
    measured = [rule for rule in rules if rule.criterion.scores_remainders]
    if measured:
        passes.score(seed)
    score_absences(model, [rule for rule in rules if rule.criterion.scores_absences], rows)
    others = [rule for rule in rules if rule not in measured]
    with ExitStack() as stack:
        for rule in others:
            stack.enter_context(rule.seen.calibrating())
        if any(rule.criterion.reads_gradients for rule in others):
            _observe(model, others, rows, labels, _generator(model, seed))
        elif any(rule.criterion.activations for rule in others):
            for batch in rows.batches:
                model(**batch)
    predicted, searched = 0.0, {}
    for budget in make_budgets(rules):
        costs = [rule.criterion.scores(group) for rule in budget.rules for group in rule.groups]
        if search and _is_searchable(budget, passes.work):
            searched[budget.name] = _search(budget, passes, search, seed)
        if budget.costs.setting is not None:
            budget.fit(model, cost_targets, scored=True)
        chosen = budget.allocate(1)
        predicted += sum(float(cost[~stay].sum()) for cost, stay in zip(costs, (stay for kept in chosen for stay in kept)))
        for rule, kept in zip(budget.rules, chosen):
            rule.keep(kept)
    return predicted, searched


def _search(budget: Budget, passes: _Passes, tries: int, seed: int) -> tuple[float, float]:
    """Weigh the costs of a budget's groups so that the model with what is left is nearest to the dense one; its divergence before
    and after."""
    groups = [(rule, group) for rule in budget.rules for group in rule.groups]
    costs = [rule.criterion.state[group.name] for rule, group in groups]

    def weigh(weights: Tensor) -> None:
        for (rule, group), cost, weight in zip(groups, costs, weights.tolist()):
            rule.criterion.state[group.name] = weight * cost

    with passes.stitched() as divergence_without:

        def loss(weights: Tensor) -> float:
            weigh(weights)
            kept = (stay for rule_kept in budget.allocate(1) for stay in rule_kept)
            return divergence_without({group.name: stay for (_, group), stay in zip(groups, kept)})

        generator = torch.Generator().manual_seed(seed)
        best, before, after = search_weights(len(groups), passes.progress(range(tries)), loss, generator)
    weigh(best)
    return before, after


def _generator(model: PreTrainedModel, seed: int) -> torch.Generator:
    return torch.Generator(device=model.device).manual_seed(seed)


def _observe(model: PreTrainedModel, rules: Sequence[Rule], rows: Rows, labels: bool, generator: torch.Generator) -> None:
    """Let criteria see the gradients of each batch."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for batch in rows.batches:
            model.zero_grad()
            with torch.enable_grad():
                rows_of = len(next(iter(batch.values())))
                loss: Tensor = model(**batch).loss if labels else probe(model, batch, generator) / rows_of
                loss.backward()  # type: ignore[no-untyped-call]
            for rule in rules:
                rule.criterion.begin_step(1.0)
                for group in rule.groups:
                    rule.criterion.observe(group)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Passes:
    """The passes through a model's layers.

    Args:
        model: the model.
        rules: the rules at work.
        rows: the calibration rows.
        work: the weights to be updated.
        database: what was measured already, or where that goes.
        folder: where hidden states go.
        progress: see [`prune`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rules: list[Rule],
        rows: Rows,
        work: list[_Work],
        database: Database | None,
        folder: str | Path | None,
        progress: Callable[[range], Iterable[int]],
    ) -> None:
        self._model, self._rules, self._rows, self.work, self.progress = model, rules, rows, work, progress
        self._database, self._folder = database, folder
        #: Module name → what an error of its output costs.
        self._cares: dict[str, Importance] = {}
        self.extra_bytes = 0
        self._lists: list[list[nn.Module]] = [
            list(layers)
            for path in spec_for(model.config.model_type).layers
            for layers in layer_lists(model, path).values()
            if len(layers)
        ]
        is_walked = any(item.is_measured for item in work) and not (database and database.is_measured)
        passes = 1 + is_walked
        self._ticks = iter(progress(range(passes * sum(map(len, self._lists)))))

    def score(self, seed: int) -> None:
        """What it costs to take away each unit, from the dense model's activations, layer by layer; kept by the criteria.

        Costs within a block are exact to second order, but blocks differ in how errors of different tokens add up. So each block's
        costs are brought to the divergence that is measured when it alone is pruned to its target. All these measurements
        together take as many rows as there are.

        Args:
            seed: of the weights of logits that are drawn.
        """
        for item in self.work:
            if item.rule.criterion.scores_remainders and not item.is_measured:
                item.rule.criterion.state[item.group.name] = torch.zeros((), device=item.group.device).expand(item.group.num_units)
        items = {item.name: item for item in self.work if item.is_measured}
        if not items:
            return
        probe = self._rows.some(max(self._rows.number // max(len(self.work), 1), 1))
        dense = predictions(self._model, probe)
        if self._database is not None and self._database.is_measured:
            for item in items.values():
                measured = self._database.load(item.name, self._model.device)
                self._cares[item.name] = measured.importance
                self._rank(item, measured, probe, dense)
            return
        watched = {name: item.module for name, item in items.items()}
        # What a decoder reads of an encoder comes into its layers at the side, so there the whole graph is kept.
        chain = self._lists[0] if len(self._lists) == 1 else []
        self._cares = importance(self._model, self._rows.batches, watched, _generator(self._model, seed), chain)
        with nullcontext(None) if self._database is None else self._database.written() as save:
            for name, measured in self._measure():
                if save is not None:
                    save(name, measured)
                self._rank(items[name], measured, probe, dense)

    def _measure(self) -> Iterator[tuple[str, Measured]]:
        """What there is to know of each weight whose units are to be scored, by name; layer by layer."""
        for layers in self._lists:
            stream = Stream(self._folder)
            calls = record(self._model, self._rows.batches, layers, stream)
            for layer, layer_calls in zip(layers, calls):
                next(self._ticks, None)

                def through(
                    index: int, layer: nn.Module = layer, calls: Sequence[Call] = layer_calls, stream: Stream = stream
                ) -> None:
                    stream.replace(index, run(layer, stream[index], calls[index]))

                yield from self._measure_on(through, self._inside(layer), stream.nbytes)
        yield from self._measure_on(self._run, self._outside(), 0)

    def _measure_on(self, forward: Callable[[int], object], items: Sequence[_Work], streams: int) -> Iterator[tuple[str, Measured]]:
        """The same of some weights, on batches that `forward` runs."""
        items = [item for item in items if item.is_measured]
        sites, importances = [Site(item.module) for item in items], [self._importance(item) for item in items]
        found = moments_during(forward, sites, self._rows, importances)
        self._check(items, found, streams)
        for item, (moments, _) in zip(items, found):
            scale = self._scale(item) / self._rows.number
            costs = removal_costs(item.view, item.matrix() * scale.sqrt()[:, None], moments.inputs)
            yield item.name, Measured(costs, moments.inputs, moments.tokens, self._cares[item.name])

    def _rank(self, item: _Work, measured: Measured, probe: Rows, dense: Sequence[Prediction]) -> None:
        """Keep the costs of a weight's units, brought to the model's divergence when the cheapest go and the others make up for
        them."""
        costs = measured.costs
        number = min(max(round(item.rule.settings.sparsity * len(costs)), 1), item.group.max_removable)
        kept = torch.ones(len(costs), dtype=torch.bool, device=costs.device)
        kept[costs.argsort(stable=True)[:number]] = False
        old, values = item.matrix(), [parameter.detach().clone() for parameter in item.parameters]
        moments = Moments.of(old, measured.inputs, measured.tokens)
        try:
            item.fill(item.rule.update.compute(old, moments, self._gone(item, old, kept)))
            actual = divergence(self._model, probe, dense)
        finally:
            item.restore(values)
        estimated = float(costs[~kept].sum())
        assert actual is not None
        item.rule.criterion.state[item.group.name] = costs * (actual / estimated if estimated > 0 else 1.0)

    @contextmanager
    def stitched(self) -> Iterator[Callable[[Mapping[str, Tensor]], float]]:
        """Inside, the divergence of the model with those units of each group that are given, by name: weights that can make up for
        the others, each as if all before it were dense. Afterwards the model is as it was."""
        assert self._database is not None
        database, probe = self._database, self._rows.some(_SEARCH_ROWS)
        dense, items = predictions(self._model, probe), [item for item in self.work if item.is_measured]
        values = {item.name: [parameter.detach().clone() for parameter in item.parameters] for item in items}
        stitched = {item.name: torch.ones_like(item.kept) for item in items}

        def of(kept: Mapping[str, Tensor]) -> float:
            for item in items:
                stay = kept.get(item.group.name, stitched[item.name])
                if not stay.equal(stitched[item.name]):
                    item.restore(values[item.name])
                    old, measured = item.matrix(), database.load(item.name, self._model.device)
                    moments = Moments.of(old, measured.inputs, measured.tokens)
                    item.fill(item.rule.update.compute(old, moments, self._gone(item, old, stay)))
                    stitched[item.name] = stay
            found = divergence(self._model, probe, dense)
            assert found is not None
            return found

        self.extra_bytes = max(self.extra_bytes, sum(value.nbytes for parts in values.values() for value in parts))
        try:
            yield of
        finally:
            for item in items:
                item.restore(values[item.name])

    def _run(self, index: int) -> None:
        """The whole model on a batch."""
        self._model(**self._rows.batches[index])

    def update(self) -> list[PrunedModule]:
        """Go through the layers in order and let the weights that stay make up for those that go."""
        done: dict[str, PrunedModule] = {}
        if any(item.is_solved for item in self.work):
            self._solve(done)
        for rule in self._rules:
            for group, kept in zip(rule.groups, rule.kept):
                done.setdefault(group.name, PrunedModule(group.name, group.num_units, int(kept.sum())))
        return list(done.values())

    def _solve(self, done: dict[str, PrunedModule]) -> None:
        """The pass through the layers; adds what was done to `done`."""
        dense: list[tuple[Stream, list[list[Call]]]] = []
        is_aimed = any(item.rule.update.dense_target for item in self.work)
        for layers in self._lists:
            stream = Stream(self._folder)
            dense.append((stream, record(self._model, self._rows.batches, layers, stream)))
        for number, (layers, (wanted, dense_calls)) in enumerate(zip(self._lists, dense)):
            stream, calls = Stream(self._folder), dense_calls
            if number:  # what comes before is pruned by now
                calls = record(self._model, self._rows.batches, layers, stream)
            else:
                stream = wanted.copy(self._folder)
            for layer, layer_calls, layer_dense in zip(layers, calls, dense_calls):
                next(self._ticks, None)
                items = self._inside(layer)
                aims = [item.rule.update.dense_target for item in items]
                sites = [
                    find_site(layer, item.module, wanted[0], layer_dense[0]) if aim else Site(item.module)
                    for item, aim in zip(items, aims)
                ]
                wants = [site for site, aim in zip(sites, aims) if aim]
                at = iter(advance(layer, wanted, layer_dense, wants) if is_aimed else ())
                inputs = same_inputs(layer, [item.module for item in items], stream[0], layer_calls[0])
                seen: dict[object, tuple[Moments, Moments]] = {}
                for item, site, aim in zip(items, sites, aims):
                    target, weights = next(at) if aim else None, self._importance(item)
                    if target is not None or not item.kept.all():
                        same = None if aim or weights else (inputs[item.module], item.bias is None)
                        if same in seen:  # as those of query, key and value are
                            kept, held_out = (part.without_target(item.matrix()) for part in seen[same])
                            found = kept, held_out
                        else:
                            found = moments_at(site, layer, stream, layer_calls, self._rows, target, weights)
                        if same is not None:
                            seen[same] = found
                        self._check([item], [found], sum(part.nbytes for part in target or ()) + wanted.nbytes + stream.nbytes)
                        done[item.group.name] = self._update(item, *found, toward_dense=aim)
                advance(layer, stream, layer_calls)
        for item in self._outside():
            found = moments_during(self._run, [Site(item.module)], self._rows, [self._importance(item)])[0]
            self._check([item], [found], 0)
            done[item.group.name] = self._update(item, *found)
        next(self._ticks, None)  # the last layer is done

    def _update(self, item: _Work, moments: Moments, held_out: Moments, toward_dense: bool = False) -> PrunedModule:
        """Choose a group's units again where its criterion can, solve for what stays, and judge that on the rows held out."""
        number, gone = item.group.num_units, int((~item.kept).sum())
        old = item.matrix()
        if item.rule.criterion.scores_remainders and (item.view.owns_columns or item.rule.update.in_order) and gone:
            inverted = inverse(moments.inputs, damping(moments.inputs, DAMPING))
            whole = aimed(old, moments, inverted) if toward_dense else old
            if item.view.owns_columns:
                order, _ = elimination(whole * self._scale(item).sqrt()[:, None], inverted, item.view.columns, gone)
                item.kept = torch.ones_like(item.kept).index_fill_(0, order, False)
            else:
                others = self._gone(item, old, torch.ones_like(item.kept))
                item.kept = kept_in_order(item.view, item.group.n_of_m, whole, inverted, gone, others)
        removed = self._gone(item, old, item.kept)
        masked = zero(old, None, removed)
        new = item.rule.update.compute(old, moments, removed)
        judged = held_out if held_out.tokens else moments
        whole_error = max(float(judged.targets.sum()), torch.finfo(torch.float64).tiny)
        errors = [float(judged.errors(matrix).sum()) / whole_error for matrix in (masked, new)]
        updated = errors[1] < errors[0] and bool(torch.isfinite(new).all())
        item.write(new if updated else masked)
        return PrunedModule(item.group.name, number, number - gone, errors[0], errors[1 if updated else 0], updated)

    def _gone(self, item: _Work, matrix: Tensor, kept: Tensor) -> Tensor:
        """What of a weight goes when the units `kept` stay, what other rules take of it included; bool `[out, in (+ 1)]`."""
        gone = ~item.view.spread(kept)
        for rule in self._rules:
            for group, others in zip(rule.groups, rule.kept):
                for view in group.weights if group is not item.group else ():
                    if view.target.parameter is item.view.target.parameter:
                        gone |= ~view.spread(others)
        return torch.cat([gone, gone.new_zeros(len(gone), matrix.shape[1] - gone.shape[1])], dim=1)

    def _check(self, items: Sequence[_Work], found: Sequence[tuple[Moments, Moments]], streams: int) -> None:
        """Note the memory that is taken, and raise where something is not finite.

        Raises:
            ConfigError: something that flows into a module, or out of it, is NaN or infinite.
        """
        self.extra_bytes = max(self.extra_bytes, streams + sum(part.nbytes for parts in found for part in parts))
        for item, parts in zip(items, found):
            if not all(bool(torch.isfinite(part.inputs).all() and torch.isfinite(part.targets).all()) for part in parts):
                allowed = f"gives NaN or infinity on the calibration rows, in {item.name!r} or before it."
                raise ConfigError("model", type(self._model).__name__, allowed)

    def _inside(self, layer: nn.Module) -> list[_Work]:
        """The work in a layer, in the order in which the layer runs its modules."""
        modules = {module: index for index, module in enumerate(layer.modules())}
        return sorted((item for item in self.work if item.module in modules), key=lambda item: modules[item.module])

    def _outside(self) -> list[_Work]:
        """The work in no layer."""
        layers = {module for layers in self._lists for layer in layers for module in layer.modules()}
        return [item for item in self.work if item.module not in layers]

    def _importance(self, item: _Work) -> list[Tensor] | None:
        """How much each token of each batch counts in the sums of a module; None: all alike."""
        return token_weights(self._cares[item.name].tokens) if item.name in self._cares else None

    def _scale(self, item: _Work) -> Tensor:
        """What each output of a module matters: half its share of Σᵢ gᵢ², so that Σ scale·importance·δ² is in nats; `[out]`."""
        outputs = item.view.target.shape[0]
        if item.name not in self._cares:
            return torch.ones(outputs, dtype=torch.float64, device=item.view.target.parameter.device)
        squares = self._cares[item.name].outputs
        return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny) / 2
