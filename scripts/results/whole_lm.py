"""A causal language model with fewer layers, narrower, or with fewer heads and neurons, without training: perplexity at equal size.

    python scripts/results/whole_lm.py SmolLM2-135M --data_dir wikitext2 --rows 16 --windows 20

Each cell shrinks the dense model on random windows of `valid.txt` and evaluates it in float32 on windows of `test.txt`, as
`oneshot_lm.py` does: by 10 and 20 % of its layers, of its hidden size, or of the weights outside the embedding. Results go to a
JSON file cell by cell; cells that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from oneshot_lm import parser_of, windows
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_prune import PruningConfig, PruningRule, condense, prune, shrink_depth, shrink_hidden
from hf_prune.measure.perplexity import perplexity
from hf_prune.shrink.depth import CRITERIA

Batches = list[dict[str, Tensor]]


def fewer_layers(share: float, criterion: str, model: Any, batches: Batches) -> None:
    """Take a share of the layers away."""
    number = model.config.num_hidden_layers
    shrink_depth(model, number - round(share * number), batches, criterion=criterion)


def narrower(share: float, method: str, model: Any, batches: Batches) -> None:
    """Take a share of the hidden size away, to the closest that the number of heads divides."""
    config = model.config
    size = round((1 - share) * config.hidden_size / config.num_attention_heads) * config.num_attention_heads
    shrink_hidden(model, size, None if method == "by weights" else batches, rotate=method == "rotated")


def fewer_units(share: float, model: Any, batches: Batches) -> None:
    """Take a share of the weights away as groups of heads and as neurons, by the defaults."""
    config = PruningConfig(target_sparsity=share, rules=[PruningRule(pattern="kv_group"), PruningRule(pattern="neuron")])
    prune(model, config, batches)
    condense(model)


def cells() -> dict[str, Callable[[Any, Batches], None] | None]:
    """The name of each cell → what it does to the dense model; None: nothing."""
    found: dict[str, Callable[[Any, Batches], None] | None] = {"dense": None}
    for share in (0.1, 0.2):
        found |= {f"layers {share:.0%}/{criterion}": partial(fewer_layers, share, criterion) for criterion in CRITERIA}
        found |= {
            f"hidden {share:.0%}/{method}": partial(narrower, share, method) for method in ("by weights", "channels", "rotated")
        }
        found[f"units {share:.0%}/default"] = partial(fewer_units, share)
    return found


def measure(options: argparse.Namespace, name: str, texts: dict[str, Tensor]) -> dict[str, Any]:
    """One cell."""
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf_file, dtype="float32").eval()
    started, shrink = time.process_time(), cells()[name]
    if shrink is not None:
        shrink(model, [{"input_ids": row[None]} for row in texts["valid"]])
    return {
        "cpu_seconds": time.process_time() - started,
        "parameters": model.num_parameters(),
        "removed_layers": (getattr(model.config, "hf_prune", None) or {}).get("removed_layers"),
        "perplexity": perplexity(model, texts["test"].flatten(), options.length).perplexity,
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Cell by cell."""
    dense = results["dense"]["perplexity"] if "dense" in results else float("nan")
    found = Table("", "method", "parameters", "perplexity", "× dense", "CPU s", title="WikiText-2 test")
    for name, cell in results.items():
        what, _, method = name.partition("/")
        figures = (f"{cell['perplexity']:.2f}", f"{cell['perplexity'] / dense:.3f}", f"{cell['cpu_seconds']:.0f}")
        found.add_row(what, method, f"{cell['parameters']:,}", *figures)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure what the options ask for; return all results."""
    parser = parser_of(__doc__, cells(), 16, Path("whole_lm.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts = windows(options)
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.cells:
        if name not in results:
            results[name] = measure(options, name, texts)
            options.output.write_text(json.dumps(results, indent=1))
            print(f"{name}: {results[name]['perplexity']:.2f}, {results[name]['cpu_seconds']:.0f} CPU s", flush=True)
    rich.print(table(results))
    return results


if __name__ == "__main__":
    main()
