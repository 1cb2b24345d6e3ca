"""How far the greedy choice of heads is from the best one: the rise of a layer's output error, against all choices there are.

    python scripts/benchmarks/benchmark_greedy.py sentence-transformers/all-MiniLM-L6-v2 --data wikitext2/valid.txt

For each attention block, heads are taken away one by one as criterion `obs` does, and all sets of as many heads are tried, each
with the exact rise of the damped error once the others make up for it. Results are a table and a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_prune import Pruner, PruningConfig
from hf_prune.pruning.reconstruction import damping, elimination, inverse
from hf_prune.pruning.updates import DAMPING


def best_rise(weight: Tensor, left: Tensor, heads: Tensor, count: int) -> float:
    """The least rise of the error over all sets of `count` heads; `left` is (H + λI)⁻¹, `heads` the columns of each."""
    rises = []
    for chosen in itertools.combinations(range(len(heads)), count):
        gone = heads[list(chosen)].flatten()
        rises.append(float((weight[:, gone].T * torch.linalg.solve(left[gone][:, gone], weight[:, gone].T)).sum()))
    return min(rises)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub; one with at most 16 heads")
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--rows", type=int, default=64, help="rows of 128 tokens")
    parser.add_argument("--heads", nargs="+", type=int, default=[3, 6, 9], help="how many heads go")
    parser.add_argument("--output", type=Path, default=Path("benchmark_greedy.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = AutoModel.from_pretrained(options.model).eval(), AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.data.read_text(), return_tensors="pt").input_ids[0][: options.rows * 128].view(-1, 1, 128)
    pruner = Pruner(model, PruningConfig(pattern="head", criterion="obs"), total_steps=1)
    with torch.no_grad(), pruner.calibrating():
        for row in tokens:
            model(input_ids=row)
    results = []
    (rule,) = pruner.rules
    for group in rule.groups:
        (view,) = group.compensated
        weight = view.target.weight().detach().double()
        moments = rule.seen.mean("second_moments", view.target).double()
        left = inverse(moments, damping(moments, DAMPING))
        _, rises = elimination(weight, left, view.columns, max(options.heads))
        whole = float((weight @ moments * weight).sum())
        for count in options.heads:
            greedy, best = float(rises[:count].sum()), best_rise(weight, left, view.columns, count)
            shares = {"greedy": greedy / whole, "best": best / whole, "ratio": greedy / best}
            results.append({"block": group.name, "heads": count, **shares})
    shown = Table("heads that go", "greedy over best, median", "worst", "blocks in which it is the best", title=options.model)
    for count in options.heads:
        ratios = [result["ratio"] for result in results if result["heads"] == count]
        same = sum(ratio < 1 + 1e-6 for ratio in ratios)
        shown.add_row(str(count), f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}", f"{same} of {len(ratios)}")
    rich.print(shown)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
