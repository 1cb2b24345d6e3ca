"""Pruning without training, measured: the metric of a fine-tuned classifier by method and by share of the encoder's weights gone.

    python scripts/results/oneshot.py mrpc=runs/mrpc/dense-1 sst2=runs/sst2/dense-1 --glue_dir glue

Each cell prunes heads and neurons of the dense model with unlabelled training rows, and evaluates it on the validation rows. CPU
time is that of `prune()`; with `--database`, shares after the first start from what was measured for that. Results go to a JSON
file cell by cell; cells that it holds are not measured again. A second table compares methods with and without their updates:
points, with the standard error of a paired bootstrap over the validation rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich
import torch
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_prune import PruningConfig, PruningRule, prune

#: Task → its text columns and its metric.
TASKS: dict[str, tuple[tuple[str, ...], Any]] = {
    "mrpc": (("sentence1", "sentence2"), f1_score),
    "sst2": (("sentence",), accuracy_score),
}
#: Method → settings of the config.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"scope": "local"},
    "without update": {"criterion": "obs", "update": "zero"},
    "fisher": {"criterion": "fisher", "update": "zero"},
    "kprune": {"criterion": "kprune", "update": "least_squares"},
    "kprune without update": {"criterion": "kprune", "update": "zero"},
    "flap": {"criterion": "flap", "update": "bias"},
    "flap without update": {"criterion": "flap", "update": "zero"},
    "magnitude": {"criterion": "magnitude", "update": "zero"},
}


def rows_of(task: str, folder: Path, split: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokenized rows of a split, with their labels."""
    columns, _ = TASKS[task]
    rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]
    texts = [[row[column] for row in rows] for column in columns]
    tokens = tokenizer(*texts, truncation=True, max_length=128)
    return [{**{key: tokens[key][index] for key in tokens}, "labels": row["label"]} for index, row in enumerate(rows)]


def batches(rows: Sequence[dict[str, Any]], tokenizer: Any, size: int) -> list[dict[str, Tensor]]:
    """Padded batches of rows of like length."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return list(DataLoader(ordered, batch_size=size, collate_fn=DataCollatorWithPadding(tokenizer)))  # type: ignore[arg-type]


def calibration_of(task: str, folder: Path, tokenizer: Any, seed: int, number: int) -> list[dict[str, Tensor]]:
    """Batches of so many random training rows, in random order."""
    rows, generator = rows_of(task, folder, "train", tokenizer), torch.Generator().manual_seed(seed)
    chosen = [rows[index] for index in torch.randperm(len(rows), generator=generator)[:number].tolist()]
    found = batches(chosen, tokenizer, 32)
    return [found[index] for index in torch.randperm(len(found), generator=generator).tolist()]


@torch.no_grad()
def logits_of(model: Any, validation: Sequence[dict[str, Tensor]]) -> Tensor:
    """What the model gives for each validation row, `[rows, classes]`."""
    inputs = ({key: value for key, value in batch.items() if key != "labels"} for batch in validation)
    return torch.cat([model(**batch).logits for batch in inputs])


def predict(model: Any, validation: Sequence[dict[str, Tensor]]) -> list[int]:
    """The class that the model predicts for each validation row."""
    predicted: list[int] = logits_of(model, validation).argmax(dim=-1).tolist()
    return predicted


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """The KL divergence of the predictions from the dense model's, in nats a row, from the logits of both."""
    old, new = (logits.double().log_softmax(dim=-1) for logits in (dense, pruned))
    return float(functional.kl_div(new, old, reduction="batchmean", log_target=True))


