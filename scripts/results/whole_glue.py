"""Fewer layers and a smaller hidden size without training, measured: the metric of a fine-tuned classifier by what is left.

    python scripts/results/whole_glue.py mrpc=runs/mrpc/dense-1 sst2=runs/sst2/dense-1 --glue_dir glue

Each cell shrinks the dense model by unlabelled training rows and evaluates it on the validation rows. Results go to a JSON file
cell by cell; cells that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from oneshot import TASKS, batches, calibration_of, predict, rows_of
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import shrink_depth, shrink_hidden

#: What stays, and the hidden sizes at which it is measured.
LAYERS = (5, 4, 3)
WIDTHS = (352, 320, 256)


def cells() -> list[str]:
    """The name of each cell."""
    methods = ("greedy_removal", "removal", "consecutive", "block_influence")
    widths = [f"hidden size {width}/{method}" for width in WIDTHS for method in ("by weights", "by data")]
    return [f"layers {number}/{method}" for number in LAYERS for method in methods] + widths


def measure(folder: str, task: str, glue: Path, name: str, seed: int) -> dict[str, Any]:
    """One cell."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    validation = batches(rows_of(task, glue, "validation", tokenizer), tokenizer, 64)
    labels = [label for batch in validation for label in batch["labels"].tolist()]
    calibration, dense = calibration_of(task, glue, tokenizer, seed, 512), predict(model, validation)
    what, _, method = name.partition("/")
    number, started = int(what.split()[-1]), time.process_time()
    if what.startswith("layers"):
        shrink_depth(model, number, calibration, criterion=method)
    else:
        shrink_hidden(model, number, None if method == "by weights" else calibration)
    metric, seconds = TASKS[task][1], time.process_time() - started
    return {
        "cpu_seconds": seconds,
        "parameters": model.num_parameters(),
        "dense": float(metric(labels, dense)),
        "metric": float(metric(labels, predict(model, validation))),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="TASK=FOLDER", help="a dense model for each task")
    parser.add_argument("--glue_dir", type=Path, required=True, help="a folder with TASK/SPLIT.jsonl")
    parser.add_argument("--cells", nargs="+", choices=cells(), metavar="CELL", default=cells(), help=", ".join(cells()))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    parser.add_argument("--output", type=Path, default=Path("whole_glue.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models = dict(model.split("=", 1) for model in options.models)
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    table = Table("what stays", "method", *models, "parameters", "CPU s", title="without training")
    for name in options.cells:
        for task, folder in models.items():
            key = f"{task}/{name}/{options.seed}"
            if key not in results:
                results[key] = measure(folder, task, options.glue_dir, name, options.seed)
                options.output.write_text(json.dumps(results, indent=1))
                print(f"{key}: {results[key]['dense']:.4f} → {results[key]['metric']:.4f}", flush=True)
        found = [results[f"{task}/{name}/{options.seed}"] for task in models]
        last = (f"{found[0]['parameters']:,}", f"{max(cell['cpu_seconds'] for cell in found):.0f}")
        table.add_row(*name.split("/"), *(f"{cell['metric']:.4f}" for cell in found), *last)
    rich.print(table)
    return results


if __name__ == "__main__":
    main()
