"""The cost of condensing, and the speed of a condensed BERT compared with a hand-built one of the same sizes.

    python scripts/benchmarks/benchmark_condense.py --output model_cards/results/benchmark_condense.json

A random model of BERT-base's size loses 6 of 12 heads and 1,536 of 3,072 neurons in every layer, different ones in each. It is
condensed, and then the dense model, the condensed one and a BERT of plain torch modules run the same batch in turn on one thread;
medians of CPU time. The hand-built one is the upper limit of the speedup from removing these weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import rich
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel

from hf_prune import condense
from hf_prune.measure.latency import benchmark
from hf_prune.model import find_blocks


class HandmadeLayer(nn.Module):
    """A layer of BERT."""

    def __init__(self, hidden: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.heads, width = heads, 64 * heads
        self.query, self.key, self.value = (nn.Linear(hidden, width) for _ in range(3))
        self.output, self.attention_norm = nn.Linear(width, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.up, self.down, self.norm = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden), nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            part(states).unflatten(2, (self.heads, 64)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        context = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        states = self.attention_norm(states + self.output(context))
        return self.norm(states + self.down(nn.functional.gelu(self.up(states))))


class HandmadeBert(nn.Module):
    """BERT for batches without padding."""

    def __init__(self, config: BertConfig, heads: int, neurons: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.words, self.positions = nn.Embedding(config.vocab_size, hidden), nn.Embedding(config.max_position_embeddings, hidden)
        self.types, self.norm = nn.Embedding(config.type_vocab_size, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(HandmadeLayer(hidden, heads, neurons) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(input_ids.shape[1])
        states = self.norm(self.words(input_ids) + self.types(torch.zeros_like(input_ids)) + self.positions(positions))
        for layer in self.layers:
            states = layer(states)
        return states, self.pooler(states[:, 0]).tanh()


@torch.no_grad()
def mask_half(model: nn.Module) -> None:
    """Zero the outputs of half of the heads and neurons of every block."""
    for block in find_blocks(model):
        dead = torch.randperm(block.num_units)[: block.num_units // 2]
        weight = block.output.module.get_parameter("weight")
        weight.unflatten(1, (block.num_units, block.unit_width))[:, dead] = 0


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30, help="forward passes of each model")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(num_hidden_layers=arguments.layers)
    dense = BertModel(config).eval()
    mask_half(dense)
    seconds = []
    for _ in range(3):
        condensed = copy.deepcopy(dense)
        start = time.process_time()
        condense(condensed, verify=False)
        seconds.append(time.process_time() - start)
    handmade = HandmadeBert(config, heads=6, neurons=1536).eval()
    with torch.no_grad():
        for own, other in zip(handmade.parameters(), condensed.parameters(), strict=True):
            own.copy_(other)
        tokens = torch.randint(0, config.vocab_size, (arguments.batch_size, arguments.tokens))
        outputs = {name: model(tokens)[0] for name, model in (("dense", dense), ("condensed", condensed), ("by hand", handmade))}
    gaps = {name: float((output - outputs["dense"]).abs().max()) for name, output in outputs.items()}
    models = {"dense": dense, "condensed": condensed, "by hand": handmade}
    milliseconds = benchmark(models, {"input_ids": tokens}, arguments.repeats)

    table = Table(
        title=f"batch {arguments.batch_size} × {arguments.tokens}; condensing took {statistics.median(seconds):.2f} CPU s"
    )
    for column in ("", "parameters", "CPU ms per batch", "times dense", "gap"):
        table.add_column(column, justify="right" if column else "left")
    for name, model in models.items():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        ratio = milliseconds["dense"] / milliseconds[name]
        table.add_row(name, f"{parameters:,}", f"{milliseconds[name]:.1f}", f"{ratio:.2f}", f"{gaps[name]:.0e}")
    rich.print(table)
    if arguments.output:
        results = {
            "condense_cpu_s": statistics.median(seconds),
            "cpu_ms": milliseconds,
            "condensed_to_dense": milliseconds["dense"] / milliseconds["condensed"],
            "handmade_to_dense": milliseconds["dense"] / milliseconds["by hand"],
            "condensed_to_handmade": milliseconds["condensed"] / milliseconds["by hand"],
            "largest_difference": gaps,
            "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