def measure(
    folder: str, task: str, glue: Path, method: str, share: float, seed: int, rows: int | None, database: Path | None = None
) -> dict[str, Any]:
    """One cell."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    validation = batches(rows_of(task, glue, "validation", tokenizer), tokenizer, 64)
    calibration = calibration_of(task, glue, tokenizer, seed, rows or 2048)
    labels = [label for batch in validation for label in batch["labels"].tolist()]
    metric, dense = TASKS[task][1], predict(model, validation)
    config = PruningConfig(
        target_sparsity=share, rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")], **METHODS[method]
    )
    started = time.process_time()
    report = prune(model, config, calibration, calibration_rows=rows, seed=seed, database=database)
    seconds = time.process_time() - started
    predicted = predict(model, validation)
    return {
        "cpu_seconds": seconds,
        "dense": float(metric(labels, dense)),
        "metric": float(metric(labels, predicted)),
        "labels": labels,
        "predicted": predicted,
        "sparsity": report.sparsity,
        "held_out_error": report.held_out_error,
        "masked_errors": [module.error_masked for module in report.modules],
        "errors": [module.error for module in report.modules],
    }


def table(results: dict[str, dict[str, Any]], tasks: Sequence[str], methods: Sequence[str], shares: Sequence[float]) -> Table:
    """Method by share: the mean over seeds of the difference to the dense model, in points, each task and the mean of tasks."""
    found = Table("method", *(f"{share:.0%}" for share in shares), title=f"points against dense: {', '.join(tasks)}; mean")
    for method in methods:
        row = []
        for share in shares:
            cells = [[cell for key, cell in results.items() if key.startswith(f"{task}/{method}/{share}/")] for task in tasks]
            drops = [100 * sum(cell["metric"] - cell["dense"] for cell in some) / len(some) for some in cells if some]
            mean = f"; {sum(drops) / len(drops):+.1f}" if len(drops) == len(tasks) > 1 else ""
            row.append(", ".join(f"{drop:+.1f}" for drop in drops) + mean)
        found.add_row(method, *row)
    return found


def standard_error(metric: Any, left: dict[str, Any], right: dict[str, Any], repeats: int = 1000) -> float:
    """The standard error of the difference of two cells' metrics: a paired bootstrap over the validation rows."""
    labels, first, second = (np.array(part) for part in (left["labels"], left["predicted"], right["predicted"]))
    draws = np.random.default_rng(0).integers(len(labels), size=(repeats, len(labels)))
    return float(np.std([metric(labels[rows], first[rows]) - metric(labels[rows], second[rows]) for rows in draws]))


def updates(results: dict[str, dict[str, Any]], shares: Sequence[float]) -> Table:
    """Methods with against without their updates, task by task: points, over seeds, with the standard error of one seed."""
    found = Table("task", "method", *(f"{share:.0%}" for share in shares), title="points gained by the update")
    for task, (_, metric) in TASKS.items():
        for method, without in (
            ("default", "without update"),
            ("kprune", "kprune without update"),
            ("flap", "flap without update"),
        ):
            row = []
            for share in shares:
                pairs = [
                    (cell, results[other])
                    for key, cell in results.items()
                    if key.startswith(f"{task}/{method}/{share}/")
                    and (other := key.replace(f"/{method}/", f"/{without}/")) in results
                ]
                gains = [100 * (cell["metric"] - other["metric"]) for cell, other in pairs]
                errors = [100 * standard_error(metric, *pair) for pair in pairs]
                row.append(f"{sum(gains) / len(gains):+.1f} ± {max(errors):.1f}" if gains else "")
            found.add_row(task, method, *row)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="TASK=FOLDER", help="a dense model for each task")
    parser.add_argument("--glue_dir", type=Path, required=True, help="a folder with TASK/SPLIT.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.33, 0.5, 0.67, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="calibration rows; by default what `prune` takes")
    parser.add_argument("--database", type=Path, help="folder for what is measured once for all shares")
    parser.add_argument("--output", type=Path, default=Path("oneshot.json"))
    options = parser.parse_args(arguments)
    models = dict(model.split("=", 1) for model in options.models)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for seed in options.seeds:
        for method in options.methods:
            for share in options.shares:
                for task, folder in models.items():
                    key = f"{task}/{method}/{share}/{seed}/{options.rows}"
                    if key not in results:
                        database = options.database and options.database / f"{task}-{seed}-{options.rows}"
                        results[key] = measure(folder, task, options.glue_dir, method, share, seed, options.rows, database)
                        options.output.write_text(json.dumps(results, indent=1))
                        cell = results[key]
                        print(f"{key}: {cell['dense']:.4f} → {cell['metric']:.4f}, {cell['cpu_seconds']:.0f} CPU s", flush=True)
    rich.print(table(results, list(models), options.methods, options.shares))
    rich.print(updates(results, options.shares))
    return results


if __name__ == "__main__":
    main()
