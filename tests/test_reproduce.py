"""`scripts/results/reproduce.py` on a tiny model: what it measures, writes, keeps and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import allocations
import oneshot
import oneshot_speedups
import pytest
import quickstart
import reproduce
import torch
from hub_server import metadata_errors
from models import ragged_batch, tiny
from transformers import AutoModelForSequenceClassification

from hf_prune import LatencyTable, prune
from hf_prune.condense import sample_batch
from hf_prune.measure.flops import count_flops
from hf_prune.measure.sparsity import sparsity_report, total_sparsity
from hf_prune.model import find_blocks
from hf_prune.pruning.allocation import Levels
from hf_prune.pruning.costs import of_table

SCRIPTS = Path(__file__).parents[1] / "scripts"

TINY: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, list[dict[str, Any]]]:
    """The row for half of the heads and neurons: arguments, folder, results."""
    home = tmp_path_factory.mktemp("reproduce")
    rows = [{**row, "label": int(row["label"] == "sense")} for row in quickstart.make_rows(40, seed=3)]
    quickstart.make_start(home / "start", [str(row["sentence"]) for row in rows])
    (home / "glue" / "mrpc").mkdir(parents=True)
    quickstart.write_rows(home / "glue" / "mrpc" / "train.jsonl", rows[:24])
    quickstart.write_rows(home / "glue" / "mrpc" / "validation.jsonl", rows[24:])
    options = ["mrpc", "--rows", "half", "--seeds", "1", "--use_cpu", "--glue_dir", str(home / "glue")]
    options += ["--model_name_or_path", str(home / "start"), "--output_dir", str(home / "runs"), "--results", str(home / "results")]
    return options, home, reproduce.main([*options, "--overrides", json.dumps(TINY)])


def test_a_row_says_what_its_model_is(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    _, home, (dense, half) = measured
    folder = home / "runs" / "mrpc" / "half" / "seed-1"
    masked, condensed = (AutoModelForSequenceClassification.from_pretrained(path) for path in (folder, folder / "condensed"))
    assert half["sparsity"] == pytest.approx(sparsity_report(masked).sparsity)
    assert half["parameters"] == [condensed.num_parameters()]
    assert condensed.num_parameters() < masked.num_parameters()
    assert dense["sparsity"] == 0
    scores = json.loads((folder / "float32" / "eval_results.json").read_text())
    assert half["mean"] == half["max"] == scores["eval_f1"]
    assert half["relative_drop"] == pytest.approx(half["mean"] / dense["mean"] - 1)
    assert not list(folder.glob("checkpoint-*"))


def test_tables_and_cards_are_written(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    _, home, lines = measured
    assert json.loads((home / "results" / "results" / "mrpc.json").read_text())["rows"] == lines
    heading, _, row = (home / "results" / "results" / "mrpc.md").read_text().splitlines()
    assert heading.count("|") == row.count("|")
    assert f"{lines[1]['mean']:.4f}" in row
    card = home / "results" / "start-mrpc-half"
    text = (card / "README.md").read_text()
    assert metadata_errors(text) == []
    assert f"{lines[1]['latency_ratio']:.2f}" in text
    assert {"kept.png", "history.png", "latency.png"} == {path.name for path in (card / "pictures").iterdir()}


def test_a_row_says_what_is_left_of_each_block(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    _, home, (dense, half) = measured
    condensed = AutoModelForSequenceClassification.from_pretrained(home / "runs" / "mrpc" / "half" / "seed-1" / "condensed")
    (alive,) = half["alive"]
    assert alive == {
        kind: [block.units for block in sparsity_report(condensed).blocks if block.kind == kind] for kind in dense["alive"][0]
    }
    for kind, counts in dense["alive"][0].items():
        assert sum(alive[kind]) == sum(counts) / 2


def test_budgets_are_compared_on_the_same_dense_models() -> None:
    table = reproduce.TABLES["budgets"]
    shared, separate = (row.config() for row in table.rows)
    assert (shared.open_rules(), separate.open_rules()) == ({"rules[0]", "rules[1]"}, set())
    assert (shared.sparsity, shared.scope) == (separate.sparsity, separate.scope) == (0.5, "global")
    assert (table.task, table.dense) == (reproduce.TABLES["mrpc"].task, reproduce.TABLES["mrpc"].dense)


def test_what_is_done_is_not_done_again(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    options, home, lines = measured
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.safetensors")}
    assert reproduce.main([*options, "--overrides", json.dumps(TINY)]) == lines
    assert before == {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.safetensors")}


def test_other_settings_are_refused(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    options, _, _ = measured
    with pytest.raises(ValueError, match=r"max_steps=7: .*dense/seed-1 holds a run with 6"):
        reproduce.main([*options, "--overrides", json.dumps(TINY | {"max_steps": 7})])


@pytest.mark.slow
def test_what_was_pruned_before_is_trained_as_it_is(measured: tuple[list[str], Path, list[dict[str, Any]]]) -> None:
    options, home, _ = measured
    given = ["mrpc-before", "--rows", "before-50", *options[3:]]
    _, before = reproduce.main([*given, "--overrides", json.dumps(TINY)])
    folder = home / "runs" / "mrpc" / "before-50"
    start, trained = (
        AutoModelForSequenceClassification.from_pretrained(path) for path in (folder / "seed-1-first", folder / "seed-1")
    )
    assert before["sparsity"] == pytest.approx(total_sparsity(start))
    assert 0.4 < before["sparsity"] < 0.6
    assert before["parameters"] == [start.num_parameters()]
    assert {name: value.shape for name, value in start.state_dict().items()} == {
        name: value.shape for name, value in trained.state_dict().items()
    }
    assert any(not value.equal(trained.state_dict()[name]) for name, value in start.state_dict().items())
    assert not (home / "results" / "start-mrpc-before-50").exists()


def test_what_is_pruned_before_is_calibrated_with_rows_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["sst2-before"])
    assert "sst2-before: needs --glue_dir" in capsys.readouterr().err


def test_unknown_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["mrpc", "--rows", "4x2"])
    assert "--rows 4x2: must be one of 4x1, 2in4" in capsys.readouterr().err


def test_equal_shares_are_the_smallest_that_reach_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {units: units / 4 for units in range(5)}
    table = LatencyTable({}, {"name": "no machine"}, {}, 4.0, {"first": costs, "second": costs, "third": costs})
    levels = of_table(4.0, {name: Levels.of(costs) for name in table.blocks})
    # 3 ms in the blocks; 1 ms has to be left there, two of four units are not it
    share = oneshot_speedups.smallest_share(table, levels, 2.0)
    left = 4 - round(share * 4)
    assert (left, 4 - round((share - 0.001) * 4)) == (1, 2)
    with pytest.raises(ValueError, match="No share makes the model 5"):
        oneshot_speedups.smallest_share(table, levels, 5.0)

    def measured(model: Any, setting: dict[str, Any], sizes: dict[str, int]) -> float:
        """On a machine where all that goes saves two fifths more than the table says."""
        return 4 / (4 - 1.4 * sum(costs[4] - costs[left] for left in sizes.values()))

    monkeypatch.setattr("hf_prune.pruning.costs.measured_speedup", measured)
    share = oneshot_speedups.equal_share(None, table, 2.0)  # so that two of four units are it
    assert (4 - round(share * 4), 4 - round((share - 0.001) * 4)) == (2, 3)


@pytest.mark.parametrize("name", ["mrpc-speedups", "sst2-speedups"])
def test_speeds_are_compared_with_shares_of_each_block(name: str) -> None:
    rows = [row.config() for row in reproduce.TABLES[name].rows]
    assert [config.cost_target for config in rows] == ["target_speedup", None] * 3
    assert [config.target_speedup for config in rows[::2]] == [2, 3, 4]
    for config in rows[1::2]:
        heads, neurons = config.rules
        assert heads.target_sparsity == neurons.target_sparsity
    assert len({row.epochs for row in reproduce.TABLES[name].rows}) == 1


def test_random_allocations_share_a_budget_within_their_bounds() -> None:
    found = set()
    for seed in (None, 1, 2):
        model = tiny()
        before = count_flops(model, sample_batch(model, 1, 16, shortest=16))[0]
        config = allocations.divided(model, None if seed is None else torch.Generator().manual_seed(seed))
        config.latency_length = 16
        report = prune(model, config, [ragged_batch(model, rows=6, seed=row) for row in range(4)])
        assert report.budget["flops"] <= before / 2
        shares = [1 - module.units_left / module.units for module in report.modules]
        bounds = [(rule.min_sparsity_per_module, rule.max_sparsity_per_module) for rule in config.rules]
        sizes = [block.num_units for block in find_blocks(model)]
        assert all(low - 1 / size < share <= high for share, (low, high), size in zip(shares, bounds, sizes))
        found.add(tuple(shares))
    assert len(found) == 3


def test_the_divergence_from_the_dense_model_is_a_mean_over_rows() -> None:
    dense, pruned = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for old, new in zip(dense.double().softmax(dim=-1), pruned.double().softmax(dim=-1)):
        total += sum(float(p) * math.log(p / q) for p, q in zip(old, new))
    assert oneshot.divergence(dense, pruned) == pytest.approx(total / 5)
    assert oneshot.divergence(dense, dense + 1) == pytest.approx(0, abs=1e-12)
