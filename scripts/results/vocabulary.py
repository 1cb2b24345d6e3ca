"""A smaller vocabulary, measured: size and metric of a fine-tuned classifier whose tokens are those of its training texts.

    python scripts/results/vocabulary.py mrpc=runs/mrpc/dense-1 sst2=runs/sst2/dense-1 --glue_dir glue

Tokens are chosen from the texts of the training rows, by how often they occur there; nothing is trained. Metric, share of unknown
tokens and number of tokens are those of the validation rows. Results go to a JSON file, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from oneshot import TASKS, batches, predict, rows_of
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import prune_vocabulary, vocabulary_report


def texts_of(task: str, folder: Path, split: str) -> list[str]:
    """The texts of all columns of a split."""
    rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]
    return [row[column] for row in rows for column in TASKS[task][0]]


def metric_of(model: Any, tokenizer: Any, task: str, glue: Path) -> float:
    """The metric of the validation rows."""
    validation = batches(rows_of(task, glue, "validation", tokenizer), tokenizer, 64)
    labels = [label for batch in validation for label in batch["labels"].tolist()]
    return float(TASKS[task][1](labels, predict(model, validation)))


def measure(folder: str, task: str, glue: Path, min_count: int) -> dict[str, Any]:
    """A row of the table; `min_count` 0 is the model as it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    small = tokenizer
    if min_count:
        _, small, _ = prune_vocabulary(model, tokenizer, texts_of(task, glue, "train"), min_count=min_count)
    report = vocabulary_report(tokenizer, small, texts_of(task, glue, "validation"))
    sizes = {"tokens": model.config.vocab_size, "parameters": model.num_parameters()}
    return {"metric": metric_of(model, small, task, glue), **sizes, **report.to_dict()}


def table(results: dict[str, dict[int, dict[str, Any]]]) -> Table:
    """Task by number of occurrences."""
    columns = ("task", "occurrences", "tokens", "parameters", "metric", "unknown", "more tokens", "texts changed")
    found = Table(*columns, title="validation rows, by how often a token has to occur in the training rows")
    for task, rows in results.items():
        for count, row in rows.items():
            shares = (f"{row['unknown']:.2%}", f"{row['lengthening']:+.2%}", f"{row['changed']:.1%}")
            found.add_row(task, str(count or "-"), f"{row['tokens']:,}", f"{row['parameters']:,}", f"{row['metric']:.4f}", *shares)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="TASK=FOLDER", help=f"fine-tuned classifiers; tasks: {', '.join(TASKS)}")
    parser.add_argument("--glue_dir", type=Path, required=True, help="folder with TASK/train.jsonl and TASK/validation.jsonl")
    parser.add_argument("--min_counts", type=int, nargs="+", default=[1, 2, 5, 10], help="how often a token has to occur")
    parser.add_argument("--output", type=Path, default=Path("vocabulary.json"), help="the JSON file to write")
    args = parser.parse_args(arguments)
    given = dict(model.split("=", 1) for model in args.models)
    results = {task: {n: measure(folder, task, args.glue_dir, n) for n in (0, *args.min_counts)} for task, folder in given.items()}
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    rich.print(table(results))


if __name__ == "__main__":
    main()
