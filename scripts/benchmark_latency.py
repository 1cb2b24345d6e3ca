"""How much faster a condensed model is than the dense one it came from.

    python scripts/benchmark_latency.py runs/mrpc/dense runs/mrpc/pruned/condensed --output runs/latency.json

Both models forward the same full batch of random tokens in turn, in one process on one thread; CPU time, medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rich
import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_prune.report import benchmark


def encoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model's body without its embeddings."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(parameter) for module in embeddings for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.base_model.parameters() if id(parameter) not in left_out)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="folder or id of the dense model")
    parser.add_argument("condensed", help="folder or id of the condensed model")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30, help="forwards of each model")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()

    paths = {"dense": arguments.dense, "condensed": arguments.condensed}
    models = {name: AutoModelForSequenceClassification.from_pretrained(path) for name, path in paths.items()}
    torch.manual_seed(0)
    tokens = torch.randint(0, models["dense"].config.vocab_size, (arguments.batch_size, arguments.tokens))
    milliseconds = benchmark(models, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, arguments.repeats)
    ratio = milliseconds["dense"] / milliseconds["condensed"]

    table = Table(title=f"batch {arguments.batch_size} × {arguments.tokens}, one thread: {ratio:.2f} times faster")
    for column in ("", "encoder parameters", "parameters", "CPU ms a batch"):
        table.add_column(column, justify="right" if column else "left")
    for name, model in models.items():
        table.add_row(name, f"{encoder_parameters(model):,}", f"{model.num_parameters():,}", f"{milliseconds[name]:.1f}")
    rich.print(table)
    if arguments.output:
        figures: dict[str, object] = {"latency_ratio": ratio}
        for name, model in models.items():
            sizes = {"encoder_parameters": encoder_parameters(model), "parameters": model.num_parameters()}
            figures[name] = {**sizes, "cpu_ms": milliseconds[name]}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
