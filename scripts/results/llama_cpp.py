"""A language model whose layers differ, in llama.cpp: log-probabilities and greedy continuations beside PyTorch's.

    python scripts/results/llama_cpp.py SmolLM2-135M --data wikitext2/test.txt --output llama_cpp.json

Heads and neurons are zeroed by hand, as unevenly as can be: some groups of heads and up to an eighth of the neurons, every head of
one layer and every neuron of another. The condensed model is exported as GGUF in each type and compared on prompts out of a text.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import condense, export_model
from hf_prune.export import gguf
from hf_prune.export.llama_cpp import ask, serving
from hf_prune.model import find_blocks


@torch.no_grad()
def zero_unevenly(model: Any) -> None:
    """Zero the output columns of heads and neurons: other numbers of them in each layer, none left in two."""
    attentions = [block for block in find_blocks(model) if block.unit == "head"]
    feed_forwards = [block for block in find_blocks(model) if block.unit == "neuron"]
    depth = len(attentions)
    for number, block in enumerate(attentions):
        per_group = block.units_per_group
        dead = block.num_units if number == 2 * depth // 3 else per_group * (number % 5 == 1)
        block.output.layer.weight[:, : dead * block.unit_width] = 0
    for number, block in enumerate(feed_forwards):
        dead = block.num_units if number == 5 * depth // 6 else block.num_units // 8 * (number % 7) // 6
        block.output.layer.weight[:, :dead] = 0


def continuation(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What a model writes if it always takes the likeliest token."""
    ends = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    found: list[int] = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **ends)[0].tolist()
    return found[len(prompt) :]


def measure(
    model: Any, options: argparse.Namespace, prompts: list[list[int]], wanted: list[list[int]], quantize: str | None
) -> Any:
    """One file: how it agrees, and how many continuations are equal."""
    batches = [{"input_ids": torch.tensor([prompt])} for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        made = export_model(model, options.model, Path(folder, "out"), "gguf", quantize=quantize, batches=batches)
        equal, first = 0, []
        with serving(Path(folder, "out", made.file), 128) as server:
            for prompt, tokens in zip(prompts, wanted):
                request = {"prompt": prompt, "n_predict": len(tokens), "temperature": 0, "ignore_eos": True, "return_tokens": True}
                found = ask(server, "/completion", request)["tokens"]
                equal += found == tokens
                first.append(next((place for place, pair in enumerate(zip(found, tokens)) if pair[0] != pair[1]), len(tokens)))
    agreement = made.to_dict()["agreement"]
    return {"bytes": made.bytes, **agreement, "equal_continuations": equal, "equal_tokens": sum(first) / len(first)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all types and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A folder with a Llama, Mistral or Qwen2 and its tokenizer.")
    parser.add_argument("--data", required=True, help="A text.")
    parser.add_argument("--output", required=True, help="The JSON file to write.")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=24, help="Tokens of a prompt, and of its continuation.")
    options = parser.parse_args(arguments)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()
    zero_unevenly(model)
    before = model.num_parameters()
    condense(model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.data).read_text(encoding="utf-8")
    ids = tokenizer(text[: 400 * options.prompts], verbose=False)["input_ids"]
    step = len(ids) // options.prompts
    prompts = [ids[place * step :][: options.length] for place in range(options.prompts)]
    wanted = [continuation(model, prompt, options.length) for prompt in prompts]
    results: dict[str, Any] = {
        "parameters": [before, model.num_parameters()],
        "heads": [block.num_units for block in find_blocks(model) if block.unit == "head"],
        "neurons": [block.num_units for block in find_blocks(model) if block.unit == "neuron"],
        "runtime": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
    }
    for quantize in (None, *gguf.QUANTIZATIONS):
        results[quantize or "f32"] = measure(model, options, prompts, wanted, quantize)
        print(quantize or "f32", results[quantize or "f32"], flush=True)
        Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
