"""TRL: supervised fine-tuning of a tiny Llama with LoRA, pruned; merged, condensed and saved. Argument: an empty folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from start import make, sentences
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_prune import PruningCallback, PruningConfig, PruningRule, condense, condense_plan, sparsity_report

folder = Path(sys.argv[1])
texts, _ = sentences(64)
start = make(folder / "start", "llama")
rules = [
    PruningRule(pattern="neuron", target_sparsity=0.5, scope="local"),
    PruningRule(pattern="kv_group", target_sparsity=0.5, scope="local"),
]
trainer = SFTTrainer(
    model=start,
    args=SFTConfig(output_dir=str(folder / "out"), max_steps=16, use_cpu=True, bf16=False, report_to="none", logging_steps=4),
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=AutoTokenizer.from_pretrained(start),
    peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[PruningCallback(PruningConfig(pattern=None, frequency=2, rules=rules))],
)
trainer.train()
assert any("sparsity" in entry for entry in trainer.state.log_history)
assert abs(sparsity_report(trainer.model).sparsity - 0.5) < 0.01, sparsity_report(trainer.model)
merged = trainer.model.merge_and_unload()
assert condense_plan(merged).parameters > 0
size, before = merged.num_parameters(), merged.eval()(input_ids=torch.arange(4, 12)[None]).logits
assert condense(merged) is merged
assert merged.num_parameters() < size
merged.save_pretrained(folder / "condensed")
trainer.processing_class.save_pretrained(folder / "condensed")
torch.save(before, folder / "expected.pt")
