"""The search over what the loss of each block counts: what it tries, what it measures, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal, snapshot
from hypothesis import given
from hypothesis import strategies as st
from models import ragged_batch, tiny
from safetensors.torch import load_file
from torch import Tensor

from hf_prune import ConfigError, PruningConfig, PruningRule, prune
from hf_prune.model import find_blocks
from hf_prune.oneshot import driver
from hf_prune.oneshot.search import search_weights
from hf_prune.pruning.updates import DAMPING

HEADS_AND_NEURONS = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]


def config(**settings: Any) -> PruningConfig:
    return PruningConfig(**{"target_sparsity": 0.5, "rules": copy.deepcopy(HEADS_AND_NEURONS), **settings})


def batches(model: Any) -> list[dict[str, Tensor]]:
    return [ragged_batch(model, rows=6, seed=seed) for seed in range(4)]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 2**31))
def test_a_try_draws_a_tenth_of_the_best_weights_anew(number: int, tries: int, seed: int) -> None:
    """And the best of all that were tried is what comes out."""
    tried: list[tuple[Tensor, float]] = []

    def loss(weights: Tensor) -> float:
        tried.append((weights.clone(), float((weights - torch.linspace(0.1, 1, number)).square().sum())))
        return tried[-1][1]

    found, first, least = search_weights(number, range(tries), loss, draws(seed))
    assert len(tried) == tries + 1
    assert tried[0][0].unique().numel() == 1
    assert first == tried[0][1]
    assert least == min(value for _, value in tried)
    assert found.equal(min(tried, key=lambda pair: pair[1])[0])
    best = 0
    for place, (weights, value) in enumerate(tried[1:], 1):
        assert bool(((weights > 0) & (weights <= 1)).all())
        assert int((weights != tried[best][0]).sum()) <= max(round(0.1 * number), 1)
        best = place if value < tried[best][1] else best


def test_a_search_gets_somewhere() -> None:
    wanted = torch.rand(12, generator=draws(7))
    found, first, least = search_weights(12, range(2000), lambda weights: float((weights - wanted).square().sum()), draws())
    assert least < first / 100
    assert (found - wanted).abs().max() < 0.1


@pytest.mark.parametrize("useless", [float("nan"), float("inf"), 1.0])
def test_without_anything_better_nothing_changes(useless: float) -> None:
    losses = iter([1.0] + [useless] * 5)
    found, first, least = search_weights(3, range(5), lambda weights: next(losses), draws())
    assert (found.tolist(), first, least) == ([0.5] * 3, 1.0, 1.0)


def spied(monkeypatch: pytest.MonkeyPatch, spy: Callable[[Callable[[Tensor], float], int], Tensor]) -> None:
    """Let a function look at what is searched, and choose the weights."""

    def search(number: int, tries: Any, loss: Callable[[Tensor], float], generator: torch.Generator) -> Any:
        return spy(loss, number), 2.0, 1.0

    monkeypatch.setattr(driver, "search_weights", search)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_what_is_measured_is_the_model_with_all_weights_solved_for(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against the normal equations of what the database holds, and the divergence of all logits, written out."""
    model = tiny(family)
    dense, rows = copy.deepcopy(model).eval(), batches(model)
    names = [block.output.name for block in find_blocks(model)]
    patterns = [PruningRule(pattern="kv_group" if family == "llama" else "head"), PruningRule(pattern="neuron")]
    seen: list[int] = []

    def look(loss: Callable[[Tensor], float], number: int) -> Tensor:
        assert number == len(names)
        sparing = torch.where(torch.arange(number) == 0, 1.0, 1e-12)
        for weights in (torch.full((number,), 0.5), torch.rand(number, generator=draws(3)), sparing):
            found = loss(weights)
            if weights is sparing:
                torch.testing.assert_close(model.get_submodule(names[0]).weight, dense.get_submodule(names[0]).weight)
            for output in names:
                before, after = (dict(one.named_parameters())[f"{output}.weight"].detach().double() for one in (dense, model))
                if type(model.get_submodule(output)).__name__ == "Conv1D":
                    before, after = before.T, after.T
                inputs = load_file(tmp_path / "database" / f"{output}.safetensors")["inputs"]
                bias = len(inputs) > before.shape[1]
                if bias:
                    first, second = (dict(one.named_parameters())[f"{output}.bias"].detach().double() for one in (dense, model))
                    before, after = torch.cat([before, first[:, None]], 1), torch.cat([after, second[:, None]], 1)
                kept = after.abs().sum(0) > 0
                seen.append(int((~kept).sum()))
                damp = DAMPING * float(inputs.diagonal().mean())
                system = inputs[kept][:, kept] + damp * torch.eye(int(kept.sum()), dtype=torch.float64)
                wanted = (before @ inputs)[:, kept] + damp * before[:, kept]
                expected = torch.linalg.solve(system, wanted.T).T
                torch.testing.assert_close(after[:, kept], expected, atol=1e-4, rtol=1e-3)
            total, number_of = 0.0, 0
            for row in rows:
                with torch.no_grad():
                    old, new = (one(**row).logits.double().log_softmax(-1) for one in (dense, model))
                there = row["attention_mask"].bool() if old.ndim == 3 else torch.ones(len(old), dtype=torch.bool)
                old, new = old[there], new[there]
                total += float((old.exp() * (old - new)).sum())
                number_of += len(old)
            assert found == pytest.approx(total / number_of, rel=1e-4, abs=1e-9)
        return torch.full((number,), 0.5)

    spied(monkeypatch, look)
    report = prune(model, config(rules=patterns), rows, search=1, database=tmp_path / "database")
    assert sum(seen) > 0
    assert list(report.searched.values()) == [(2.0, 1.0)]


