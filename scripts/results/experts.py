"""Fewer experts without training: perplexity of small mixtures of experts, trained here on real text.

    python scripts/results/experts.py --data_dir wikitext2

Each mixture (OLMoE, Qwen3-MoE; 4 layers, 128 wide, 16 experts of 128, of which 4 serve a token) is trained for some hundred steps
on `valid.txt`, with its loss of balance, under a byte-level BPE of 4,096 tokens made from it. Then experts leave every layer, by
each criterion and at random (mean and range of three draws), and the perplexity is that of `test.txt`. A JSON file keeps it all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig, set_seed

from hf_prune import shrink_experts
from hf_prune.measure.perplexity import perplexity
from hf_prune.oneshot.walk import Rows
from hf_prune.shrink.experts import CRITERIA, contributions, keep_experts, largest

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "output_router_logits": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "olmoe": lambda: OlmoeConfig(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=128, norm_topk_prob=True),
}
#: How many experts stay.
LEFT = (12, 8, 4)
_LENGTH = 256


def tokens_of(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Windows of the training text, the tokens of the test text, and the size of the vocabulary that the training text makes."""
    texts = [(folder / f"{split}.txt").read_text() for split in ("valid", "test")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts[:1], trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], initial_alphabet=alphabet))
    train, test = (torch.tensor(tokenizer.encode(text).ids) for text in texts)
    return train[: len(train) // _LENGTH * _LENGTH].view(-1, _LENGTH), test, tokenizer.get_vocab_size()


def trained(family: str, rows: Tensor, steps: int, batch: int) -> Any:
    """A mixture after so many steps of AdamW under a cosine, in bfloat16."""
    set_seed(0)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    for step, chosen in zip(range(steps), _batches(len(rows), batch)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows[chosen], labels=rows[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{family}: step {step}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def _batches(rows: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(rows).split(size)


def without(model: Any, left: int, how: str, rows: Tensor, seed: int) -> Any:
    """A copy with so many experts a layer."""
    small = type(model)(model.config)
    small.load_state_dict(model.state_dict())
    batches = [{"input_ids": part} for part in rows.split(8)]
    if how in CRITERIA:
        return shrink_experts(small.eval(), left, batches, criterion=how)
    generator = torch.Generator().manual_seed(seed)
    names = contributions(small, Rows(batches[:1], []), "frequency")
    keep_experts(
        small, {name: largest(torch.rand(len(worth), generator=generator), left) for name, worth in names.items()}, batches[0]
    )
    return small.eval()


def measure(family: str, options: argparse.Namespace, train: Tensor, test: Tensor) -> dict[str, Any]:
    """All cells of a family."""
    started = time.process_time()
    model = trained(family, train, options.steps, options.batch_size)
    model.config.output_router_logits = False
    seconds = time.process_time() - started
    found: dict[str, Any] = {"training_cpu_seconds": seconds, "dense": perplexity(model, test, _LENGTH).perplexity, "cells": {}}
    for left in LEFT:
        for how in (*CRITERIA, "random"):
            seeds = range(3) if how == "random" else range(1)
            cells = [without(model, left, how, train[: options.rows], seed) for seed in seeds]
            found["cells"][f"{left}/{how}"] = [perplexity(small, test, _LENGTH).perplexity for small in cells]
    return found


def _words(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Family by family."""
    found = Table("", "experts", *CRITERIA, "random", title="WikiText-2 test, perplexity without training")
    for family, result in results.items():
        found.add_row(family, str(SIZES["num_experts"]), f"{result['dense']:.2f}", "", "")
        for left in LEFT:
            words = [_words(result["cells"][f"{left}/{how}"]) for how in (*CRITERIA, "random")]
            found.add_row("", str(left), *words)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train, shrink and measure what the options ask for; return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder with valid.txt and test.txt")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--test_tokens", type=int, help="only so many tokens of the test text; by default all")
    parser.add_argument("--output", type=Path, default=Path("experts.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train, test, size = tokens_of(options.data_dir)
    assert math.isclose(size, SIZES["vocab_size"], rel_tol=0.01)
    results = {family: measure(family, options, train, test[: options.test_tokens]) for family in options.families}
    options.output.write_text(json.dumps(results, indent=1))
    rich.print(table(results))
    return results


if __name__ == "__main__":
    main()
