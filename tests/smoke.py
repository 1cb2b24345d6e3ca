"""A user's first minute, outside of any checkout: prune, condense, save, load and compare; prints where hf_prune is."""

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_prune

sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
model = BertForSequenceClassification(BertConfig(**sizes)).eval()
batch = {"input_ids": torch.arange(24).view(8, 3)}
rules = [hf_prune.PruningRule(pattern="head"), hf_prune.PruningRule(pattern="neuron")]
report = hf_prune.prune(model, hf_prune.PruningConfig(target_sparsity=0.5, rules=rules), [batch], held_out=0.0)
hf_prune.condense(model).save_pretrained("small")
again = AutoModelForSequenceClassification.from_pretrained("small").eval()
assert torch.equal(again(**batch).logits, model(**batch).logits)
print(hf_prune.__file__)