def test_a_search_that_finds_nothing_leaves_every_bit_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is whole again after the tries, whatever they were."""

    def look(loss: Callable[[Tensor], float], number: int) -> Tensor:
        for seed in range(3):
            loss(1 - torch.rand(number, generator=draws(seed)))
        return torch.full((number,), 0.5)

    models = [tiny() for _ in range(2)]
    first = prune(models[0], config(), batches(models[0]))
    spied(monkeypatch, look)
    second = prune(models[1], config(), batches(models[1]), search=3)
    assert_equal(snapshot(models[0]), snapshot(models[1]))
    assert first.searched == {}
    assert second.predicted_error == pytest.approx(first.predicted_error)


def test_weights_decide_which_blocks_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    spared = []
    for heavy in (0, 1):

        def look(loss: Callable[[Tensor], float], number: int, heavy: int = heavy) -> Tensor:
            return torch.tensor([1.0 if place == heavy else 1e-6 for place in range(number)])

        spied(monkeypatch, look)
        model = tiny()
        report = prune(model, config(rules=[PruningRule(pattern="neuron")]), batches(model), search=1)
        spared.append([module.units_left for module in report.modules])
    assert spared[0][0] == spared[1][1] == 40
    assert spared[0][1] < 40 > spared[1][0]


@pytest.mark.parametrize("settings", [{}, {"target_sparsity": None, "target_flops": 0.6}])
def test_the_same_seed_finds_the_same_and_nothing_worse(settings: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        model = tiny()
        report = prune(model, config(**settings), batches(model), search=8, seed=3)
        found.append((snapshot(model), report.searched))
        ((before, after),) = report.searched.values()
        assert 0 < after <= before
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("search", "settings", "message"),
    [
        (-1, {}, "search=-1: must be a whole number of tries, 0 or more"),
        (1.5, {}, "search=1.5: must be a whole number of tries"),
        (True, {}, "search=True: must be a whole number of tries"),
        (4, {"criterion": "magnitude"}, "search=4: is for blocks that share a budget, and whose units criterion 'obs' measures"),
        (4, {"scope": "local"}, "search=4: is for blocks that share a budget"),
        (
            4,
            {"rules": [PruningRule(pattern="neuron", target_modules=r".*layer\.0\..*")]},
            "search=4: is for blocks that share",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_done(search: Any, settings: dict[str, Any], message: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        prune(model, config(**settings), batches(model), search=search)
    assert_equal(snapshot(model), before)
