"""The pruner in a plain loop: the matrix of patterns, criteria, schedules and scopes, and what must hold whatever the setting."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import snapshot, tiny_bert
from models import ragged_batch
from rich.console import Console
from tables import CRITERIA, PATTERNS, SCHEDULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune import ConfigError, Pruner, PruningConfig, condense, sparsity_report
from hf_prune.settings.config import CONFLICTS
from hf_prune.settings.patterns import parse_pattern

SCOPES = ["row", "local", "global"]
STEPS = 8
RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"


def valid(pattern: str, criterion: str, schedule: str, scope: str) -> bool:
    values = {"pattern": parse_pattern(pattern).form, "criterion": criterion, "schedule": schedule, "scope": scope}
    return not any(values[field] in named and values[other] in others for field, named, other, others, _ in CONFLICTS)


ALL = [row for row in itertools.product(PATTERNS, CRITERIA, SCHEDULES, SCOPES) if valid(*row)]


def pairwise(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A few rows that hold every pair of values that any row holds."""
    missing = {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & set(itertools.combinations(enumerate(row), 2))))
        missing -= set(itertools.combinations(enumerate(best), 2))
        chosen.append(best)
    return chosen


def loop(model: PreTrainedModel, config: PruningConfig, steps: int = STEPS, **kwargs: Any) -> list[float]:
    """Train with AdamW and weight decay; the sparsity after each step."""
    pruner = Pruner(model, config, total_steps=steps, **kwargs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    sparsity = []
    for step in range(steps):
        batch = ragged_batch(model, seed=step) | {"labels": torch.tensor([0, 1, 1, 0])}
        model.train()(**batch).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        sparsity.append(pruner.reached_sparsity())
    pruner.finish()
    return sparsity


def check(pattern: str, criterion: str, schedule: str, scope: str) -> None:
    model = tiny_bert(num_hidden_layers=2)
    before = snapshot(model)
    target = 0.25 if pattern == "1:4" else 0.5
    config = PruningConfig(
        pattern=pattern,
        criterion=criterion,
        schedule=schedule,
        scope=scope,
        target_sparsity=target,
        frequency=2,
        warmup_steps=1,
        cooldown_steps=2,
    )
    pruner = Pruner(model, config, total_steps=STEPS)
    groups = pruner.rules[0].groups
    names = {view.target.name for group in groups for view in (*group.weights, *group.biases)}
    pruner.release()
    sparsity = loop(model, config)
    # The count is exact to within one unit, of the group under local scope, of the rule under global scope.
    total = sum(group.size for group in groups)
    unit = max(group.unit_size for group in groups)
    slack = unit if scope == "global" else sum(group.unit_size for group in groups)
    assert abs(sparsity[-1] * total - target * total) <= slack
    if scope != "global":
        for group in groups:
            dead = group.reduce(lambda t: t.matrix(t.parameter.detach() == 0), "mean") == 1
            assert int(dead.sum()) == round(target * group.num_units)
    # It never falls, except where weights may come back, and is frozen in cool-down.
    if "movement" not in criterion:
        assert sparsity == sorted(sparsity)
    assert sparsity[-3] == sparsity[-1]
    assert sparsity[0] == 0 or schedule == "constant"
    if pattern in ("2:4", "1:4"):
        n, m = map(int, pattern.split(":"))
        for group in groups:
            zeros = (group.weights[0].target.parameter == 0).view(-1, m).sum(dim=1)
            assert int(zeros.max()) <= n
            if scope != "global":
                assert zeros.unique().tolist() == [n]
    # Nothing else was zeroed, and everything else was trained.
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter == 0, before[name] == 0)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items() if name not in names)


@pytest.mark.parametrize(("pattern", "criterion", "schedule", "scope"), pairwise(ALL))
def test_pairs_of_settings(pattern: str, criterion: str, schedule: str, scope: str) -> None:
    check(pattern, criterion, schedule, scope)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "criterion", "schedule", "scope"), ALL)
