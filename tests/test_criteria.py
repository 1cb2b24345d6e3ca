"""Each criterion against a slow, obvious reference in float64, on real losses of a tiny BERT."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import elements, forget_criterion, tiny_bert
from models import ragged_batch
from tables import PATTERNS, ROW_PATTERNS
from torch import Tensor, nn

from hf_prune import ConfigError, Pruner, PruningConfig
from hf_prune.model.units import UnitGroup
from hf_prune.pruning.criteria import CRITERIA, Criterion, register_criterion
from hf_prune.pruning.criteria.activations import APoZ
from hf_prune.pruning.criteria.gradients import SnipMomentum
from hf_prune.pruning.criteria.movement import Movement, SoftMovement
from hf_prune.pruning.updates import UPDATES
from hf_prune.settings.config import DECLARED
from hf_prune.settings.patterns import STRUCTURAL_PATTERNS

STEPS = 3


def by_unit(group: UnitGroup, quantity: dict[str, Tensor], how: str = "mean", names: set[str] | None = None) -> Tensor:
    """Reduce an element-wise quantity (parameter name → `[out, in]`, float64) to units by visiting each element."""
    parts: list[list[float]] = [[] for _ in range(group.num_units)]
    for unit, name, row, column in elements(group):
        if names is None or name in names:
            parts[unit].append(float(quantity[name][row, column]))
    reduced = {
        "mean": lambda values: sum(values) / len(values),
        "sum": sum,
        "l2": lambda values: sum(value * value for value in values) ** 0.5,
        "max": max,
    }
    return torch.tensor([reduced[how](values) for values in parts], dtype=torch.float64)


class Recorded:
    """Three steps of SGD on a tiny BERT with a criterion attached, weights and gradients of each step kept in float64."""

    def __init__(self, criterion: str, pattern: str, reduction: str = "mean") -> None:
        torch.manual_seed(0)
        self.model = tiny_bert(num_hidden_layers=1).train()
        scope = "threshold" if pattern in ("block", "layer") else "local"
        settings = PruningConfig(
            pattern=pattern,
            criterion=criterion,
            reduction=reduction,
            scope=scope,
            threshold=0.0 if scope == "threshold" else None,
            target_sparsity=0.5 if scope == "threshold" else 0.25,  # as much as 1:4 can have
            warmup_steps=STEPS + 1,
            target_modules=None if pattern in STRUCTURAL_PATTERNS else r".*(query|intermediate\.dense)",
        )
        pruner = Pruner(self.model, settings, total_steps=STEPS + 2)
        self.rule = pruner.rules[0]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.batches = [ragged_batch(self.model, seed=seed) | {"labels": torch.tensor([0, 1, 1, 0])} for seed in range(STEPS)]
        for batch in self.batches:
            self.before = copy.deepcopy(self.model)
            optimizer.zero_grad()
            self.model(**batch).loss.backward()
            named = dict(self.model.named_parameters())
            self.weights.append({name: parameter.detach().double() for name, parameter in named.items()})
            self.gradients.append({name: p.grad.double() for name, p in named.items() if p.grad is not None})
            pruner.observe()
            if len(self.weights) < STEPS:
                optimizer.step()
                pruner.step()

    def compare(self, reference: Callable[[UnitGroup], Tensor]) -> None:
        for group in self.rule.groups:
            torch.testing.assert_close(self.rule.criterion.scores(group).double(), reference(group), rtol=1e-4, atol=1e-9)


def products(run: Recorded, step: int) -> dict[str, Tensor]:
    return {name: run.weights[step][name] * gradient for name, gradient in run.gradients[step].items()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "l2", "max"])
def test_magnitude(pattern: str, reduction: str) -> None:
    run = Recorded("magnitude", pattern, reduction)
    absolute = {name: value.abs() for name, value in run.weights[-1].items()}
    run.compare(lambda group: by_unit(group, absolute, reduction))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient(pattern: str) -> None:
    run = Recorded("gradient", pattern)
    run.compare(lambda group: by_unit(group, {name: value.abs() for name, value in run.gradients[-1].items()}))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_snip(pattern: str) -> None:
    run = Recorded("snip", pattern)
    run.compare(lambda group: by_unit(group, {name: value.abs() for name, value in products(run, -1).items()}))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_snip_momentum(pattern: str) -> None:
    run = Recorded("snip_momentum", pattern)
    accumulated = {name: torch.zeros_like(value) for name, value in products(run, 0).items()}
    for step in range(STEPS):
        accumulated = {name: 0.9 * accumulated[name] + value.abs() for name, value in products(run, step).items()}
    run.compare(lambda group: by_unit(group, accumulated))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_taylor_sums_squares_over_steps(pattern: str) -> None:
    run = Recorded("taylor", pattern)
    total = {name: sum(products(run, step)[name].square() for step in range(STEPS)) for name in products(run, 0)}
    run.compare(lambda group: by_unit(group, total))


@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_fisher_is_the_squared_gradient_of_a_factor_on_the_units_output(pattern: str) -> None:
    run = Recorded("fisher", pattern)
    last = run.rule.groups[0].weights[-1]

    def factor_gradient(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        factors = torch.ones(run.rule.groups[0].num_units, dtype=torch.float64, requires_grad=True)
        module = model.double().get_submodule(last.target.module_name)
        handle = module.register_forward_pre_hook(lambda m, args: (args[0] * factors.repeat_interleave(last.width), *args[1:]))
        model(**batch).loss.backward()
        handle.remove()
        assert factors.grad is not None
        return factors.grad

    # `before` is the model of the last step; earlier steps are compared through the accumulated sum.
    final = factor_gradient(copy.deepcopy(run.before), run.batches[-1]).square()
    earlier = sum(by_unit(run.rule.groups[0], products(run, step), "sum", {last.target.name}).square() for step in range(STEPS - 1))
    run.compare(lambda group: final + earlier)


@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_kprune_adds_half_the_curvature_and_the_energy_of_what_a_unit_gives(pattern: str) -> None:
    run = Recorded("kprune", pattern)
    for group in run.rule.groups:
        last, (view,) = {group.weights[-1].target.name}, group.compensated
        steps = [by_unit(group, products(run, step), "sum", last).square() for step in range(STEPS)]
        squares, weight = run.rule.criterion.seen.mean("squared_inputs", view.target), run.weights[-1][view.target.name]
        energy = [
            sum(
                float(squares[column]) * float(row.square().mean())
                for column, row in enumerate(weight.T)
                if column // view.width == unit
            )
            for unit in range(group.num_units)
        ]
        expected = sum(steps) / STEPS / 2 + 2.5e-4 * torch.tensor(energy, dtype=torch.float64)
        torch.testing.assert_close(run.rule.criterion.scores(group).double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("pattern", ["1x1", "8x8", "head", "neuron"])
def test_movement_scores_follow_adam_on_the_straight_through_gradient(pattern: str) -> None:
    run = Recorded("movement", pattern)
    for group in run.rule.groups:
        score = torch.zeros(group.num_units, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([score], lr=1e-2, betas=Movement.betas, eps=Movement.epsilon)
        for step in range(STEPS):
            score.grad = by_unit(group, products(run, step), "sum")
            optimizer.step()
        torch.testing.assert_close(run.rule.criterion.scores(group).double(), score.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", ["1x1", "8x8", "head"])
def test_soft_movement_adds_the_gradient_of_its_penalty(pattern: str) -> None:
    """Against autograd through λ·r·mean σ(S), S of all groups together."""
    model = tiny_bert(num_hidden_layers=1).train()
    config = PruningConfig(
        pattern=pattern,
        criterion="soft_movement",
        regularization=50.0,
        scope="threshold",
        threshold=0.1,
        warmup_steps=0,
        cooldown_steps=0,
        frequency=100,
    )
    pruner = Pruner(model, config, total_steps=20)
    rule = pruner.rules[0]
    scores = {group.name: torch.zeros(group.num_units, dtype=torch.float64, requires_grad=True) for group in rule.groups}
    optimizer = torch.optim.Adam(scores.values(), lr=1e-2, betas=Movement.betas, eps=Movement.epsilon)
    for step in range(1, STEPS + 1):
        model.zero_grad()
        model(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        named = {name: (p.detach().double() * p.grad.double()) for name, p in model.named_parameters() if p.grad is not None}
        share = 1 - (1 - step / 20) ** 3
        optimizer.zero_grad()
        (50.0 * share * torch.cat([score.sigmoid() for score in scores.values()]).mean()).backward()
        for group in rule.groups:
            scores[group.name].grad += by_unit(group, named, "sum")
        optimizer.step()
        pruner.observe()
        pruner.step()
    for group in rule.groups:
        torch.testing.assert_close(
            rule.criterion.scores(group).double(), scores[group.name].detach().sigmoid(), rtol=1e-4, atol=1e-6
        )


def test_soft_movement_removes_more_the_larger_its_penalty() -> None:
    def sparsity(regularization: float) -> float:
        model = tiny_bert(num_hidden_layers=1).train()
        settings = {"criterion": "soft_movement", "scope": "threshold", "threshold": 0.49, "regularization": regularization}
        pruner = Pruner(model, PruningConfig(pattern="neuron", frequency=1, **settings), total_steps=30)
        for step in range(30):
            model(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            pruner.observe()
            pruner.step()
            model.zero_grad()
        return pruner.reached_sparsity()

    assert sparsity(0.0) < sparsity(1.0) < sparsity(1000.0)


@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_fpgm_sums_distances_between_rows(pattern: str) -> None:
    run = Recorded("fpgm", pattern)

    def reference(group: UnitGroup) -> Tensor:
        names = {view.target.name for view in group.weights if view.owns_rows}
        distances = {}
        for name in names:
            rows = run.weights[-1][name]
            sums = torch.stack([torch.stack([(row - other).square().sum().sqrt() for other in rows]).sum() for row in rows])
            distances[name] = sums[:, None].expand_as(rows)
        return by_unit(group, distances, "mean", names)

    run.compare(reference)


def traffic(run: Recorded, names: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers for unpadded tokens of all steps; the model of each step is made again from its weights."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for step, batch in enumerate(run.batches):
        model = copy.deepcopy(run.before).double()
        model.load_state_dict({**model.state_dict(), **run.weights[step]})
        mask = batch["attention_mask"].bool()
        handles = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
                lambda module, args, output, name=name, mask=mask: seen[name].append(
                    (args[0][mask].detach(), output[mask].detach())
                )
            )
            for name in names
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for name, parts in seen.items()}


@pytest.mark.parametrize("pattern", ROW_PATTERNS)
@pytest.mark.parametrize("criterion", ["apoz", "mean_activation"])
def test_output_activations_without_padding(pattern: str, criterion: str) -> None:
    run = Recorded(criterion, pattern)

    def reference(group: UnitGroup) -> Tensor:
        names = {view.target.name for view in group.weights if view.owns_rows}
        scores = {}
        for name, (_, outputs) in traffic(run, names).items():
            rows = (outputs > 0).double().mean(dim=0) if criterion == "apoz" else outputs.abs().mean(dim=0)
            scores[name] = rows[:, None].expand_as(run.weights[-1][name])
        return by_unit(group, scores, "mean", names)

    run.compare(reference)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda(pattern: str) -> None:
    run = Recorded("wanda", pattern)

    def reference(group: UnitGroup) -> Tensor:
        names = {view.target.name for view in group.compensated or group.weights}
        flows = traffic(run, names)
        # ‖x‖₂ as a root mean square: the number of tokens is the same for every layer.
        norms = {name: flows[name][0].square().mean(dim=0).sqrt() for name in names}
        return by_unit(group, {name: run.weights[-1][name].abs() * norms[name] for name in names}, "mean", names)

    run.compare(reference)


def test_random_is_the_same_everywhere_and_differs_between_modules() -> None:
    first, second = Recorded("random", "head"), Recorded("random", "head")
    assert torch.equal(first.rule.criterion.scores(first.rule.groups[0]), second.rule.criterion.scores(second.rule.groups[0]))
    run = Recorded("random", "1xchannel")
    scores = [run.rule.criterion.scores(group) for group in run.rule.groups]
    assert not torch.equal(scores[0], scores[1][: scores[0].numel()])


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation", "wanda"])
def test_activations_ignore_evaluation_and_recomputation(criterion: str) -> None:
    def state(checkpointing: bool, evaluate: bool) -> dict[str, Tensor]:
        model = tiny_bert(num_hidden_layers=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        pruner = Pruner(model, PruningConfig(pattern="1xchannel", criterion=criterion), total_steps=3)
        batch = ragged_batch(model) | {"labels": torch.tensor([0, 1, 1, 0])}
        if evaluate:
            model.eval()(**batch)
            model.train()
        model(**batch).loss.backward()
        pruner.observe()
        return pruner.rules[0].seen.state_dict()

    plain = state(checkpointing=False, evaluate=False)
    assert plain
    for other in (state(checkpointing=True, evaluate=False), state(checkpointing=False, evaluate=True)):
        assert other.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value)


def test_hooks_go_with_the_last_update_and_with_the_pruner() -> None:
    model = tiny_bert(num_hidden_layers=1).train()
    hooks = lambda: sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())  # noqa: E731
    before = hooks()
    pruner = Pruner(model, PruningConfig(pattern="1xchannel", criterion="wanda", frequency=1, cooldown_steps=2), total_steps=4)
    assert hooks() > before
    for _ in range(2):
        model(**ragged_batch(model), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        pruner.observe()
        pruner.step()
    assert hooks() == before
    pruner.finish()
    Pruner(model, PruningConfig(pattern="1xchannel", criterion="apoz"), total_steps=4).release()
    assert hooks() == before


def test_names_and_classes_agree() -> None:
    """What settings know before a criterion is imported, and what the criteria say of themselves."""
    script = """
