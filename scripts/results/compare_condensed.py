"""Does a condensed text classifier give the same outputs as the masked one in pipelines, sentence-transformers and ONNX?

    python scripts/results/compare_condensed.py runs/mrpc/pruned-1
    python scripts/results/compare_condensed.py runs/mrpc/dense-1 --random 0  # heads and neurons masked at random, uneven by layer

The model is condensed and saved; both are reloaded by `pipeline` and, as bare encoders, by sentence-transformers, and the condensed
one is run as ONNX by onnxruntime. Prints the largest differences between the outputs of the two for a batch of sentences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import rich
import torch
from rich.table import Table
from sentence_transformers import SentenceTransformer
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

import hf_prune
from hf_prune.model import find_blocks

SENTENCES = (
    "The company said its profit doubled in the third quarter.",
    "Profit was twice as high.",
    "He told reporters on Friday that no decision had been made about the plant, its workers or the contracts of its suppliers.",
    "No.",
    "Shares rose three percent, to 25.10 dollars.",
)


@torch.no_grad()
def mask_randomly(model: PreTrainedModel, seed: int) -> None:
    """Zero value rows of some heads and up rows of some neurons, and the columns of half of these: none to most of a block."""
    generator = torch.Generator().manual_seed(seed)
    for block in find_blocks(model):
        into, width = block.roles["value" if block.kind == "attention" else "up"], block.unit_width
        dead = torch.rand(block.num_units, generator=generator) < 0.95 * torch.rand(1, generator=generator)
        into.module.weight[dead.repeat_interleave(width)] = 0
        block.output.module.weight[:, (dead & (torch.rand(len(dead), generator=generator) < 0.5)).repeat_interleave(width)] = 0


def compare(masked: Path, condensed: Path, sentences: Sequence[str] = SENTENCES) -> dict[str, float]:
    """The largest difference of scores in `pipeline`, of embeddings in sentence-transformers, and of logits in ONNX."""
    texts = list(sentences)
    scores, embeddings = {}, {}
    for name, folder in (("masked", masked), ("condensed", condensed)):
        rows = pipeline("text-classification", str(folder), top_k=None, device="cpu")(texts, batch_size=len(texts))
        scores[name] = torch.tensor([[part["score"] for part in sorted(row, key=lambda part: part["label"])] for row in rows])
        embeddings[name] = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(texts))
    return {
        "pipeline": float((scores["masked"] - scores["condensed"]).abs().max()),
        "sentence-transformers": float((embeddings["masked"] - embeddings["condensed"]).abs().max()),
        "ONNX": float((logits_of(masked, texts) - onnx_logits(condensed, texts)).abs().max()),
    }


def logits_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """The outputs of the model in a folder."""
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits
    return logits


def onnx_logits(folder: Path, texts: list[str]) -> torch.Tensor:
    """Its outputs as ONNX, exported with a different batch of a different size."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    example = dict(tokenizer(texts[:2], padding=True, return_tensors="pt"))
    path, sizes = folder / "model.onnx", {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in example}
    torch.onnx.export(
        model, (), str(path), kwargs=example, dynamo=True, dynamic_shapes=sizes, output_names=["logits"], verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = tokenizer(texts, padding=True, return_tensors="np")
    return torch.from_numpy(session.run(["logits"], {put.name: batch[put.name] for put in session.get_inputs()})[0])


def condense_and_compare(source: str, folder: Path, seed: int | None) -> tuple[dict[str, float], hf_prune.CondensePlan]:
    """Condense the classifier at `source`, masked at random first if a seed is given, and compare the two in `folder`."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    if seed is not None:
        mask_randomly(model, seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    plan = hf_prune.condense_plan(model)
    for name in ("masked", "condensed"):
        if name == "condensed":
            hf_prune.condense(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return compare(folder / "masked", folder / "condensed"), plan


def main() -> None:
    """Condense, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a text classifier with masked heads and neurons")
    parser.add_argument("--random", type=int, metavar="SEED", help="mask at random first")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gaps, plan = condense_and_compare(arguments.model, Path(folder), arguments.random)
    print(plan)
    table = Table("used by", "largest difference", title="masked and condensed")
    for name, gap in gaps.items():
        table.add_row(name, f"{gap:.1e}")
    rich.print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({"largest_difference": gaps, "plan": plan.to_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