def test_all_settings(pattern: str, criterion: str, schedule: str, scope: str) -> None:
    check(pattern, criterion, schedule, scope)


# ------------------------------------------------------------------------------------------------------------------ semantics


def test_masked_weights_are_zero_after_every_step_and_the_optimizer_cannot_revive_them() -> None:
    model = tiny_bert(num_hidden_layers=1)
    pruner = Pruner(model, PruningConfig(pattern="4x1", frequency=1, cooldown_steps=0.5), total_steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    gone = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in pruner.weights}
    for step in range(12):
        model.train()(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        pruner.observe()
        for name, zeros in gone.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert not bool(gradient[zeros].any())
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        for name, zeros in gone.items():
            assert not bool(model.get_parameter(name)[zeros].any())
            gone[name] = model.get_parameter(name) == 0
    assert all(bool(zeros.any()) for zeros in gone.values())


def test_movement_lets_weights_come_back_with_the_values_they_left_with() -> None:
    model = tiny_bert(num_hidden_layers=1)
    config = PruningConfig(pattern="1x1", criterion="movement", frequency=1, schedule="linear", warmup_steps=0)
    pruner = Pruner(model, config, total_steps=10)
    rule = pruner.rules[0]
    parameter, group = rule.groups[0].weights[0].target.parameter, rule.groups[0]
    left_with = parameter.detach().clone()
    torch.manual_seed(0)
    for seed in range(6):
        # Scores of our own choice, so that many weights go and come back; no optimizer moves the weights in between.
        for other in rule.groups:
            rule.criterion.state[other.name] = torch.randn(other.num_units, generator=torch.Generator().manual_seed(seed))
        pruner.step()
        kept = rule.kept[0].view_as(parameter)
        assert torch.equal(parameter.detach(), left_with * kept)
        assert 0 < int(kept.sum()) < kept.numel()
    assert group.name == rule.groups[0].name


def test_lottery_tickets_rewind_every_weight_that_is_left() -> None:
    model = tiny_bert(num_hidden_layers=1)
    config = PruningConfig(pattern="1x1", schedule="lottery", frequency=2, warmup_steps=2, cooldown_steps=0)
    pruner = Pruner(model, config, total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    start: dict[str, Tensor] = {}
    for step in range(1, 9):
        model.train()(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step == 2:
            start = snapshot(model)
        if step in (4, 6, 8):
            for name, parameter in model.named_parameters():
                kept = parameter != 0 if name in pruner.weights else torch.ones_like(parameter, dtype=torch.bool)
                assert torch.equal(parameter.detach(), start[name] * kept), name
    assert pruner.reached_sparsity() == pytest.approx(0.5, abs=1e-4)
    assert not any(name.startswith("rewind/") for name in pruner.state_dict())


def test_nested_rules_multiply_and_the_union_is_counted() -> None:
    model = tiny_bert(num_hidden_layers=1)
    config = PruningConfig(
        rules=[{"pattern": "head", "target_sparsity": 0.5}, {"pattern": "2:4", "target_modules": r".*\.self\.(query|key|value)"}],
        frequency=1,
    )
    pruner = Pruner(model, config, total_steps=3)
    for step in range(3):
        model.train()(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        pruner.observe()
        pruner.step()
    query = model.bert.encoder.layer[0].attention.self.query.weight
    rows = (query == 0).all(dim=1)
    assert int(rows.sum()) == 16
    assert (query[~rows] == 0).view(-1, 4).sum(dim=1).unique().tolist() == [2]
    zeros = sum(int((p == 0).sum()) for p in (model.get_parameter(name) for name in pruner.weights))
    assert pruner.reached_sparsity() == zeros / sum(model.get_parameter(name).numel() for name in pruner.weights)
    # q, k, v: half the heads and half of the rest; o: half.
    assert pruner.target_sparsity() == pytest.approx(1 - (3 * 0.25 + 0.5) / 4)
    assert pruner.reached_sparsity() == pytest.approx(pruner.target_sparsity())


def test_the_mixed_example_of_the_inc_walkthrough() -> None:
    config = PruningConfig.from_json_file(RECIPES / "inc_mixed.json")
    model = tiny_bert(num_hidden_layers=2)
    loop(model, config, steps=32, steps_per_epoch=4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sparsity = float((module.weight == 0).float().mean())
            if name.endswith(("query", "key", "value")):
                assert 0.5 - 0.01 <= sparsity <= 0.98
            elif "pooler" in name or "classifier" in name:
                assert sparsity == 0
            else:
                assert sparsity == pytest.approx(0.9, abs=1e-3)


def test_thresholds() -> None:
    model = tiny_bert(num_hidden_layers=1)
    cut = 0.1
    config = PruningConfig(
        pattern="1x1", criterion="magnitude", scope="threshold", threshold=cut, schedule="constant", max_sparsity_per_module=1.0
    )
    wanted = {
        name: (p.detach().abs() > cut) * p.detach() for name, p in model.named_parameters() if "encoder" in name and p.ndim == 2
    }
    pruner = Pruner(model, config, total_steps=2)
    pruner.step()
    for name, value in wanted.items():
        assert torch.equal(model.get_parameter(name).detach(), value)


def test_normalization_makes_layers_of_different_scale_comparable() -> None:
    def removed(normalization: str) -> list[float]:
        model = tiny_bert(num_hidden_layers=2)
        with torch.no_grad():
            model.bert.encoder.layer[0].intermediate.dense.weight.mul_(100)
            model.bert.encoder.layer[0].output.dense.weight.mul_(100)
        config = PruningConfig(pattern="neuron", criterion="magnitude", normalization=normalization, schedule="constant")
        pruner = Pruner(model, config, total_steps=2)
        pruner.step()
        return [float((~kept).float().mean()) for kept in pruner.rules[0].kept]

    assert removed("none") == pytest.approx([0.025, 0.975], abs=0.001)  # the cap of 0.98 leaves one of 40 neurons
    for normalization in ("mean", "l2"):
        assert removed(normalization) == pytest.approx([0.5, 0.5], abs=0.2)


# --------------------------------------------------------------------------------------------------- starting from a sparse model


def sparse_model(pattern: str = "2:4") -> PreTrainedModel:
    model = tiny_bert(num_hidden_layers=1)
    pruner = Pruner(model, PruningConfig(pattern=pattern, criterion="magnitude", scope="local", schedule="constant"), total_steps=2)
    pruner.step()
    pruner.finish()
    return model


@pytest.mark.parametrize("pattern", ["2:4", "1xchannel", "1x1"])
def test_keep_zeros_alone_fine_tunes_a_sparse_model(pattern: str) -> None:
    model = sparse_model(pattern)
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters()}
    assert loop(model, PruningConfig(keep_zeros=True)) == [0.5] * STEPS
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter == 0, zeros[name]), name


def test_existing_zeros_count_from_the_start() -> None:
    model = sparse_model("4x1")
    before = {name: parameter == 0 for name, parameter in model.named_parameters()}
    config = PruningConfig(pattern="4x1", initial_sparsity="from_model", target_sparsity=0.8, frequency=1, criterion="random")
    sparsity = loop(model, config)
    assert sparsity[0] >= 0.5
    assert sparsity == sorted(sparsity)
    assert sparsity[-1] == pytest.approx(0.8, abs=1e-3)
    for name, parameter in model.named_parameters():
        assert bool((parameter == 0)[before[name]].all())


def test_heads_then_2_4_in_a_condensed_model() -> None:
    model = tiny_bert(num_hidden_layers=1)
    loop(model, PruningConfig(pattern="head", frequency=1))
    condense(model)
    assert loop(model, PruningConfig(pattern="2:4", frequency=1, scope="local"))[-1] == 0.5


# ------------------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_names_every_module_or_its_reason() -> None:
    model = tiny_bert(num_hidden_layers=1, intermediate_size=42)
    plan = Pruner(model, PruningConfig(pattern="4x1", target_sparsity=0.7), total_steps=2).plan()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {group.name for group in plan.groups} | set(plan.left_out) == linears
    assert plan.left_out["bert.encoder.layer.0.intermediate.dense"] == "its shape 42x32 is not divisible by 4x1"
    assert "not part of the model's body" in plan.left_out["classifier"]
    assert {group.sparsity for group in plan.groups} == {0.7}
    text = str(plan)
    for name in linears:
        assert name in text
    assert plan.to_dict()["groups"][0]["pattern"] == "4x1"


@pytest.mark.parametrize("pattern", ["head", "neuron", "1x1"])
def test_a_plan_in_80_columns_cuts_no_name(pattern: str) -> None:
    model = models.tiny("bert", num_hidden_layers=11, intermediate_size=3072)
    plan = Pruner(model, PruningConfig(pattern=pattern, scope="threshold", threshold=0.5), total_steps=1000).plan()
    console = Console(width=80, file=io.StringIO())
    console.print(plan, sparsity_report(model))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    starts = [line.split()[0] for line in text.splitlines() if line.strip()]
    folded = "".join(starts)  # a name that is folded goes on at the start of the next line
    for name in (*(group.name for group in plan.groups), *plan.left_out):
        assert name in folded


def test_frozen_modules_are_left_out_of_gradient_criteria_and_counts_stay_exact() -> None:
    model = tiny_bert(num_hidden_layers=2)
    model.bert.encoder.layer[0].requires_grad_(False)
    config = PruningConfig(pattern="1x1", frequency=1)
    plan = Pruner(model, config, total_steps=2).plan()
    assert "frozen" in plan.left_out["bert.encoder.layer.0.output.dense"]
    assert loop(model, config)[-1] == pytest.approx(0.5, abs=1e-4)
    assert bool((model.bert.encoder.layer[0].output.dense.weight != 0).all())


def test_modules_that_share_a_weight_are_one_target() -> None:
    model = tiny_bert(num_hidden_layers=2)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    pruner = Pruner(model, PruningConfig(pattern="1x1", criterion="magnitude", schedule="constant", scope="local"), total_steps=2)
    pruner.step()
    assert [group.name for group in pruner.rules[0].groups].count("bert.encoder.layer.1.intermediate.dense") == 0
    assert int((first.weight == 0).sum()) == round(0.5 * first.weight.numel())


def test_sparse_gradients_of_embeddings() -> None:
    model = tiny_bert(num_hidden_layers=1)
    embeddings = model.bert.embeddings.word_embeddings
    embeddings.sparse = True
    pruner = Pruner(model, PruningConfig(pattern="head", frequency=1), total_steps=2)
    batch = ragged_batch(model) | {"labels": torch.zeros(4, dtype=torch.long)}
    for _ in range(2):
        model(**batch).loss.backward()
        assert embeddings.weight.grad.is_sparse
        pruner.observe()
        pruner.step()
        model.zero_grad()
    pruner.finish()
    assert pruner.reached_sparsity() == 0.5
    pruner = Pruner(model, PruningConfig(pattern="head", frequency=1), total_steps=2)
    (model(**batch).loss * model.bert.embeddings.word_embeddings.weight[batch["input_ids"][0, 0], 0] * torch.inf).backward()
    with pytest.raises(FloatingPointError):
        pruner.observe()


def test_a_nan_names_the_module() -> None:
    model = tiny_bert(num_hidden_layers=1)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    pruner = Pruner(model, PruningConfig(pattern="1x1", criterion="magnitude", schedule="constant"), total_steps=2)
    with pytest.raises(ValueError, match=r"'bert\.encoder\.layer\.0\.output\.dense'"):
        pruner.step()


def test_a_loop_that_forgets_the_pruner_fails_loudly() -> None:
    pruner = Pruner(tiny_bert(num_hidden_layers=1), PruningConfig(pattern="head", schedule="constant"), total_steps=2)
    pruner.steps = 2
    with pytest.raises(RuntimeError, match="no weight is zero after 2 steps"):
        pruner.finish()


def test_two_pruners_on_one_model_are_an_error() -> None:
    model = tiny_bert(num_hidden_layers=1)
    attached = Pruner(model, PruningConfig(pattern="head"), total_steps=2)
    with pytest.raises(RuntimeError, match=r"call its finish\(\) or release\(\) first"):
        Pruner(model, PruningConfig(pattern="head"), total_steps=2)
    attached.release()
    Pruner(model, PruningConfig(pattern="head"), total_steps=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "fpgm", "pattern": "4x1"},
        {"criterion": "apoz", "pattern": "2:4"},
        {"criterion": "mean_activation", "pattern": "channelx1"},
        {"scope": "local", "pattern": "layer"},
        {"schedule": "lottery", "criterion": "movement", "pattern": "1x1"},
    ],
)
def test_settings_that_make_no_sense_together(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="does not go with"):
        PruningConfig(**settings)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", ["cubic", "lottery"])
def test_state_goes_on_exactly(criterion: str, schedule: str) -> None:
    """Stop in the middle, load everything into new objects, go on: the same weights bit for bit."""
    if "movement" in criterion and schedule == "lottery":
        pytest.skip("an error, tested above")
    pattern = "neuron" if criterion in ("fpgm", "apoz", "mean_activation", "flap", "kprune") else "4x1"
    pattern, layers = ("layer", 2) if criterion == "block_influence" else (pattern, 1)
    config = PruningConfig(pattern=pattern, criterion=criterion, schedule=schedule, frequency=3)

    def run(model: PreTrainedModel, pruner: Pruner, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            model.train()(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            pruner.observe()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    whole = tiny_bert(num_hidden_layers=layers)
    run(whole, Pruner(whole, config, total_steps=9), torch.optim.AdamW(whole.parameters()), 0, 9)

    half = tiny_bert(num_hidden_layers=layers)
    pruner, optimizer = Pruner(half, config, total_steps=9), torch.optim.AdamW(half.parameters())
    run(half, pruner, optimizer, 0, 5)
    rest = tiny_bert(num_hidden_layers=layers, seed=7)
    rest.load_state_dict(half.state_dict())
    second, new_optimizer = Pruner(rest, config, total_steps=9), torch.optim.AdamW(rest.parameters())
    second.load_state_dict({name: value.clone() for name, value in pruner.state_dict().items()})
    new_optimizer.load_state_dict(optimizer.state_dict())
    run(rest, second, new_optimizer, 5, 9)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, rest.get_parameter(name)), name


def test_metrics_are_the_sparsities() -> None:
    """Weights of the body that no rule names, and named ones outside of it, count where they belong."""
    model = models.tiny("bert")
    config = PruningConfig(pattern="1x1", target_sparsity=0.5, schedule="constant", target_modules=r"(.*query|classifier)")
    pruner = Pruner(model, config, total_steps=10)
    model(**models.ragged_batch(model)).logits.sum().backward()
    for _ in range(3):
        pruner.observe()
        pruner.step()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0] = 0
    metrics = pruner.metrics()
    assert metrics["sparsity"] == pruner.sparsity() > 0
    assert metrics["reached_sparsity"] == pruner.reached_sparsity() == pytest.approx(0.5)
    assert metrics["sparsity"] != metrics["reached_sparsity"]


@pytest.mark.parametrize("part", [(slice(None), slice(None)), (2, slice(None)), (slice(None), 2)])
def test_clipping_does_not_hide_where_a_nan_began(part: tuple[int | slice, int | slice]) -> None:
    model = models.tiny("bert")
    pruner = Pruner(model, PruningConfig(pattern="1x1", target_sparsity=0.5), total_steps=10)
    weight = model.bert.encoder.layer[1].output.dense.weight

    def broken(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[part] = torch.nan
        return gradient

    weight.register_hook(broken)
    model(**models.ragged_batch(model)).logits.sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(
        FloatingPointError, match=r"^Step 1: the gradient of 'bert\.encoder\.layer\.1\.output\.dense\.weight' is NaN"
    ):
        pruner.observe()
