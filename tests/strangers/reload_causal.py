"""A fresh process: what `sft_lora.py` saved gives what it gave. Argument: the folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_prune  # noqa: F401  (it lets transformers load condensed models)

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "condensed")
assert torch.allclose(model(input_ids=torch.arange(4, 12)[None]).logits, torch.load(folder / "expected.pt"), rtol=0, atol=1e-5)
print(model.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=4, do_sample=False).tolist())
