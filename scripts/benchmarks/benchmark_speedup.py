"""What `target_speedup` gives beside what was asked: models pruned to a speed, timed by a process of their own.

    python scripts/benchmarks/benchmark_speedup.py sentence-transformers/all-MiniLM-L6-v2

For each shape a latency table is measured, and for each speed-up heads and neurons are chosen at once by magnitude, which is enough
for sizes; the condensed model and the dense one are then timed in turn, on one thread, in CPU time, beside a dense model against
itself. With `--runtime onnx` all of this is in ONNX Runtime. Results are a table and a JSON file, with the heads and neurons that
stay: for each shape others, since what they cost depends on it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from transformers import AutoModel

from hf_prune import Pruner, PruningConfig, PruningRule, condense, latency_table, sparsity_report
from hf_prune.condense import sample_batch
from hf_prune.measure.latency import benchmark
from hf_prune.measure.running import RUNTIMES

#: Batch size × length.
SHAPES = ((8, 128), (1, 32))
SPEEDUPS = (1.5, 2.0, 3.0, 4.0)


def pruned(dense: Any, table: Path, speedup: float) -> tuple[Any, float]:
    """The condensed model, and the speed-up that the table predicts."""
    config = PruningConfig(
        target_speedup=speedup,
        latency_table=str(table),
        criterion="magnitude",
        schedule="constant",
        max_sparsity_per_module=1.0,
        rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")],
    )
    pruner = Pruner(copy.deepcopy(dense), config, total_steps=2)
    pruner.step()
    predicted = pruner.metrics()["speedup"]
    pruner.finish()
    return condense(pruner.model, verify=False), predicted


def units_of(model: Any) -> Counter[str]:
    """How many heads and neurons a model has."""
    left: Counter[str] = Counter()
    for block in sparsity_report(model).blocks:
        left[block.kind] += block.alive
    return left


def timed(folders: Sequence[str], shape: tuple[int, int], repeats: int, runtime: str) -> dict[str, float]:
    """Milliseconds of each folder's model, and of the first once more, in turn."""
    torch.set_num_threads(1)
    models = {name: AutoModel.from_pretrained(name) for name in folders}
    models["null"] = AutoModel.from_pretrained(folders[0])
    return benchmark(models, sample_batch(models["null"], *shape, shortest=shape[1]), repeats, runtime=runtime)


def shape_of(text: str) -> tuple[int, int]:
    """`8x128` → batch size and length."""
    rows, tokens = map(int, text.split("x"))
    return rows, tokens


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--speedups", nargs="+", type=float, default=list(SPEEDUPS))
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES), help="batch size × length, such as 8x128")
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="what runs the models")
    parser.add_argument("--repeats", type=int, default=40, help="timed forwards of each model in a process")
    parser.add_argument("--processes", type=int, default=5, help="how many processes time them")
    parser.add_argument("--output", type=Path, default=Path("benchmark_speedup.json"))
    parser.add_argument("--timed", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.timed:
        print(json.dumps(timed(options.timed, options.shapes[0], options.repeats, options.runtime)))
        return []
    torch.set_num_threads(1)
    dense = AutoModel.from_pretrained(options.model).eval()
    results = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as home:
            table = latency_table(dense, *shape, runtime=options.runtime)
            table.save(Path(home, "table.json"))
            folders, predicted, left = [options.model], {}, {1.0: units_of(dense)}
            for speedup in options.speedups:
                model, predicted[speedup] = pruned(dense, Path(home, "table.json"), speedup)
                left[speedup] = units_of(model)
                folders.append(str(Path(home, str(speedup))))
                model.save_pretrained(folders[-1])
            command = [sys.executable, __file__, options.model, "--timed", *folders, "--shapes", "x".join(map(str, shape))]
            command += ["--runtime", options.runtime]
            runs = []
            for _ in range(options.processes):
                done = subprocess.run([*command, "--repeats", str(options.repeats)], check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        for speedup, folder in [*zip(options.speedups, folders[1:]), (1.0, "null")]:
            found = sorted(run[folders[0]] / run[folder] for run in runs)
            results.append(
                {
                    "shape": f"{shape[0]} x {shape[1]}",
                    "asked": speedup,
                    "predicted": predicted.get(speedup, 1.0),
                    "measured": statistics.median(found),
                    "least": found[0],
                    "most": found[-1],
                    **left[speedup],
                }
            )
            print(results[-1], flush=True)
    shown = Table(*results[0], title=f"{options.model}, {options.runtime}, one thread, {options.processes} processes")
    for result in results:
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in result.values()))
    rich.print(shown)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
