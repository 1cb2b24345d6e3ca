"""Fewer layers: which go, and what is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import assert_equal, snapshot
from hypothesis import given
from hypothesis import strategies as st
from reloading import reload, save_expected
from torch import Tensor, nn

from hf_prune import ConfigError, Pruner, PruningConfig, condense, prune, shrink_depth
from hf_prune.measure.sparsity import original_blocks, total_sparsity
from hf_prune.model import find_blocks, spec_for
from hf_prune.model.blocks import layer_lists
from hf_prune.oneshot.trials import absences, greedy_absences
from hf_prune.shrink.depth import CRITERIA

TINY = {"num_hidden_layers": 5}
#: Family and pattern of units that are tried out.
UNITS = [("llama", "layer"), ("t5", "head"), ("bert", "head"), ("llama", "kv_group")]


def _depths(family: str) -> tuple[str, ...]:
    """What counts the layers of a family, if anything does."""
    return spec_for(models.EVERY_FAMILY[family]().model_type).depths


def batches(model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    return [models.ragged_batch(model, rows=6, seed=seed) for seed in range(count)]


def divergence(model: Any, other: Any, rows: list[dict[str, Tensor]]) -> float:
    """The mean over rows of KL(model ‖ other)."""
    with torch.no_grad():
        pairs = [(model(**batch).logits.double(), other(**batch).logits.double()) for batch in rows]
    old, new = (torch.cat(part).log_softmax(-1) for part in zip(*pairs))
    return float((old.exp() * (old - new)).sum(-1).mean())


def without(model: Any, gone: Collection[int]) -> Any:
    """A copy of a BERT with some layers taken out of their list by hand."""
    small = copy.deepcopy(model)
    layers = small.bert.encoder.layer
    small.bert.encoder.layer = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in gone)
    return small


def obvious(model: Any, rows: list[dict[str, Tensor]], number: int, criterion: str) -> set[int]:
    """The layers that should go, found the slow way."""

    def loss(gone: Collection[int]) -> float:
        return divergence(model, without(model, gone), rows)

    if criterion == "removal":
        return set(sorted(range(5), key=lambda index: loss([index]))[:number])
    if criterion == "consecutive":
        return set(min(([*range(start, start + number)] for start in range(6 - number)), key=loss))
    gone: list[int] = []
    if criterion == "greedy_removal":
        while len(gone) < number:
            gone.append(min(set(range(5)) - {*gone}, key=lambda index: loss([*gone, index])))
        return set(gone)
    cosines = torch.zeros(5)
    for batch in rows:
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].bool()
        cosines += torch.stack([torch.cosine_similarity(a, b, dim=-1)[mask].sum() for a, b in itertools.pairwise(hidden)])
    return set(cosines.argsort(descending=True)[:number].tolist())


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_layers_that_cost_least_go(criterion: str, number: int) -> None:
    model = models.tiny("bert", seed=3, **TINY)
    rows = [models.ragged_batch(model, rows=8, seed=1)]
    gone = obvious(model, rows, number, criterion)
    expected = without(model, gone)
    found = shrink_depth(model, 5 - number, rows, criterion=criterion)
    assert found is model
    assert model.config.num_hidden_layers == 5 - number
    assert model.config.hf_prune["removed_layers"] == {"encoder.layer": sorted(gone)}
    with torch.no_grad():
        assert model(**rows[0]).logits.equal(expected(**rows[0]).logits)


@pytest.mark.parametrize("family", sorted(models.EVERY_FAMILY))
def test_every_family(family: str, tmp_path: Any) -> None:
    """Layers go, the model trains, saves and loads as a stock one, remembers what it was, and generates."""
    model = models.tiny(family)
    if not spec_for(model.config.model_type).depths:
        with pytest.raises(ConfigError, match="cannot be counted one by one"):
            shrink_depth(model, 1, batches(model))
        return
    paths = [path for path in spec_for(model.config.model_type).layers if layer_lists(model, path)]
    before = [block.units for block in original_blocks(model)]
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    model.train()
    shrink_depth(model, dict.fromkeys(paths, 2) if len(paths) > 1 else 2, batches(model))
    assert model.training
    assert {id(parameter) for parameter in model.parameters() if not parameter.requires_grad} <= frozen
    assert [len(layers) for path in paths for layers in layer_lists(model, path).values()] == [2] * len(paths)
    assert [block.units for block in original_blocks(model)] == before
    assert total_sparsity(model) == pytest.approx(1 / 3, abs=0.15)
    model.eval().save_pretrained(tmp_path)
    assert "transformers_weights" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    batch = models.ragged_batch(model)
    with torch.no_grad():
        assert loaded(**batch)[0].equal(model(**batch)[0])
    for block in find_blocks(loaded):
        if block.kind == "feed_forward":
            models.zero_units(block, [0, 1], "out")
    alive = original_blocks(loaded)
    assert original_blocks(condense(loaded)) == alive


def test_without_hf_prune_they_are_stock_models(tmp_path: Path) -> None:
    for family in sorted(set(models.FAMILIES) - {"albert"}):
        model = models.tiny(family)
        paths = [path for path in spec_for(model.config.model_type).layers if layer_lists(model, path)]
        shrink_depth(model.eval(), dict.fromkeys(paths, 2), batches(model))
        folder = tmp_path / "first" / f"{family}-{models.HEADS[models.classifier_of(family)].__name__}"
        model.save_pretrained(folder)
        save_expected(model, folder)
    report = reload("stock", tmp_path / "first", tmp_path / "last")
    assert len(report) == len(models.FAMILIES) - 1
    assert {name: row["gap"] for name, row in report.items() if row["gap"]} == {}


@pytest.mark.parametrize("family", [family for family in sorted(models.GENERATORS) if _depths(family)])
def test_what_is_left_generates(family: str) -> None:
    model = models.tiny(family, models.GENERATORS[family])
    paths = [path for path in spec_for(model.config.model_type).layers if layer_lists(model, path)]
    shrink_depth(model, dict.fromkeys(paths, 2), batches(model))
    batch = models.ragged_batch(model)
    batch = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, plain = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert cached.equal(plain)


@pytest.mark.parametrize(
    ("family", "number", "criterion", "message"),
    [
        ("bert", 3, "removal", r"num_layers=3: must be a whole number from 1 to 2: encoder.layer has 3 layers"),
        ("bert", 0, "removal", r"num_layers=0: must be"),
        ("bert", True, "removal", r"num_layers=True: must be"),
        ("bert", 2, "removl", r"criterion='removl': must be one of .*Did you mean 'removal'"),
        ("bert", {"encoder.layers": 2}, "removal", r"num_layers='encoder.layers': is no list.*Did you mean 'encoder.layer'"),
        ("bart", 2, "removal", r"num_layers=2: must say of which layers: a dictionary with 'encoder.layers' and 'decoder.layers'"),
    ],
)
def test_what_cannot_be_is_refused(family: str, number: Any, criterion: str, message: str) -> None:
    model = models.tiny(family)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        shrink_depth(model, number, batches(model), criterion=criterion)
    assert_equal(snapshot(model), before)


def test_an_error_leaves_all_layers() -> None:
    model = models.tiny("bert", **TINY)
    before, calls = snapshot(model), []

    def failing(module: nn.Module, args: Any) -> None:
        calls.append(len(model.bert.encoder.layer))
        if len(calls) == 8:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(failing)
    with pytest.raises(KeyboardInterrupt):
        shrink_depth(model, 3, batches(model))
    handle.remove()
    assert calls[-1] < 5
    assert_equal(snapshot(model), before)
    assert model.config.num_hidden_layers == 5
    assert getattr(model.config, "hf_prune", None) is None


# ------------------------------------------------------------------------------------------------------------- in `prune()`


@pytest.mark.parametrize(
    ("family", "pattern", "criterion"),
    [
        *((family, pattern, "removal") for family, pattern in UNITS),
        *((family, pattern, "greedy_removal") for family, pattern in UNITS if family != "t5"),
        pytest.param("t5", "head", "greedy_removal", marks=pytest.mark.slow),
    ],
)
def test_units_go_by_what_the_model_loses_without_them(family: str, pattern: str, criterion: str) -> None:
    model = models.tiny(family)
    rows = [models.ragged_batch(model, rows=12, seed=1)]
    dense = copy.deepcopy(model)
    config = PruningConfig(pattern=pattern, criterion=criterion, update="zero", target_sparsity=0.34, max_sparsity_per_module=1.0)

    groups = Pruner(copy.deepcopy(model), PruningConfig(pattern=pattern, criterion="magnitude"), total_steps=1).rules[0].groups
    units = [(group.name, unit) for group in groups for unit in range(group.num_units)]

    def loss(gone: Collection[tuple[str, int]]) -> float:
        other = copy.deepcopy(dense)
        its = Pruner(other, PruningConfig(pattern=pattern, criterion="magnitude"), total_steps=1).rules[0].groups
        for group in its:
            group.apply(torch.tensor([(group.name, unit) not in gone for unit in range(group.num_units)]))
        return divergence(dense, other, rows)

    number = round(0.34 * len(units))
    gone: list[tuple[str, int]] = []
    if criterion == "removal":
        gone = sorted(units, key=lambda unit: loss([unit]))[:number]
    while len(gone) < number:
        gone.append(min((unit for unit in units if unit not in gone), key=lambda unit: loss([*gone, unit])))
    report = prune(model, config, rows, held_out=0.0)
    left = {module.name: module.units_left for module in report.modules}
    expected = {group.name: group.num_units - sum(name == group.name for name, _ in gone) for group in groups}
    assert left == expected


@pytest.mark.parametrize("criterion", ["removal", "greedy_removal"])
def test_nothing_is_tried_out_while_a_model_trains(criterion: str) -> None:
    with pytest.raises(ConfigError, match=f"criterion='{criterion}': tries out .* which prune"):
        Pruner(models.tiny("bert"), PruningConfig(pattern="layer", criterion=criterion), total_steps=4)


@given(costs=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8, unique=True), number=st.integers(1, 7))
def test_where_costs_add_up_both_orders_are_one(costs: list[float], number: int) -> None:
    units, number = range(len(costs)), min(number, len(costs) - 1)

    def loss(gone: Collection[int]) -> float:
        return sum(costs[unit] for unit in gone)

    cheapest = sorted(units, key=lambda unit: costs[unit])
    assert sorted(absences(units, loss), key=lambda unit: absences(units, loss)[unit]) == cheapest
    gone, found = greedy_absences(units, loss, number)
    assert [costs[unit] for unit in gone] == pytest.approx([costs[unit] for unit in cheapest[:number]], abs=1e-6)
    assert sorted(found, key=lambda unit: found[unit])[:number] == gone


@given(st.integers(0, 1000), st.integers(2, 6))
def test_an_allocation_by_cost_takes_units_in_the_greedy_order(seed: int, size: int) -> None:
    """Even where one unit makes the next cheaper."""
    draws = torch.rand(2**size, generator=torch.Generator().manual_seed(seed))

    def loss(gone: Collection[int]) -> float:
        return float(draws[sum(2**unit for unit in gone)])

    for number in range(1, size):
        gone, found = greedy_absences(range(size), loss, number)
        ranked = torch.tensor([found[unit] for unit in range(size)]).argsort(stable=True)
        assert ranked[:number].tolist() == gone
