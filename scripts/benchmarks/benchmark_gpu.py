"""What pruning costs on a GPU, and what it brings: mask updates, a training step, the latency of smaller models.

    python scripts/benchmarks/benchmark_gpu.py --output runs/gpu.json

A random model of BERT-base's size. Updates: milliseconds of one mask update, by pattern. A step: forward, backward and AdamW in
bfloat16 at 16 × 128 without and with `observe()` and `step()`, in turn, when no update is due. Latency: the dense model, the same
with half of its heads and neurons masked, condensed, and condensed and compiled, in half precision, in turn. Medians; every time
ends with a synchronization.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from hf_prune import Pruner, PruningConfig, PruningRule, condense
from hf_prune.measure.latency import benchmark, now

PATTERNS = {"1x1": "global", "4x1": "global", "2:4": "local", "1xchannel": "global", "head": "global", "neuron": "global"}
VARIANTS = ("dense", "masked", "condensed", "compiled")

Row = dict[str, Any]


def build(arguments: argparse.Namespace) -> BertForSequenceClassification:
    """A random BERT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": arguments.hidden_size, "intermediate_size": 4 * arguments.hidden_size}
    heads = max(arguments.hidden_size // 64, 2)
    config = BertConfig(num_hidden_layers=arguments.layers, num_attention_heads=heads, **sizes)
    return BertForSequenceClassification(config).to(arguments.device)


def tokens(arguments: argparse.Namespace, rows: int) -> dict[str, torch.Tensor]:
    """Random rows."""
    return {"input_ids": torch.randint(0, 30522, (rows, arguments.tokens), device=arguments.device)}


def timed(arguments: argparse.Namespace, do: Any) -> float:
    """Milliseconds of one call."""
    start = now(torch.device(arguments.device))
    do()
    return 1000 * (now(torch.device(arguments.device)) - start)


def measure_updates(arguments: argparse.Namespace) -> list[Row]:
    """One mask update for each pattern, in a run where each step has one; the first is left out."""
    rows = []
    for pattern, scope in PATTERNS.items():
        model = build(arguments)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        config = PruningConfig(pattern=pattern, scope=scope, frequency=1, warmup_steps=0, cooldown_steps=0)
        pruner = Pruner(model, config, total_steps=arguments.repeats + 2)
        times = []
        for _ in range(arguments.repeats + 1):
            pruner.observe()
            times.append(timed(arguments, pruner.step))
        weights = sum(group.weights for group in pruner.plan().groups)
        rows.append({"pattern": pattern, "scope": scope, "weights": weights, "ms": statistics.median(times[1:])})
    return rows


def measure_step(arguments: argparse.Namespace) -> Row:
    """A training step without and with pruning, in turn; the first, which warms up and prunes, is left out."""
    models = {name: build(arguments).train() for name in ("plain", "pruned")}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    config = PruningConfig(pattern="4x1", initial_sparsity=0.25, warmup_steps=1, frequency=10**6)
    pruner = Pruner(models["pruned"], config, total_steps=10**9)
    batch = {**tokens(arguments, 16), "labels": torch.randint(0, 2, (16,), device=arguments.device)}

    def step(name: str) -> None:
        with torch.autocast(arguments.device, torch.bfloat16):
            loss = models[name](**batch).loss
        loss.backward()
        if name == "pruned":
            pruner.observe()
        optimizers[name].step()
        if name == "pruned":
            pruner.step()
        optimizers[name].zero_grad()

    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats + 1):
        for name in models:
            times[name].append(timed(arguments, lambda name=name: step(name)))
    plain, pruned = (statistics.median(values[1:]) for values in times.values())
    return {"plain_ms": plain, "pruned_ms": pruned, "callback_share": pruned / plain - 1}


def measure_latency(arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds of a forward, of each variant, at each batch size."""
    dense = build(arguments).eval()
    masked = copy.deepcopy(dense)
    rules = [PruningRule(pattern=pattern, target_sparsity=0.5) for pattern in ("head", "neuron")]
    pruner = Pruner(masked, PruningConfig(criterion="magnitude", scope="local", rules=rules), total_steps=1)
    for parameter in masked.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.observe()
    pruner.step()
    pruner.finish()
    masked.zero_grad()
    condensed = condense(copy.deepcopy(masked))
    kind = torch.float16 if arguments.device == "cuda" else torch.float32
    models: dict[str, Any] = {"dense": dense, "masked": masked, "condensed": condensed, "compiled": copy.deepcopy(condensed)}
    models = {name: model.to(kind) for name, model in models.items()}
    models["compiled"] = torch.compile(models["compiled"], backend=arguments.backend)
    return [
        {"batch": rows, "tokens": arguments.tokens, **benchmark(models, tokens(arguments, rows), arguments.repeats)}
        for rows in arguments.batch_sizes
    ]


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    updates = Table(title=f"One mask update, {found['device']}")
    for column in ("pattern", "scope", "weights", "ms"):
        updates.add_column(column, justify="right" if column in ("weights", "ms") else "left")
    for row in found["updates"]:
        updates.add_row(row["pattern"], row["scope"], f"{row['weights']:,}", f"{row['ms']:.2f}")
    step = found["step"]
    shares = f"{step['plain_ms']:.1f} ms without pruning, {step['pruned_ms']:.1f} ms with it ({step['callback_share']:+.1%})"
    latency = Table(title="Latency in ms, half of the heads and neurons pruned (times as fast as dense)")
    for column in ("batch", *VARIANTS):
        latency.add_column(column, justify="right")
    for row in found["latency"]:
        cells = (f"{row[name]:.2f} (×{row['dense'] / row[name]:.2f})" for name in VARIANTS)
        latency.add_row(f"{row['batch']} × {row['tokens']}", *cells)
    rich.print(updates, f"A training step: {shares}", latency)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure everything, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where; the CPU is there to try the script")
    parser.add_argument("--layers", type=int, default=12, help="transformer layers")
    parser.add_argument("--hidden_size", type=int, default=768, help="width of the model")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=20, help="times each thing is measured")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"), help="where the JSON goes")
    arguments = parser.parse_args(command_line)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "updates": measure_updates(arguments),
        "step": measure_step(arguments),
        "latency": measure_latency(arguments),
    }
    show(found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
