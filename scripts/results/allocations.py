"""How well the loss that `prune()` predicts ranks allocations: the same budget divided at random, predicted and true.

    python scripts/results/allocations.py mrpc=runs/mrpc/dense-1 --glue_dir glue

Each allocation has half of the operations of a row left, and random bounds on what each block loses (`min_sparsity_per_module`,
`max_sparsity_per_module`), between which the budget goes by the scores, as ever. Predicted is the sum of the scores of what goes,
in nats; true is the KL divergence from the dense model on the validation rows, once all weights that stay have made up for it.
Results go to a JSON file, allocation by allocation; those that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from oneshot import TASKS, batches, calibration_of, divergence, logits_of, rows_of
from rich.table import Table
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import PruningConfig, PruningRule, prune
from hf_prune.model import find_blocks

#: The share of the operations that stays; floors are below that of a block that goes, and caps above.
LEFT = 0.5


def divided(model: Any, generator: torch.Generator | None) -> PruningConfig:
    """A config in which each block has a random floor and a random cap; None: it has none."""
    rules = []
    for block in find_blocks(model):
        low, high = torch.zeros(2).tolist() if generator is None else torch.rand(2, generator=generator).tolist()
        rules.append(
            PruningRule(
                pattern=block.unit,
                target_modules=rf"(.*\.)?{re.escape(block.layer)}\..*",
                min_sparsity_per_module=round(low * LEFT, 3),
                max_sparsity_per_module=round(1 - high * LEFT, 3),
            )
        )
    return PruningConfig(target_flops=LEFT, rules=rules)


@dataclass(frozen=True)
class Case:
    """A dense model on a task: what all allocations have in common."""

    folder: str
    calibration: Any
    validation: Any
    #: What the dense model says of the validation rows, `[rows, labels]`.
    logits: torch.Tensor

    @classmethod
    def of(cls, folder: str, task: str, glue: Path, rows: int) -> Case:
        """The model in a folder, with so many calibration rows."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        validation = batches(rows_of(task, glue, "validation", tokenizer), tokenizer, 64)
        dense = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return cls(folder, calibration_of(task, glue, tokenizer, 0, rows), validation, logits_of(dense, validation))

    def measure(self, number: int, database: Path) -> dict[str, float]:
        """One allocation, of the seed `number`; 0: the best by the scores."""
        model = AutoModelForSequenceClassification.from_pretrained(self.folder).eval()
        config = divided(model, torch.Generator().manual_seed(number) if number else None)
        report = prune(model, config, self.calibration, database=database)
        true = divergence(self.logits, logits_of(model, self.validation))
        return {"predicted": report.predicted_error, "true": true, "flops": report.budget["flops"]}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="TASK=FOLDER", help="a dense model for each task")
    parser.add_argument("--glue_dir", type=Path, required=True, help="a folder with TASK/SPLIT.jsonl")
    parser.add_argument("--number", type=int, default=50, help="random allocations of each model")
    parser.add_argument("--rows", type=int, default=512, help="calibration rows")
    parser.add_argument("--output_dir", type=Path, default=Path("allocations"), help="for results and databases")
    options = parser.parse_args(arguments)
    if unknown := [model for model in options.models if model.partition("=")[0] not in TASKS]:
        parser.error(f"{unknown[0]}: must be TASK=FOLDER, with a task of {', '.join(TASKS)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    shown = Table(
        "task", "allocations", "rank correlation", "true loss: median", "least", "by the scores", title="predicted and true loss"
    )
    for task, folder in (model.split("=", 1) for model in options.models):
        found = results.setdefault(task, {"allocations": {}})
        if missing := [number for number in range(options.number + 1) if str(number) not in found["allocations"]]:
            case = Case.of(folder, task, options.glue_dir, options.rows)
            for number in missing:
                cell = case.measure(number, options.output_dir / task)
                found["allocations"][str(number)] = cell
                file.write_text(json.dumps(results, indent=1) + "\n")
                print(task, number, *(f"{value:.4g}" for value in cell.values()), flush=True)
        best, drawn = found["allocations"]["0"], [cell for number, cell in found["allocations"].items() if number != "0"]
        losses = torch.tensor([cell["true"] for cell in drawn])
        found["rank_correlation"] = float(spearmanr([cell["predicted"] for cell in drawn], losses).statistic)
        file.write_text(json.dumps(results, indent=1) + "\n")
        values = (losses.median(), losses.min(), best["true"])
        shown.add_row(task, str(len(drawn)), f"{found['rank_correlation']:.3f}", *(f"{float(value):.4f}" for value in values))
    rich.print(shown)
    return results


if __name__ == "__main__":
    main()