import json
from hf_prune.settings.config import CRITERIA, DECLARED, UPDATES
print(json.dumps([sorted(CRITERIA), {attribute: sorted(names) for attribute, names in DECLARED.items()}, sorted(UPDATES)]))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    declared = {
        attribute: sorted(name for name, criterion in CRITERIA.items() if getattr(criterion, attribute)) for attribute in DECLARED
    }
    assert json.loads(output) == [sorted({"auto", *CRITERIA}), declared, sorted({"auto", *UPDATES})]


def test_a_criterion_of_ones_own() -> None:
    class Largest(Criterion):
        """The documentation's example: one class and one line."""

        def scores(self, group: UnitGroup) -> Tensor:
            return group.reduce(lambda target: target.matrix(target.parameter.detach()).abs(), "max")

    try:
        register_criterion("largest")(Largest)
        model = tiny_bert(num_hidden_layers=1)
        pruner = Pruner(model, PruningConfig(pattern="neuron", criterion="largest", schedule="constant"), total_steps=2)
        pruner.step()
        assert pruner.reached_sparsity() == 0.5
        with pytest.raises(ValueError, match="'snip' is taken by Snip"):
            register_criterion("snip")(Largest)
    finally:
        forget_criterion("largest")
    with pytest.raises(ConfigError, match="criterion='largest'"):
        PruningConfig(pattern="neuron", criterion="largest")


