"""Pruning without training to a speed, measured: one budget in milliseconds against equal shares of heads and neurons.

    python scripts/results/oneshot_speedups.py mrpc=runs/mrpc/dense-1 sst2=runs/sst2/dense-1 --glue_dir glue

For each task a latency table is measured once (8 × 128, one thread). At each speed-up the default method gets it as
`target_speedup`, and equal shares get the share of every block at which the model is measured to be as fast; with `--search N` the
default method also tries out N ways to divide the budget among blocks. Metrics, and the KL divergence from the dense model, are of
the validation rows; the speed of each condensed model is measured beside the dense model's, in turn, in CPU time. Results go to a
JSON file cell by cell; cells that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from oneshot import TASKS, batches, calibration_of, divergence, logits_of, rows_of
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import LatencyTable, PruningConfig, PruningRule, condense, latency_table, prune
from hf_prune.condense import sample_batch
from hf_prune.measure.latency import benchmark
from hf_prune.pruning.allocation import Levels
from hf_prune.pruning.costs import Costs, fitted, of_table

#: Batch size × length at which speed counts.
SHAPE = (8, 128)
#: Method → how many ways to divide the budget it tries out.
METHODS = {"budget": 0, "equal shares": 0}


def sizes_at(table: LatencyTable, share: float) -> dict[str, int]:
    """What is left of each block when a share of it goes."""
    return {name: max(costs) - round(share * max(costs)) for name, costs in table.blocks.items()}


def smallest_share(table: LatencyTable, costs: Costs, speedup: float) -> float:
    """The smallest share that has to go of every block for a speed-up by some costs, in steps of a thousandth.

    Raises:
        ValueError: even without any block the model is slower.
    """
    for part in range(1000):
        if costs.saved(sizes_at(table, part / 1000)) >= costs.needed(speedup):
            return part / 1000
    raise ValueError(f"No share makes the model {speedup} times faster.")


def equal_share(dense: Any, table: LatencyTable, speedup: float) -> float:
    """The same by costs that are fitted to what the model is measured to take, as those of a budget are."""
    costs = of_table(table.total, {name: Levels.of(levels) for name, levels in table.blocks.items()}, setting=table.setting)
    found = fitted(costs, dense, [speedup], lambda trial: [sizes_at(table, smallest_share(table, trial, speedup))])
    return smallest_share(table, found, speedup)


def config_of(method: str, dense: Any, table: Path, speedup: float) -> PruningConfig:
    """What a method prunes with."""
    rules = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]
    if method != "equal shares":
        return PruningConfig(target_speedup=speedup, latency_table=str(table), rules=rules)
    share = equal_share(dense, LatencyTable.load(table), speedup)
    return PruningConfig(target_sparsity=share, scope="local", rules=rules)


def measure(folder: str, task: str, glue: Path, method: str, speedup: float, seed: int, tries: int, home: Path) -> dict[str, Any]:
    """One cell. `tries`: how many ways to divide the budget are tried out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    dense = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    file = home / f"{task}.json"
    if not file.exists():
        latency_table(dense, *SHAPE).save(file)
    calibration = calibration_of(task, glue, tokenizer, seed, 2048)
    config, database = config_of(method, dense, file, speedup), home / f"{task}-{seed}"
    report = prune(model, config, calibration, seed=seed, database=database, search=tries)
    small = condense(model)
    validation = batches(rows_of(task, glue, "validation", tokenizer), tokenizer, 64)
    labels = [label for batch in validation for label in batch["labels"].tolist()]
    metric = TASKS[task][1]
    before, after = logits_of(dense, validation), logits_of(small, validation)
    times = benchmark({"dense": dense, "small": small}, sample_batch(dense, *SHAPE, shortest=SHAPE[1]), 30)
    return {
        "dense": float(metric(labels, before.argmax(dim=-1).tolist())),
        "metric": float(metric(labels, after.argmax(dim=-1).tolist())),
        "divergence": divergence(before, after),
        "measured": times["dense"] / times["small"],
        "sparsity": report.sparsity,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="TASK=FOLDER", help="a dense model for each task")
    parser.add_argument("--glue_dir", type=Path, required=True, help="a folder with TASK/SPLIT.jsonl")
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.3, 1.5, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--search", type=int, default=0, help="how many ways to divide the budget are tried out")
    parser.add_argument("--output_dir", type=Path, default=Path("oneshot_speedups"), help="for results, tables and databases")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    columns = ("task", "asked", "method", "seed", "measured", "metric", "against dense", "divergence")
    methods = METHODS | ({f"search {options.search}": options.search} if options.search else {})
    shown = Table(*columns, title="the same speed, without training")
    for seed in options.seeds:
        for task, folder in (model.split("=", 1) for model in options.models):
            for speedup in options.speedups:
                for method, tries in methods.items():
                    key = f"{task}/{method}/{speedup}/{seed}"
                    if key not in results:
                        results[key] = measure(folder, task, options.glue_dir, method, speedup, seed, tries, options.output_dir)
                        file.write_text(json.dumps(results, indent=1))
                    cell = results[key]
                    cells = [f"{cell['measured']:.2f}", f"{cell['metric']:.4f}", f"{100 * (cell['metric'] - cell['dense']):+.1f}"]
                    cells.append(f"{cell['divergence']:.4f}")
                    shown.add_row(task, str(speedup), method, str(seed), *cells)
                    print(key, *cells, flush=True)
    rich.print(shown)
    return results


if __name__ == "__main__":
    main()
