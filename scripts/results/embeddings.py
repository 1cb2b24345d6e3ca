"""Sentence embeddings in each runtime and type, of a dense model and a smaller one: quality, size, speed.

    python scripts/results/embeddings.py all-MiniLM-L6-v2 SMALL --pairs mrpc/validation.jsonl --data text.txt --output OUT.json

The embedding of a text is the mean over its tokens, of length one, and two texts are as similar as their cosine. Pairs are ranked
by that: average precision and the area under the ROC curve say how well paraphrases come first, Spearman's correlation how alike
the order is to that of the dense model in PyTorch. The text gives the rows that scales of int8 are found by. The folder's own
modules of sentence-transformers are not used, but compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_prune.export.compare import Run
from hf_prune.export.inputs import outputs_of
from hf_prune.export.runtimes import RUNTIMES, benchmark_runtimes
from hf_prune.measure.running import as_exported
from hf_prune.oneshot.data import calibration_batches

Labelled = Sequence[tuple[Mapping[str, Tensor], Tensor]]


def embeddings(run: Run, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over tokens, of length one, `[rows, width]`."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((run(batch)["last_hidden_state"].float() * mask).sum(1) / mask.sum(1), dim=-1)


def similarities(run: Run, pairs: Labelled) -> list[float]:
    """The cosine of each pair; the rows of a batch are all first texts, then all second ones."""
    halves = (embeddings(run, batch).chunk(2) for batch, _ in pairs)
    return [cosine for first, second in halves for cosine in (first * second).sum(-1).tolist()]


def pairs_of(file: str, tokenizer: Any, size: int = 16) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The pairs of a file, in batches."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [row[name] for name in ("sentence1", "sentence2") for row in part]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        found.append((dict(encoded), torch.tensor([row["label"] for row in part])))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="A folder of sentence-transformers.")
    parser.add_argument("small", help="The smaller model's.")
    parser.add_argument("--pairs", required=True, help="JSON lines with sentence1, sentence2 and label.")
    parser.add_argument("--data", required=True, help="Text to find scales by.")
    parser.add_argument("--output", required=True, help="The JSON file to write.")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models: list[Any] = [AutoModel.from_pretrained(path).eval() for path in (options.dense, options.small)]
    tokenizer = AutoTokenizer.from_pretrained(options.small)
    labelled = pairs_of(options.pairs, tokenizer)
    labels = [label for _, part in labelled for label in part.tolist()]
    seen: list[list[float]] = []

    def average_precision(run: Run, pairs: Labelled) -> float:
        seen.append(similarities(run, pairs))
        return float(average_precision_score(labels, seen[-1]))

    runtimes = [name for name in RUNTIMES if name != "compile"]
    rows = calibration_batches(models[1], tokenizer, options.data, max_length=128, rows=128)
    report = benchmark_runtimes(
        models[1], models[0], runtimes, calibration=rows, labelled=labelled, metric=average_precision, repeats=options.repeats
    )
    results = report.to_dict()
    for row, found in zip(results["rows"], seen):
        row |= {"roc_auc": roc_auc_score(labels, found), "spearman": float(spearmanr(seen[0], found).statistic)}
    texts = [json.loads(line)["sentence1"] for line in Path(options.pairs).read_text(encoding="utf-8").splitlines()[:16]]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with as_exported(models[1]) as plain:
        own = embeddings(lambda given: outputs_of(plain, given), batch)
    theirs = SentenceTransformer(options.small).encode(texts, convert_to_tensor=True)
    results["difference_from_sentence_transformers"] = float((own - theirs).abs().max())
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    print(report)
    print(report.advice(options.small))
    for row in results["rows"]:
        print(row["model"], row["runtime"], row["dtype"], f"{row['metric']:.4f} {row['roc_auc']:.4f} {row['spearman']:.4f}")


if __name__ == "__main__":
    main()
