"""sentence-transformers: a SentenceTransformer pruned under its own Trainer, condensed and saved. Argument: an empty folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from start import make, sentences

from hf_prune import ModelCardCallback, PruningCallback, PruningConfig, PruningRule, condense, condense_plan, sparsity_report

folder = Path(sys.argv[1])
texts, labels = sentences(64)
others, other_labels = sentences(64, seed=1)
data = Dataset.from_dict(
    {"first": texts, "second": others, "label": [float(one == other) for one, other in zip(labels, other_labels)]}
)
body = Transformer(make(folder / "start"))
width = body.get_embedding_dimension()
model = SentenceTransformer(modules=[body, Pooling(width), Dense(width, 16), Normalize()], device="cpu")
rules = [PruningRule(pattern=pattern, target_sparsity=0.5, scope="local") for pattern in ("neuron", "head")]
args = SentenceTransformerTrainingArguments(
    str(folder / "out"), num_train_epochs=2, use_cpu=True, report_to="none", logging_steps=4, learning_rate=1e-3
)
callbacks = [PruningCallback(PruningConfig(pattern=None, frequency=2, rules=rules)), ModelCardCallback()]
trainer = SentenceTransformerTrainer(
    model=model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model), callbacks=callbacks
)
trainer.train()
assert any("sparsity" in entry for entry in trainer.state.log_history)
report = sparsity_report(model)
assert [block.alive * 2 for block in report.blocks] == [block.units for block in report.blocks], report
assert condense_plan(model).parameters > 0
assert (
    "SentenceTransformer" in (folder / "out" / "README.md").read_text() or "BertModel" in (folder / "out" / "README.md").read_text()
)
before, size = model.encode(texts[:8]), sum(parameter.numel() for parameter in model.parameters())
assert condense(model) is model
assert sum(parameter.numel() for parameter in model.parameters()) < size
assert np.abs(model.encode(texts[:8]) - before).max() <= 1e-5
model.save_pretrained(str(folder / "condensed"))
np.save(folder / "expected.npy", before)
