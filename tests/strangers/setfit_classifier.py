"""SetFit: a SetFitModel, which is no torch module, pruned under its own Trainer, condensed and saved. Argument: an empty folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression
from start import make, sentences

from hf_prune import PruningCallback, PruningConfig, condense, condense_plan, sparsity_report

folder = Path(sys.argv[1])
texts, labels = sentences(16)
body = Transformer(make(folder / "start"))
embedder = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu")
model = SetFitModel(model_body=embedder, model_head=LogisticRegression(), labels=["smaller", "larger"])
args = TrainingArguments(str(folder / "out"), max_steps=16, batch_size=8, report_to="none", logging_steps=4)
config = PruningConfig(pattern="neuron", target_sparsity=0.5, scope="local", frequency=2)
trainer = Trainer(
    model=model, args=args, train_dataset=Dataset.from_dict({"text": texts, "label": labels}), callbacks=[PruningCallback(config)]
)
trainer.train()
assert any("sparsity" in entry for entry in trainer.st_trainer.state.log_history)
report = sparsity_report(model)
assert {block.alive for block in report.blocks if block.kind == "neurons"} == {24}, report
assert condense_plan(model).parameters > 0
before = np.asarray(model.predict_proba(texts))
assert condense(model) is model
assert condense_plan(model).parameters == 0
assert np.abs(np.asarray(model.predict_proba(texts)) - before).max() <= 1e-5
model.save_pretrained(str(folder / "condensed"))
np.save(folder / "expected.npy", before)
