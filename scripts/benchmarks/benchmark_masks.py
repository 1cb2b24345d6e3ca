"""What pruning costs: one mask update of a BERT-base-sized model, and the three moments of a training step.

    python scripts/benchmarks/benchmark_masks.py --output runs/benchmark_masks.json

Updates: a random model of BERT-base's size (72 encoder layers, 85 million weights); CPU seconds of one update on one thread, the
bytes a pruned weight that the pruner keeps between updates, and the peak that an update adds to the process. Each pattern has a
process of its own, so that peaks do not mix; they are read from Linux's /proc.

Steps: forward, backward and AdamW at batch 16 × 128, in turn without pruning, without once more (the null run, which says what is
noise) and with `observe()` and `step()` when no update is due. There are two models, since the pruner's hooks run in backward. CPU
time on one thread, medians, and that of `observe()` and `step()` alone and of what a log counts.

    python scripts/benchmarks/benchmark_masks.py --against COMMIT

Compares with the package of another commit instead, in one process and in turn: every update of a run with magnitude scores, while
noise moves the weights. Says whether all weights stayed equal, bit by bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import ModuleType

import rich
import torch
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

import hf_prune
from hf_prune import Pruner, PruningConfig

SETTINGS = {
    "global 4x1": {"pattern": "4x1", "scope": "global"},
    "local 4x1": {"pattern": "4x1", "scope": "local"},
    "2:4": {"pattern": "2:4", "scope": "local"},
    "global 1x1": {"pattern": "1x1", "scope": "global"},
    "local 1x1": {"pattern": "1x1", "scope": "local"},
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
    pruner = Pruner(model, config(name, criterion=criterion, frequency=2, warmup_steps=0), total_steps=100)
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


def measure_steps(name: str, layers: int, steps: int, dtype: str) -> dict[str, float | str]:
    """Training steps without, without and with pruning, in turn."""
    models = {pruned: build(layers).train() for pruned in (False, True)}
    optimizers = {pruned: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for pruned, model in models.items()}
    batch = {"input_ids": torch.randint(0, 30522, (BATCH, TOKENS)), "labels": torch.randint(0, 2, (BATCH,))}
    # One update while warming up, so that there are units to mask at every step, and none after it.
    settings = config(name, initial_sparsity=0.25, warmup_steps=1, frequency=10**6)
    pruner = Pruner(models[True], settings, total_steps=10**9)
    seconds: dict[str, list[float]] = {kind: [] for kind in ("plain", "null", "pruned", "observe and step", "log")}
    for step in range(steps + 1):
        for kind in ("plain", "null", "pruned") if step % 2 else ("pruned", "null", "plain"):
            pruning = kind == "pruned"
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = models[pruning](**batch).loss
            loss.backward()
            before = time.process_time()
            if pruning:
                pruner.observe()
            middle = time.process_time()
            optimizers[pruning].step()
            after = time.process_time()
            if pruning:
                pruner.step()
            end = time.process_time()
            optimizers[pruning].zero_grad()
            if not step:  # the first warms up, and prunes
                continue
            seconds[kind].append(time.process_time() - start)
            if pruning:
                seconds["observe and step"].append(middle - before + end - after)
                start = time.process_time()
                pruner.metrics()
                seconds["log"].append(time.process_time() - start)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    shares = {f"{kind}_share": value / medians["plain"] for kind, value in medians.items()}
    return {"setting": name, **{f"{kind}_seconds": value for kind, value in medians.items()}, **shares}


def package_of(commit: str, folder: Path) -> ModuleType:
    """The package as it was at a commit, under another name."""
    archive = subprocess.run(["git", "archive", commit, "hf_prune"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    name, package = "hf_prune_before", folder / "hf_prune"
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py", submodule_search_locations=[str(package)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def compare_updates(name: str, layers: int, updates: int, before: ModuleType) -> dict[str, object]:
    """All updates of a run with both packages, in turn. Medians leave out the first, which warms up, and the last."""
    models = {package.__name__: build(layers) for package in (hf_prune, before)}
    every = {"criterion": "magnitude", "frequency": 1, "warmup_steps": 0, "cooldown_steps": 0}
    settings = {"target_sparsity": 0.5, "exclude_modules": ["pooler.dense"], **SETTINGS[name], **every}
    pruners = {
        package.__name__: package.Pruner(
            models[package.__name__], package.PruningConfig.from_dict(settings), total_steps=updates + 1
        )
        for package in (hf_prune, before)
    }
    seconds: dict[str, list[float]] = {key: [] for key in models}
    equal = True
    for update in range(updates):
        for key in sorted(models, reverse=bool(update % 2)):
            torch.manual_seed(update)
            for parameter in models[key].parameters():
                if parameter.ndim == 2:
                    parameter.add_(0.002 * torch.randn(parameter.shape[1]))
            start = time.process_time()
            pruners[key].step()
            seconds[key].append(time.process_time() - start)
        now, then = (model.state_dict() for model in models.values())
        equal &= all(value.equal(then[key]) for key, value in now.items())
    now, then = (statistics.median(values[1:-1]) for values in seconds.values())
    return {"setting": name, "seconds": now, "before_seconds": then, "ratio": now / then, "equal": equal}


def compare(arguments: argparse.Namespace) -> None:
    """Compare with another commit, print the table, write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        before = package_of(arguments.against, Path(folder))
        rows = [compare_updates(name, arguments.layers, arguments.updates, before) for name in arguments.settings]
    table = Table(title=f"One mask update beside that of {arguments.against}")
    for column in ("setting", "CPU ms before", "CPU ms", "ratio", "equal"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        times = (f"{1000 * row['before_seconds']:.0f}", f"{1000 * row['seconds']:.0f}", f"{row['ratio']:.2f}")
        table.add_row(row["setting"], *times, "yes" if row["equal"] else "NO")
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


def in_a_process(arguments: argparse.Namespace, *command: str) -> dict[str, float | str]:
    """Run one measurement in a fresh process and read what it prints."""
    sizes = ["--layers", str(arguments.layers), "--steps", str(arguments.steps), "--dtype", arguments.dtype]
    result = subprocess.run([sys.executable, __file__, *sizes, *command], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure everything, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (12 is BERT-base)")
    parser.add_argument("--steps", type=int, default=5, help="training steps of each kind")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of steps: float32 where bfloat16 is emulated"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_masks.json"), help="where the JSON goes")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="patterns and scopes")
    parser.add_argument("--against", metavar="COMMIT", help="compare updates with the package of another commit")
    parser.add_argument("--updates", type=int, default=7, help="mask updates of a run that is compared")
    parser.add_argument("--update", nargs=2, metavar=("SETTING", "CRITERION"), help=argparse.SUPPRESS)
    parser.add_argument("--step", metavar="SETTING", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.against:
        compare(arguments)
        return
    if arguments.update:
        print(json.dumps(measure_update(arguments.update[0], arguments.layers, arguments.update[1])))
        return
    if arguments.step:
        print(json.dumps(measure_steps(arguments.step, arguments.layers, arguments.steps, arguments.dtype)))
        return

    updates = [
        in_a_process(arguments, "--update", name, criterion)
        for criterion in ("snip_momentum", "magnitude")
        for name in arguments.settings
    ]
    table = Table(title="One mask update")
    for column in ("setting", "criterion", "weights", "CPU s", "bytes a weight", "peak extra MiB"):
        table.add_column(column, justify="left" if column in ("setting", "criterion") else "right")
    for row in updates:
        costs = (f"{row['cpu_seconds']:.2f}", f"{row['bytes_per_weight']:.3f}", f"{row['peak_extra_mib']:.0f}")
        table.add_row(str(row["setting"]), str(row["criterion"]), f"{row['weights']:,}", *costs)
    rich.print(table)

    steps = [in_a_process(arguments, "--step", name) for name in arguments.settings]
    table = Table(title=f"A training step at {BATCH} × {TOKENS} in {arguments.dtype} when no update is due")
    shown = ("null", "pruned", "observe and step", "log")
    for column in ("setting", "plain CPU s", "null run", "with pruning", "observe and step", "a log"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in steps:
        shares = (f"{float(row[f'{kind}_share']) - (kind in ('null', 'pruned')):+.2%}" for kind in shown)
        table.add_row(str(row["setting"]), f"{row['plain_seconds']:.2f}", *shares)
    rich.print(table)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"updates": updates, "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
