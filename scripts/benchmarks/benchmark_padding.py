"""Which widths of a feed-forward block a matrix kernel is slow at: what `condense(pad_to_multiple_of=...)` is worth here.

    python scripts/benchmarks/benchmark_padding.py --output runs/benchmark_padding.json

Up and down projections of a hidden size of 768 with so many neurons, forwarded in turn on one thread; CPU time a neuron beside that
of the width that is a multiple of 64, medians. A first column that repeats the reference says what is noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import rich
import torch
from rich.table import Table
from torch import Tensor, nn

HIDDEN, REFERENCE = 768, 1536
#: Width → what it is a multiple of, and of no larger power of two.
WIDTHS = {1536: "64 again", 1520: "16", 1528: "8", 1532: "4", 1534: "2", 1533: "1"}


def measure(tokens: int, dtype: torch.dtype, repeats: int) -> dict[int, float]:
    """CPU time a neuron, by width, relative to the reference."""
    models = {
        width: nn.Sequential(nn.Linear(HIDDEN, abs(width)), nn.Linear(abs(width), HIDDEN)).to(dtype)
        for width in (-REFERENCE, *WIDTHS)
    }
    batch = torch.randn(tokens, HIDDEN, dtype=dtype)
    seconds: dict[int, list[float]] = {width: [] for width in models}
    for _ in range(repeats + 1):
        for width, model in models.items():
            seconds[width].append(timed(model, batch))
    each = {width: statistics.median(values[1:]) / abs(width) for width, values in seconds.items()}
    return {width: each[width] / each[-REFERENCE] for width in WIDTHS}


@torch.inference_mode()
def timed(model: nn.Module, batch: Tensor) -> float:
    """CPU seconds of a forward."""
    start = time.process_time()
    model(batch)
    return time.process_time() - start


def main() -> None:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="forwards of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_padding.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    table = Table(title=f"CPU time a neuron, relative to {REFERENCE} neurons")
    for column in ("type", "tokens", *(f"{width} ({multiple})" for width, multiple in WIDTHS.items())):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (32, 1024):
            ratios = measure(tokens, dtype, arguments.repeats)
            rows.append({"dtype": str(dtype), "tokens": tokens, "ratios": ratios})
            table.add_row(str(dtype).removeprefix("torch."), str(tokens), *(f"{ratio:.2f}" for ratio in ratios.values()))
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
