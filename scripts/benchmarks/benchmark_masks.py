"""What pruning costs: one mask update of a BERT-base-sized model, and the three moments of a training step.

    python scripts/benchmarks/benchmark_masks.py --output runs/benchmark_masks.json

Updates: a random model of BERT-base's size (72 encoder layers, 85 million weights); CPU seconds of one update on one thread, the
bytes a pruned weight that the pruner keeps between updates, and the peak that an update adds to the process. Each pattern has a
process of its own, so that peaks do not mix; they are read from Linux's /proc.

Steps: forward, backward and AdamW at batch 16 × 128, in turn without and with `observe()` and `step()` when no update is due; CPU
time on one thread, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import rich
import torch
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from hf_prune import Pruner, PruningConfig

SETTINGS = {
    "global 4x1": {"pattern": "4x1", "scope": "global"},
    "local 4x1": {"pattern": "4x1", "scope": "local"},
    "2:4": {"pattern": "2:4", "scope": "local"},
    "1xchannel": {"pattern": "1xchannel", "scope": "global"},
    "head": {"pattern": "head", "scope": "global"},
    "neuron": {"pattern": "neuron", "scope": "global"},
}
BATCH, TOKENS = 16, 128


def build(layers: int) -> BertForSequenceClassification:
    """A random BERT, BERT-base with 12 layers."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers))


def config(name: str, **changes: object) -> PruningConfig:
    """The setting of a row: 72 encoder layers, none of the pooler."""
    return PruningConfig.from_dict({"target_sparsity": 0.5, "exclude_modules": ["pooler.dense"], **SETTINGS[name], **changes})


def kept_bytes(pruner: Pruner) -> int:
    """Bytes of everything a pruner holds between updates."""
    return sum(tensor.numel() * tensor.element_size() for tensor in pruner.state_dict().values())


def resident(field: str) -> int:
    """Resident memory of this process in KiB, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_update(name: str, layers: int, criterion: str) -> dict[str, float | str]:
    """One update in the middle of a run, in this process."""
    model = build(layers)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    pruner = Pruner(model, config(name, criterion=criterion, frequency=2), total_steps=100)
    for _ in range(3):  # the first update leaves units gone, as in the middle of a run
        pruner.observe()
        pruner.step()
    pruner.observe()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = time.process_time()
    pruner.step()
    seconds = time.process_time() - start
    peak = resident("VmHWM") - before
    weights = sum(group.weights for group in pruner.plan().groups)
    return {
        "setting": name,
        "criterion": criterion,
        "weights": weights,
        "cpu_seconds": seconds,
        "bytes_per_weight": kept_bytes(pruner) / weights,
        "peak_extra_mib": peak / 1024,
    }


def measure_steps(name: str, layers: int, steps: int) -> dict[str, float | str]:
    """Training steps with and without pruning, in turn, on one model."""
    model = build(layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {"input_ids": torch.randint(0, 30522, (BATCH, TOKENS)), "labels": torch.randint(0, 2, (BATCH,))}
    # One update while warming up, so that there are units to mask at every step, and none after it.
    pruner = Pruner(model, config(name, initial_sparsity=0.25, warmup_steps=1, frequency=10**6), total_steps=10**9)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * steps + 2):
        pruning = bool(step % 2)
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        if pruning:
            pruner.observe()
        optimizer.step()
        if pruning:
            pruner.step()
        optimizer.zero_grad()
        if step >= 2:  # the first pair warms up
            seconds[pruning].append(time.process_time() - start)
    plain, pruned = (statistics.median(seconds[key]) for key in (False, True))
    return {"setting": name, "plain_seconds": plain, "pruned_seconds": pruned, "overhead": pruned / plain - 1}


def in_a_process(arguments: argparse.Namespace, *command: str) -> dict[str, float | str]:
    """Run one measurement in a fresh process and read what it prints."""
    sizes = ["--layers", str(arguments.layers), "--steps", str(arguments.steps)]
    result = subprocess.run([sys.executable, __file__, *sizes, *command], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure everything, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (12 is BERT-base)")
    parser.add_argument("--steps", type=int, default=5, help="training steps of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_masks.json"), help="where the JSON goes")
    parser.add_argument("--update", nargs=2, metavar=("SETTING", "CRITERION"), help=argparse.SUPPRESS)
    parser.add_argument("--step", metavar="SETTING", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.update:
        print(json.dumps(measure_update(arguments.update[0], arguments.layers, arguments.update[1])))
        return
    if arguments.step:
        print(json.dumps(measure_steps(arguments.step, arguments.layers, arguments.steps)))
        return

    updates = [
        in_a_process(arguments, "--update", name, criterion) for criterion in ("snip_momentum", "magnitude") for name in SETTINGS
    ]
    table = Table(title="One mask update")
    for column in ("setting", "criterion", "weights", "CPU s", "bytes a weight", "peak extra MiB"):
        table.add_column(column, justify="left" if column in ("setting", "criterion") else "right")
    for row in updates:
        figures = (f"{row['cpu_seconds']:.2f}", f"{row['bytes_per_weight']:.3f}", f"{row['peak_extra_mib']:.0f}")
        table.add_row(str(row["setting"]), str(row["criterion"]), f"{row['weights']:,}", *figures)
    rich.print(table)

    steps = [in_a_process(arguments, "--step", name) for name in SETTINGS]
    table = Table(title=f"A training step at {BATCH} × {TOKENS} when no update is due")
    for column in ("setting", "plain CPU s", "with pruning CPU s", "overhead"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in steps:
        table.add_row(str(row["setting"]), f"{row['plain_seconds']:.2f}", f"{row['pruned_seconds']:.2f}", f"{row['overhead']:.1%}")
    rich.print(table)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"updates": updates, "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