@pytest.fixture
def registered() -> Iterator[Callable[[type[Criterion]], str]]:
    """Registers a class as "mine" until the test ends."""

    def register(criterion: type[Criterion]) -> str:
        register_criterion("mine")(criterion)
        return "mine"

    yield register
    forget_criterion("mine")


class Rows(APoZ):
    """Inherits that it scores rows."""


class Back(Movement):
    """Inherits that weights come back."""


class Penalized(SoftMovement):
    """Inherits the penalty."""


class LateRows(APoZ):
    """Says itself what it cannot score."""

    scores_rows = False

    def obstacle(self, group: UnitGroup) -> str:
        return "" if any(view.owns_rows for view in group.weights) else "knows rows alone"


class RowsByItsSettings(APoZ):
    """Knows only from its settings that it scores rows."""

    scores_rows = False

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        self.scores_rows = settings.reduction == "mean"


@pytest.mark.parametrize(
    ("criterion", "settings", "message"),
    [
        (RowsByItsSettings, {"pattern": "2:4"}, "scores output rows, and no unit owns one"),
        *((Rows, {"pattern": pattern}, "scores output rows, so it needs") for pattern in ("2:4", "4x1", "channelx1", "auto")),
        *((LateRows, {"pattern": pattern}, "knows rows alone \\(pattern") for pattern in ("2:4", "4x1", "channelx1")),
        (Back, {"pattern": "head", "schedule": "lottery"}, "does not go with criterion='mine'"),
        (Rows, {"pattern": "head", "regularization": 0.1}, "belongs to criterion 'soft_movement', not to 'mine'"),
    ],
)
def test_what_a_criterion_of_ones_own_cannot_do_is_said_before_training(
    criterion: type[Criterion], settings: dict[str, Any], message: str, registered: Callable[[type[Criterion]], str]
) -> None:
    name = registered(criterion)
    with pytest.raises(ConfigError, match=message):
        Pruner(tiny_bert(num_hidden_layers=1), PruningConfig(criterion=name, **settings), total_steps=20)


def test_a_criterion_of_ones_own_has_the_settings_of_its_kind(registered: Callable[[type[Criterion]], str]) -> None:
    name = registered(Penalized)
    config = PruningConfig(pattern="head", criterion=name, scope="threshold", threshold=0.1, regularization=0.5)
    assert Pruner(tiny_bert(num_hidden_layers=1), config, total_steps=20).rules[0].criterion.regularizes


def test_scores_before_any_observation_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="no score yet"):
        SnipMomentum(PruningConfig(pattern="head")).scores(Recorded("magnitude", "head").rule.groups[0])
